"""Tests on the pretended GPU: each tensor has a place, so what stays on the CPU by mistake is refused."""

import pytest
from helpers.all_on_gpu import run_on_gpu

# One file of each kind of run, then kernels with descriptors or in a graph, and plain torch's branches for a GPU.
# `make test-pretended` runs the others.
FILES = (
    "test_in_memory.py",
    "test_unusual_models.py",
    "driver/test_reconstruct_in_memory.py",
    "extras/test_pack.py",
    *(f"kernels/test_{name}.py" for name in ("accumulate", "product", "conjugate", "operation", "plain", "repeat")),
)


@pytest.mark.slow
def test_all_on_gpu():
    run_on_gpu(*FILES)
