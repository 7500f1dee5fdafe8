"""Tell the experts of a mixture from parts that every token goes through, one after the other.

Both are numbered modules that are alike. A mixture chooses its experts, and all read what was there before the choice.
Parts in turn read what the part before them has returned: the two attentions of a block of LongCat-Flash, say, or the
blocks of a stage of Swin.
"""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefw.model.layers.names import experts_of
from sparsefw.model.operands import tensors_in

_NOTHING: frozenset[str] = frozenset()


class _Sources(TorchFunctionMode):
    """Follows what modules return through a block's forward, as long as all entries of it go on.

    A function that is given integers or booleans may choose among the entries, and so may one that writes to a part of
    a tensor: what it makes is not followed.

    Attributes:
        read: by name of a module that was called, those modules whose outputs its input was made of.
    """

    def __init__(self) -> None:
        super().__init__()
        # By a tensor's id: the tensor, and the modules.
        self._made: dict[int, tuple[weakref.ref[Tensor], frozenset[str]]] = {}
        self.read: dict[str, frozenset[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs))
        versions = [x._version for x in operands]
        sources = _NOTHING.union(*map(self._sources_of, operands))
        out = func(*args, **kwargs)
        written = [x for x, version in zip(operands, versions, strict=True) if x._version != version]
        if func is not Tensor.__setitem__ and all(x.is_floating_point() for x in operands):
            for made in (*tensors_in(out), *written):
                self._note(made, sources)
        return out

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the input of a module, its first tensor. Others may be sums that go from module to module."""
        for x in tensors_in((args, kwargs))[:1]:
            self.read[name] = self.read.get(name, _NOTHING) | self._sources_of(x)

    def leave(self, name: str, module: nn.Module, args: tuple, out: Any) -> None:
        """Note what a module returns."""
        for x in tensors_in(out):
            self._note(x, self._sources_of(x) | {name})

    def _note(self, x: Tensor, sources: frozenset[str]) -> None:
        if sources:
            self._made[id(x)] = weakref.ref(x), sources

    def _sources_of(self, x: Tensor) -> frozenset[str]:
        known = self._made.get(id(x))
        return known[1] if known and known[0]() is x else _NOTHING


def find_experts(block: nn.Module, run: Callable[[], Any]) -> frozenset[str]:
    """Names of the modules in a block that may be experts: those of `experts_of` that are no parts in turn.

    The modules of a list are parts in turn if all are called, and all but one read what others have returned.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through it.
    """
    experts, sources = experts_of(block), _Sources()
    if not experts:
        return experts
    with torch.no_grad(), ExitStack() as hooks:
        for name in experts:
            module = block.get_submodule(name)
            enter, leave = partial(sources.enter, name), partial(sources.leave, name)
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        with sources:
            run()
    lists: dict[str, set[str]] = {}
    for name in experts:
        lists.setdefault(name.rpartition(".")[0], set()).add(name)
    in_turn = (
        names
        for names in lists.values()
        if names <= sources.read.keys() and sum(names.isdisjoint(sources.read[name]) for name in names) == 1
    )
    return experts.difference(*in_turn)
