"""A plugin of pytest that runs tests on the pretended GPU, which refuses a tensor that is left on the CPU by mistake.

`make test-pretended` runs everything that can run there, driver/test_all_on_gpu.py the files that find most for their
seconds.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
# Parts of names of tests, and why they do not run there.
LEFT_OUT = {
    "all_on_gpu": "would run itself",
    "time_kernel": "times a product that torch has for CUDA alone",
    "does_not_fit_is_refused": "the GPU is full before the host",
    "interrupted_while_it_wrote": "takes long, and nothing of it is a GPU's",
    "many_passes": "what the interpreter alone does",
    "may_start_from_any_threshold": "takes ten seconds; `compiled.py --only step --test` runs it with these tiles",
    "one chunk-row_swaps": "takes as long as all others; `compiled.py --only swaps --test` runs it with these tiles",
    "swaps_are_the_best": "changes the shape of a tensor in place, which only a tensor with data can",
}


def run_on_gpu(*paths: str) -> None:
    """Run the fast tests of files below tests/ there, in a process of its own, with the tiles of an H100."""
    run_fast_tests(paths, "-p", __name__, "--tiles", "sm_90")


def run_fast_tests(paths: Iterable[str], *options: str) -> None:
    """Run the fast tests of files below tests/ with these options of pytest, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-qq", "-p", "no:cacheprovider", "-m", "not slow", *options]
    command += [str(TESTS / path) for path in paths]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what does not run there."""
    items[:] = [item for item in items if not any(name in item.name for name in LEFT_OUT)]


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
