#!/usr/bin/env bash
# The first hour on a GPU: `bench/gpu.sh FOLDER STEP` for STEP = 1 to 5, each within 8 minutes. What the steps do, and what
# they need, is in gpu/gpu_steps.py. With --tiny everything is tried out at tiny sizes, without a GPU.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=.:bench:bench/quality:bench/runs:bench/gpu${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
# The limits of the parts add up to less.
exec timeout --kill-after=5 478 python3 bench/gpu/gpu_steps.py "$folder" "${@:2}"
