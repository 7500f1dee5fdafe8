"""Runs, recoveries and evaluations on a GPU: there is none here, so their tests run on the pretended one.

On it every tensor has a place: what stays on the CPU by mistake, or is compared with the CPU's, is refused.
"""

import pytest
from helpers.all_on_gpu import run_on_gpu

PARTS = {
    "runs": "test_api.py test_in_memory.py test_examples.py test_unusual_models.py driver/test_prune.py",
    "models": "test_batches.py driver/test_generation.py model/test_multimodal.py",
    "reconstructions": "driver/test_reconstruct.py driver/test_reconstruct_in_memory.py "
    "driver/test_reconstruct_runs.py driver/test_predicted.py driver/test_ranks.py driver/test_same_bits.py",
    "recoveries and evaluations": "extras/test_recovery.py extras/evaluation extras/test_pack.py",
}
# Parts of names of tests, and why they do not run there.
LEFT_OUT = {
    "time_kernel": "times a product that torch has for CUDA alone",
    "does_not_fit_is_refused": "the GPU is full before the host",
    "interrupted_while_it_wrote": "takes long, and nothing of it is a GPU's",
}


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_all_on_gpu(part):
    run_on_gpu(PARTS[part].split(), LEFT_OUT)
