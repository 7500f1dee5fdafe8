"""What a forward on text alone runs through: the blocks that it calls, and the other tensors that it reads.

A model may hold more: a tower for images or sound, blocks that look at what the tower puts out, layers that predict
further tokens. None of it is loaded. The model's own forward on a few tokens shows what is used, so that no
architecture is named here.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from sparsefw.errors import InputError
from sparsefw.model.explained import TEXT, ForwardFailed, explained
from sparsefw.model.flow import Flow
from sparsefw.model.followed import FEW_TOKENS, Followed, zeros_in
from sparsefw.model.operands import tensors_in
from sparsefw.model.stand_ins import Forms

# Functions that ask a tensor for its form alone. Who asks for the device needs the tensor there.
_FORM = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad", "is_meta")}
_FORM |= {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel}


@dataclass(frozen=True)
class TextPath:
    """What a forward on text runs through.

    Attributes:
        runs: the module whose forward it is: the model, or its text model where the model's own forward cannot do
            without other input.
        blocks: the blocks by name.
        order: their names in the order of their calls. One that is called twice stands there twice.
        idle: the blocks of the same list that are not called, by name.
        reads: names of the parameters and stored buffers outside of the blocks that are read, all names of tied ones.
        flow: how the blocks hand tensors on.
        forms: what the blocks return for a few tokens.
        logits_itemsize: bytes of an entry of the logits; 0 without any.
    """

    runs: PreTrainedModel
    blocks: dict[str, nn.Module]
    order: list[str]
    idle: dict[str, nn.Module]
    reads: frozenset[str]
    flow: Flow
    forms: Forms
    logits_itemsize: int


def follow_text(model: PreTrainedModel, folder: Path) -> TextPath:
    """Find a model's blocks, and what else text needs of it.

    Args:
        model: the model on the meta device; its computed buffers are on the host.
        folder: folder of the checkpoint, for messages.

    Raises:
        InputError: there is no list of blocks; or as `Followed.record`.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    kind, found = type(model).__name__, _stacks(model, depth)
    failed: InputError | None = None
    for runs in (model, *_text_models(model, found)) if found else ():
        try:
            return _follow(model, found, runs)
        except InputError as error:
            failed = failed or error
            if not isinstance(error, ForwardFailed):
                # A forward that runs, and is refused for what it does, must not be replaced by another one.
                break
    if failed:
        raise failed
    raise InputError(f"{folder}: unsupported model {kind}: it has no list of blocks (num_hidden_layers is {depth})")


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
def _follow(model: PreTrainedModel, stacks: dict[str, nn.ModuleList], runs: PreTrainedModel) -> TextPath:
    """Run a model's own forward on a few tokens, with stand-ins for its blocks, and look at what it uses.

    Args:
        model: the model.
        stacks: the lists that may be its blocks, by name.
        runs: the model, or a model inside it, whose forward is run.

    Raises:
        InputError: it calls none of the blocks; or as `Followed.record`.
    """
    listed = {f"{name}.{i}": block for name, stack in stacks.items() for i, block in enumerate(stack)}
    # Norms may stand in lists of their own.
    blocks = {name: block for name, block in listed.items() if any(block.children())}
    inside = {module for block in blocks.values() for module in block.modules()}
    with zeros_in(module for module in model.modules() if module not in inside):
        stored = model.state_dict(keep_vars=True)
        few = Followed(runs, blocks, FEW_TOKENS, TEXT, zeros_in)
        reads = _Reads({id(tensor) for tensor in stored.values() if not tensor.is_meta})
        with reads:
            recording = few.record()
        read = frozenset(key for key, tensor in stored.items() if id(tensor) in reads.seen)
    if recording is None:
        raise InputError(
            f"unsupported model {type(runs).__name__}: its forward on text calls none of the blocks {', '.join(stacks)}"
        )
    used = {name.rpartition(".")[0] for name in few.names}
    called = {name: blocks[name] for name in few.names}
    idle = {name: block for name, block in blocks.items() if name.rpartition(".")[0] in used and name not in called}
    (ids,) = FEW_TOKENS.tensors
    flow = replace(recording.flow, windows_first=recording.hidden.shape[:2] == ids.shape)
    return TextPath(runs, called, few.names, idle, read, flow, few.forms, few.logits_itemsize)


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
            self.seen |= self._known.intersection(map(id, tensors_in((args, kwargs))))
        return func(*args, **(kwargs or {}))
