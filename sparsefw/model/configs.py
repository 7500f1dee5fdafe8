"""What configs of transformers ask a forward for, beside what it makes of its last block's output: a run needs no more.

Hidden states of all blocks, weights of attention and logits of routers are collected by hooks, and blocks have none
while something stands in for them. Keys and values would be handed on from block to block.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn

# Entries of a config, and their values in a run.
OUTPUTS = {"output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
OUTPUTS |= {"return_dict": True}

# An entry of a config: the config, its name, its value.
Entry = tuple[Any, str, Any]


def ask_for_no_more(config: Any) -> None:
    """Change a config, and those in it, so that a forward returns what a run needs."""
    for part in _parts(config):
        for _, name, value in _others(part, OUTPUTS):
            setattr(part, name, value)


@contextmanager
def asked_for_no_more(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Inside the `with` block, a model's forward returns what a run needs, and keeps no keys and values.

    Yields a function that makes a context in which the configs are as they were, such as the model is written with.
    """
    # Modules may share a config.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    entries = [entry for config in configs.values() for entry in _others(config, OUTPUTS | {"use_cache": False})]
    with _set(entries) as as_before:
        yield as_before


@contextmanager
def _set(entries: list[Entry]) -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Inside the `with` block, entries have these values. Yields the function that makes the inverse of it."""
    before = [(config, name, getattr(config, name)) for config, name, _ in entries]
    try:
        for config, name, value in entries:
            setattr(config, name, value)
        yield partial(_set, before)
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def _others(config: Any, wanted: dict[str, bool]) -> list[Entry]:
    """The entries that a config has with other values than these, with these values."""
    its = {name: getattr(config, name, None) for name in wanted}
    return [(config, name, value) for name, value in wanted.items() if its[name] is not None and its[name] is not value]


def _parts(config: Any) -> Iterator[Any]:
    """A config, and those in it."""
    yield config
    for name in getattr(config, "sub_configs", ()):
        yield from _parts(getattr(config, name, None))
