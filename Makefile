.PHONY: lint format test test-gpu bench bench-once

lint:
	ruff check .
	ruff format --check .

format:
	ruff check --fix .
	ruff format .

test:
	pytest

# The whole of the kernel and solver tests on the GPU, and those that only make sense there.
test-gpu:
	pytest -m "gpu or not gpu"

bench:
	pytest bench/kernels/bench_*.py bench/runs/bench_*.py

# Every benchmark once, timing off: its correctness gates still hold.
bench-once:
	pytest bench/kernels/bench_*.py bench/runs/bench_*.py --benchmark-disable
