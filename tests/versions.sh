#!/usr/bin/env bash
# The fast tests with the oldest and with the newest versions that setup.py allows, each in an environment of its own.
# Usage: tests/versions.sh [oldest|newest]. The oldest torch on PyPI is the build for CUDA: 3 GB to load, 8 GB on disk.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Every lower bound in setup.py as a pin: "torch>=2.10" becomes torch==2.10.
sed -nE 's/^ +"([A-Za-z0-9_]+)>=([0-9.]+).*/\1==\2/p' setup.py > "$work/oldest.txt"
touch "$work/newest.txt"

failed=()
for name in ${1:-oldest newest}; do
  python3 -m venv "$work/$name"
  bin=$work/$name/bin
  "$bin/pip" install --quiet --constraint "$work/$name.txt" --editable '.[test]'
  echo "== $name"
  "$bin/pip" list 2> /dev/null | grep -iE '^(torch|triton|transformers|numpy|datasets|safetensors|huggingface|jinja2|tqdm|msgspec|filelock|psutil)'
  "$bin/python" -m pytest -q -n auto -m "not slow" -p no:cacheprovider || failed+=("$name")
  if [ "$name" = oldest ]; then
    # The one pair of versions that needs sparsefw/kernels/interpreter.py: the oldest Triton with the newest numpy.
    "$bin/pip" install --quiet --upgrade numpy
    "$bin/python" -m pytest -q -n auto -m "not slow" -p no:cacheprovider tests/kernels || failed+=("new numpy")
  fi
  rm -rf "${work:?}/$name"
done
[ ${#failed[@]} -eq 0 ] || { echo "failed with: ${failed[*]}"; exit 1; }
