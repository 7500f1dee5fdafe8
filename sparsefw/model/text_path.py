"""What a forward on text alone runs through: the blocks that it calls, and the other tensors that it reads.

A model may hold more: a tower for images or sound, blocks that look at what the tower puts out, layers that predict
further tokens. None of it is loaded. The model's own forward on a few tokens shows what is used, so that no
architecture is named here. Its weights are zero, and take no memory: pages that nobody has written to are all the same
page.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from sparsefw.errors import InputError
from sparsefw.model.explained import explained

# Tokens of the forward: enough for every kind of attention.
TOKENS = 8

# Functions that ask a tensor for its form alone. Who asks for the device needs the tensor there.
_FORM = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad", "is_meta")}
_FORM |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel}


@dataclass(frozen=True)
class TextPath:
    """What a forward on text runs through.

    Attributes:
        blocks: numbers of the blocks in the order of their calls. Each is called once.
        reads: names of the parameters and stored buffers outside of the blocks that are read, all names of tied ones.
    """

    blocks: tuple[int, ...]
    reads: frozenset[str]


def find_stack(model: PreTrainedModel, folder: Path) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks, and its name in the model.

    It is the one list of num_hidden_layers modules, or the only list there is, in the decoder. Lists inside the modules
    of another list are looked at last.

    Args:
        model: the model.
        folder: folder of the checkpoint, for the message.

    Raises:
        InputError: there is no such list, or more than one.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    names = {module: name for name, module in model.named_modules()}
    with explained(type(model).__name__, "its get_decoder"):
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    # Some classes call their head a decoder.
    root = decoder if any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else model
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer, deep = _outermost(lists), [m for m in lists if len(m) == depth]
    choices = [m for m in outer if m in deep], _outermost(deep), outer
    for found in choices:
        if len(found) == 1:
            return names[found[0]], found[0]
    found = next(filter(None, choices), [])
    listed = ", ".join(names[m] for m in found)
    count = f"{len(found)} of them ({listed}) were found" if found else "none was found"
    raise InputError(
        f"{folder}: unsupported model {type(model).__name__}: "
        f"one list of {depth} decoder blocks (num_hidden_layers) is needed, {count}"
    )


def _outermost(lists: list[nn.ModuleList]) -> list[nn.ModuleList]:
    inside = {module for outer in lists for module in outer.modules() if module is not outer}
    return [module for module in lists if module not in inside]


@torch.no_grad()
def follow_text(model: PreTrainedModel, name: str, stack: nn.ModuleList) -> TextPath:
    """Run a model's own forward on a few tokens, with stand-ins for its blocks, and look at what it uses.

    A block of each kind is run once, and shows what the others return.

    Args:
        model: the model on the meta device; its computed buffers are on the host.
        name: name of the list of blocks in the model.
        stack: the list of blocks.

    Raises:
        InputError: the forward fails, calls a block twice or none at all, or gives a block no hidden states.
    """
    kind, calls, returned = type(model).__name__, _Calls(name), {}
    inside = {module for block in stack for module in block.modules()}

    def stand_in(i: int, args: tuple, kwargs: dict) -> Any:
        calls.add(i, args)
        form = (type(stack[i]), tuple((n, p.shape) for n, p in stack[i].named_parameters()))
        if form not in returned:
            with explained(kind, f"{name}.{i}"), _filled(stack[i].modules()):
                returned[form] = type(stack[i]).forward(stack[i], *args, **kwargs)
        output = returned[form]
        return (args[0], *output[1:]) if isinstance(output, tuple) else args[0]

    with _filled(module for module in model.modules() if module not in inside):
        stored = model.state_dict(keep_vars=True)
        reads = _Reads({id(tensor) for tensor in stored.values() if not tensor.is_meta})
        for i, block in enumerate(stack):
            block.forward = lambda *args, _i=i, **kwargs: stand_in(_i, args, kwargs)
        try:
            with explained(kind, "its forward"), reads:
                model(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
        finally:
            for block in stack:
                del block.forward
        read = frozenset(key for key, tensor in stored.items() if id(tensor) in reads.seen)
    if not calls.blocks:
        raise InputError(f"unsupported model {kind}: its forward on text calls none of the blocks {name}")
    return TextPath(tuple(calls.blocks), read)


class _Calls:
    """The blocks that a forward has called."""

    def __init__(self, stack: str) -> None:
        self._stack = stack
        self.blocks: list[int] = []

    def add(self, i: int, args: tuple) -> None:
        """Note a call of block i.

        Raises:
            InputError: it was called before, or its first argument is no tensor.
        """
        if i in self.blocks:
            raise InputError(f"unsupported model: {self._stack}.{i} runs more than once in a forward, not only once")
        if not args or not isinstance(args[0], Tensor):
            raise InputError(f"unsupported model: {self._stack}.{i} is not given its hidden states as first argument")
        self.blocks.append(i)


class _Reads(TorchFunctionMode):
    """Sees which of some tensors torch functions read.

    Args:
        known: ids of the tensors.

    Attributes:
        seen: ids of those that were read.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known = known
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func not in _FORM:
            self.seen |= self._known.intersection(map(id, tree_leaves((args, kwargs))))
        return func(*args, **(kwargs or {}))


@contextmanager
def _filled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the `with` block, these modules have zeros in place of tensors on the meta device; tied ones stay tied."""
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    made: dict[int, Tensor] = {}
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    before.append((tensors, name, tensor))
                    if id(tensor) not in made:
                        made[id(tensor)] = _zeros_like(tensor)
    for tensors, name, tensor in before:
        tensors[name] = made[id(tensor)]
    try:
        yield
    finally:
        for tensors, name, tensor in before:
            tensors[name] = tensor


def _zeros_like(tensor: Tensor) -> Tensor:
    """Zeros on the host that take no memory as long as they are only read."""
    data = torch.from_numpy(np.zeros(tensor.nbytes, np.uint8)).view(tensor.dtype).view(tensor.shape)
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
