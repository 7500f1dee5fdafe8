"""The tests of kernels run on a GPU: there is none here, so on the pretended one, with the tiles of a real one."""

import pytest
from helpers.all_on_gpu import run_on_gpu
from helpers.kernel_inputs import DEVICE

ELSEWHERE = {
    "all_on_gpu": "this one",
    "many_passes": "what the interpreter alone does",
    "may_start_from_any_threshold": "takes ten seconds; `compiled.py --only step --test` runs it with these tiles",
    "swaps_are_the_best": "changes the shape of a tensor in place, which only a tensor with data can",
}


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="here they run on a GPU")
def test_what_tests_make_lies_on_one_device():
    run_on_gpu(["kernels"], ELSEWHERE, "--tiles", "sm_90")
