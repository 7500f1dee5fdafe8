"""A plugin of pytest: all tests run on the pretended GPU. What a test leaves on the CPU by mistake is refused there."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest


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
