"""A plugin of pytest: all tests run on the pretended GPU. What a test leaves on the CPU by mistake is refused there."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]


def run_on_gpu(paths: list[str], left_out: Iterable[str], *options: str) -> None:
    """Run the fast tests of some files so, in a process of its own.

    Args:
        paths: paths below tests/.
        left_out: parts of the names of tests that are not run.
        options: more arguments of pytest.
    """
    command = [sys.executable, "-m", "pytest", "-qq", "-p", __name__, "-p", "no:cacheprovider", "-m", "not slow"]
    command += ["-k", " and ".join(f"not {name}" for name in left_out), *options]
    command += [str(TESTS / path) for path in paths]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main() -> Iterator[None]:
    """Enter the pretended GPU before a test module asks for one."""
    # As without `--gpu`, and before anything asks for CUDA.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    import torch
    import triton
    from helpers.pretended_gpu import pretended_gpu
    from triton.backends.compiler import GPUTarget

    make = torch.tensor

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        # It makes its tensors where no mode sees it.
        return make(*args, **kwargs) if device is None else make(*args, **kwargs).to(device)

    with pretended_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)
        triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))
        return (yield)
