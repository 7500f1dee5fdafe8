"""The tests of kernels run on a GPU: there is none here, so on the pretended one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.kernel_inputs import DEVICE

TESTS = Path(__file__).resolve().parents[1]
# Large products, which count on tensor cores, and what the interpreter alone does.
ELSEWHERE = "not all_on_gpu and not many_passes"
# It changes the shape of a tensor in place, which only a tensor with data can.
ELSEWHERE += " and not swaps_are_the_best"


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="here they run on a GPU")
def test_what_tests_make_lies_on_one_device():
    command = [sys.executable, "-m", "pytest", "-qq", "-p", "helpers.all_on_gpu", "-p", "no:cacheprovider"]
    selection = ["-m", "not slow and not gpu", "-k", ELSEWHERE, TESTS / "kernels"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run([*command, *selection], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
