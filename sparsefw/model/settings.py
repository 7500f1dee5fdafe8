"""Settings under which a forward returns no more than a run needs, and shows all its products."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@contextmanager
def attention_by_calls() -> Iterator[None]:
    """Inside the `with` block, `nn.MultiheadAttention` multiplies with one matrix at a time.

    By itself it calls one fused function, or one function of Python whose inside a torch function mode does not see.
    """
    fast, whole = torch.backends.mha.get_fastpath_enabled(), functional.multi_head_attention_forward
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        functional.multi_head_attention_forward = _not_dispatched(whole)
        yield
    finally:
        functional.multi_head_attention_forward = whole
        torch.backends.mha.set_fastpath_enabled(fast)


def _not_dispatched(function: Any) -> Any:
    """The same function of Python, which is not handed to a torch function mode as a whole."""
    names = function.__globals__ | {"has_torch_function": lambda operands: False}
    same = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


# Entries of a config, and their values in a run: a forward returns no more than is needed, and keeps no keys and values
# of a cache; mixtures multiply with one expert at a time, where the input of each is seen.
_ENTRIES: dict[str, Any] = {"output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
_ENTRIES |= {"return_dict": True, "use_cache": False, "_experts_implementation_internal": "eager"}


def ask_for_no_more(config: Any) -> None:
    """Change a config, and those in it, so that a forward returns what a run needs."""
    _ask(config)
    for name in getattr(config, "sub_configs", ()):
        ask_for_no_more(getattr(config, name, None))


def _ask(config: Any) -> None:
    for name, value in _ENTRIES.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)


@contextmanager
def asked_for_no_more(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside the `with` block, a model in memory is in evaluation mode, and its configs have the entries of a run.

    Yields a function that sets all back before its end: a model is written with its own config.
    """
    # Modules may share a config.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, name, getattr(config, name, None)) for config in configs for name in _ENTRIES]
    before += [(module, "training", module.training) for module in model.modules()]

    def set_back() -> None:
        for owner, name, value in before:
            if value is not None:
                setattr(owner, name, value)

    try:
        model.eval()
        for config in configs:
            _ask(config)
        yield set_back
    finally:
        set_back()
