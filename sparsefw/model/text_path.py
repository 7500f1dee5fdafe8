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
from sparsefw.model.explained import ForwardFailed, explained

# Tokens of the forward: enough for every kind of attention.
TOKENS = 8

# Functions that ask a tensor for its form alone. Who asks for the device needs the tensor there.
_FORM = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad", "is_meta")}
_FORM |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel}


@dataclass(frozen=True)
class TextPath:
    """What a forward on text runs through.

    Attributes:
        runs: the module whose forward it is: the model, or its text model where the model's own forward cannot do
            without other input.
        blocks: the blocks by name, in the order of their calls. Each is called once.
        idle: the blocks of the same list that are not called, by name.
        reads: names of the parameters and stored buffers outside of the blocks that are read, all names of tied ones.
    """

    runs: PreTrainedModel
    blocks: dict[str, nn.Module]
    idle: dict[str, nn.Module]
    reads: frozenset[str]


def follow_text(model: PreTrainedModel, folder: Path) -> TextPath:
    """Find a model's blocks, and what else text needs of it.

    Args:
        model: the model on the meta device; its computed buffers are on the host.
        folder: folder of the checkpoint, for messages.

    Raises:
        InputError: there is no list of blocks or more than one, its forward fails, or it calls a block twice.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    kind, found = type(model).__name__, _stacks(model, depth)
    failed: InputError | None = None
    for runs in (model, *_text_models(model, found)) if found else ():
        try:
            if path := _follow(model, found, runs):
                return path
            break
        except InputError as error:
            failed = failed or error
            if not isinstance(error, ForwardFailed):
                # A forward that runs, and is refused for what it does, must not be replaced by another one.
                break
    if failed and len(found) == 1:
        raise failed
    count = f"{len(found)} of them ({', '.join(found)}) were found" if found else "none was found"
    raise InputError(
        f"{folder}: unsupported model {kind}: one list of {depth} decoder blocks (num_hidden_layers) is needed, {count}"
    )


def _stacks(model: PreTrainedModel, depth: Any) -> dict[str, nn.ModuleList]:
    """The lists of modules that may be the blocks, by their names in the model.

    They are those of `depth` modules, or all, in the decoder. Lists inside the modules of another list count only if
    they have `depth` modules, and no other list has.
    """
    with explained(type(model).__name__, "its get_decoder"):
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    # Some classes call their head a decoder.
    root = decoder if any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else model
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer, deep = _outermost(lists), [m for m in lists if len(m) == depth]
    choices = [m for m in outer if m in deep], _outermost(deep), outer
    found = next((c for c in choices if len(c) == 1), None) or next(filter(None, choices), [])
    return {name: module for name, module in model.named_modules() if module in found}


def _text_models(model: PreTrainedModel, stacks: dict[str, nn.ModuleList]) -> list[PreTrainedModel]:
    """Models inside a model that have these lists of modules and a head of their own."""
    inner = [m for m in model.modules() if m is not model and isinstance(m, PreTrainedModel)]
    holding = [m for m in inner if set(stacks.values()) <= set(m.modules())]
    return [m for m in holding if m.get_output_embeddings() is not None]


def _outermost(lists: list[nn.ModuleList]) -> list[nn.ModuleList]:
    inside = {module for outer in lists for module in outer.modules() if module is not outer}
    return [module for module in lists if module not in inside]


@torch.no_grad()
def _follow(model: PreTrainedModel, stacks: dict[str, nn.ModuleList], runs: PreTrainedModel) -> TextPath | None:
    """Run a model's own forward on a few tokens, with stand-ins for its blocks, and look at what it uses.

    The first block of each class is run, and shows what the others return.

    Args:
        model: the model.
        stacks: the lists that may be its blocks, by name.
        runs: the model, or a model inside it, whose forward is run.

    Returns:
        What it uses; None if it runs through blocks of several of the lists.

    Raises:
        InputError: the forward fails, calls a block twice or none at all, or gives a block no hidden states.
    """
    kind, calls, returned = type(runs).__name__, _Calls(type(runs).__name__), {}
    blocks = {f"{name}.{i}": block for name, stack in stacks.items() for i, block in enumerate(stack)}
    inside = {module for block in blocks.values() for module in block.modules()}

    def stand_in(name: str, args: tuple, kwargs: dict) -> Any:
        calls.add(name, args)
        block = blocks[name]
        form = type(block)
        if form not in returned:
            with explained(kind, name), _filled(block.modules()):
                returned[form] = form.forward(block, *args, **kwargs)
        output = returned[form]
        return type(output)([args[0], *output[1:]]) if isinstance(output, tuple | list) else args[0]

    with _filled(module for module in model.modules() if module not in inside):
        stored = model.state_dict(keep_vars=True)
        reads = _Reads({id(tensor) for tensor in stored.values() if not tensor.is_meta})
        for name, block in blocks.items():
            block.forward = lambda *args, _name=name, **kwargs: stand_in(_name, args, kwargs)
        try:
            with explained(kind, "its forward"), reads:
                runs(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
        finally:
            for block in blocks.values():
                del block.forward
        read = frozenset(key for key, tensor in stored.items() if id(tensor) in reads.seen)
    if not calls.names:
        raise InputError(f"unsupported model {kind}: its forward on text calls none of the blocks {', '.join(stacks)}")
    used = [
        name
        for name in stacks
        if any(block in calls.names for block in (f"{name}.{i}" for i in range(len(stacks[name]))))
    ]
    if len(used) > 1:
        return None
    called = {name: blocks[name] for name in calls.names}
    idle = {name: block for name, block in blocks.items() if name.startswith(f"{used[0]}.") and name not in called}
    return TextPath(runs, called, idle, read)


class _Calls:
    """The blocks that a forward has called.

    Args:
        model: name of the model's class.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self.names: list[str] = []

    def add(self, name: str, args: tuple) -> None:
        """Note a call of a block.

        Raises:
            InputError: it was called before, or its first argument is not the hidden states of windows.
        """
        if name in self.names:
            raise InputError(f"unsupported model {self._model}: {name} runs more than once in a forward")
        if not args or not isinstance(args[0], Tensor):
            raise InputError(
                f"unsupported model {self._model}: {name} is not given its hidden states as first argument"
            )
        if args[0].shape[:2] == (TOKENS, 1):
            raise InputError(
                f"unsupported model {self._model}: {name} is given (tokens, windows), not (windows, tokens)"
            )
        self.names.append(name)


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
    """Inside the `with` block, these modules have zeros in place of tensors on the meta device; tied ones stay tied.

    All of them are views of one piece of memory, as large as the largest.
    """
    slots: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in modules:
        stored: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stored:
            slots += [(tensors, name, x) for name, x in tensors.items() if x is not None and x.is_meta]
    memory = torch.from_numpy(np.zeros(max((tensor.nbytes for *_, tensor in slots), default=0), np.uint8))
    made = {id(tensor): _zeros_like(tensor, memory) for *_, tensor in slots}
    for tensors, name, tensor in slots:
        tensors[name] = made[id(tensor)]
    try:
        yield
    finally:
        for tensors, name, tensor in slots:
            tensors[name] = tensor


def _zeros_like(tensor: Tensor, memory: Tensor) -> Tensor:
    """Zeros in this memory, which takes none as long as it is only read."""
    data = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
