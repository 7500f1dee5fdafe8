.PHONY: lint format test test-all test-pretended test-gpu test-llmcompressor versions bench bench-once

# Workers of pytest: one a core, and one thread each (conftest.py).
WORKERS ?= auto

lint:
	ruff check .
	ruff format --check .
	mypy
	python tests/size.py

format:
	ruff check --fix .
	ruff format .

# Without --gpu no test sees a GPU (conftest.py).

# All but what is marked slow.
test:
	pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

# All that needs no GPU. A file goes to one worker, so that what its tests share (compiled kernels,
# pruned models) is made once; in the order of the files, or the longest one, which has few tests, would come last.
test-all:
	pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# On the pretended GPU, whose tensors are computed on the CPU: five minutes. CI runs those that find most for their time.
PRETENDED = kernels driver extras/evaluation extras/test_pack.py model/test_multimodal.py \
    $(patsubst %,test_%.py,api batches examples in_memory unusual_models)
test-pretended:
	PYTHONPATH=tests pytest -q -p helpers.all_on_gpu --tiles sm_90 -m "not slow" $(addprefix tests/,$(PRETENDED))

# What computes on the GPU, and what only makes sense there. One process: one GPU. The others compare bits with a CPU's,
# or fork.
test-gpu:
	pytest --gpu tests/kernels tests/solver $(patsubst %,tests/model/test_%.py,activations measure streamed)

# The modifier of llm-compressor, which takes an older transformers: in an environment of its own.
test-llmcompressor:
	python3 -m venv --clear build/llmcompressor
	build/llmcompressor/bin/pip install --quiet --editable '.[llmcompressor]' pytest
	build/llmcompressor/bin/python -m pytest -q -p no:cacheprovider tests/extras/test_llmcompressor.py

# The fast tests with the oldest and the newest versions that setup.py allows: downloads gigabytes.
versions:
	tests/versions.sh

# On this machine: every operation, by the command and by pytest-benchmark.
bench:
	python -m bench
	pytest --gpu bench/kernels/bench_*.py

# Every operation once, at tiny sizes, without timing: a wrong result is an error.
bench-once:
	pytest -q -n $(WORKERS) bench/kernels/bench_*.py --benchmark-disable
