#!/usr/bin/env bash
# All that there is to measure on a GPU: `bench/gpu.sh FOLDER` writes bench.json, bench.md, roofline.png, what the
# machine is and what the kernels' tests said into FOLDER. Needs torch, triton, transformers, pytest, pytest-benchmark
# and matplotlib; this project need not be installed, and there need be no network.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=. HF_HUB_OFFLINE=1
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv | tee "$out/machine.txt"
python3 -m torch.utils.collect_env > "$out/environment.txt"
status=0
python3 -m pytest -q bench/kernels/bench_*.py bench/runs/bench_*.py --benchmark-json="$out/bench.json" \
    --benchmark-columns=median,iqr,rounds \
    > "$out/bench.txt" || status=$?
tail -20 "$out/bench.txt"
python3 bench/tables.py "$out"
python3 -m pytest -q -m "gpu or not gpu" tests/kernels > "$out/tests.txt" || status=$?
tail -3 "$out/tests.txt"
exit "$status"
