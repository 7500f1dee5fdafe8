"""Models without `torch.compile`: compiled code hides what it does from torch's modes, and wrappers change names."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def unwrapped(model: Any) -> Iterator[Any]:
    """Inside the `with` block, modules are in the places of what `torch.compile` has made of them.

    Yields the model itself, or as it is what is no module.
    """
    model = _inner(model)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    wrapped = [(m, name, x) for m in modules for name, x in m._modules.items() if _inner(x) is not x]
    try:
        for module, name, wrapper in wrapped:
            module._modules[name] = _inner(wrapper)
        yield model
    finally:
        for module, name, wrapper in wrapped:
            module._modules[name] = wrapper


def _inner(module: Any) -> Any:
    """What `torch.compile` was given; a wrapper that has hooks of its own stays."""
    # The class of wrappers is in the compiler, which takes seconds to import.
    while (
        isinstance(module, nn.Module)
        and "_orig_mod" in module._modules
        and not (module._forward_hooks or module._forward_pre_hooks)
    ):
        module = module._modules["_orig_mod"]
    return module


def as_python() -> AbstractContextManager[Any]:
    """Inside the `with` block, compiled code runs as Python."""
    # If the compiler has not been imported, nothing is compiled.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
