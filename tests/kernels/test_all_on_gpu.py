"""The tests of kernels on the pretended GPU, with the tiles of a real one."""

import pytest
from helpers.all_on_gpu import run_on_gpu
from helpers.kernel_inputs import DEVICE

# Kernels with descriptors, with many tiles or in a graph, and plain torch's branches for a GPU. `make test-pretended`
# runs the others.
NAMES = ("accumulate", "product", "step", "conjugate", "row_kernels", "plain", "repeat")


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="here they run on a GPU")
def test_all_on_gpu():
    run_on_gpu(*(f"kernels/test_{name}.py" for name in NAMES))
