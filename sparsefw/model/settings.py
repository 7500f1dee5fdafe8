"""Settings under which a forward returns no more than a run needs, and shows all its products."""

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
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


# Entries of a config, and their values where a forward returns no more than a run needs.
_OUTPUTS = {"output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
_OUTPUTS |= {"return_dict": True}

# The same for a model in memory: it keeps no keys and values, and its mixtures multiply with one expert at a time,
# where the input of each is seen.
_IN_MEMORY = _OUTPUTS | {"use_cache": False, "_experts_implementation_internal": "eager"}

# An entry of a config: the config, its name, its value.
Entry = tuple[Any, str, Any]


def ask_for_no_more(config: Any) -> None:
    """Change a config, and those in it, so that a forward returns what a run needs."""
    _set(_entries(config, _OUTPUTS))
    for name in getattr(config, "sub_configs", ()):
        ask_for_no_more(getattr(config, name, None))


@contextmanager
def asked_for_no_more(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Inside the `with` block, the configs of a model in memory have the entries of a run.

    Yields a function that makes a context in which the configs are as they were, such as the model is written with.
    """
    # Modules may share a config.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    with _changed([entry for config in configs.values() for entry in _entries(config, _IN_MEMORY)]) as as_before:
        yield as_before


@contextmanager
def _changed(entries: list[Entry]) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Inside the `with` block, entries have these values. Yields the function that makes the inverse of it."""
    before = [(config, name, getattr(config, name)) for config, name, _ in entries]
    try:
        _set(entries)
        yield partial(_changed, before)
    finally:
        _set(before)


def _entries(config: Any, values: dict[str, Any]) -> list[Entry]:
    """Those of these entries that a config has, with these values."""
    return [(config, name, value) for name, value in values.items() if getattr(config, name, None) is not None]


def _set(entries: Iterable[Entry]) -> None:
    for config, name, value in entries:
        setattr(config, name, value)
