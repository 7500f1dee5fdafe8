"""What a forward on batches of any kind runs through: the blocks of all lists of modules that it calls one by one.

Blocks of several lists are one after the other, as the layers of an encoder and those of a decoder are.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from sparsefw.data import Batch
from sparsefw.errors import InputError
from sparsefw.model.explained import BATCHES
from sparsefw.model.flow import Flow
from sparsefw.model.followed import Followed, NotABlock
from sparsefw.model.slots import on_device
from sparsefw.model.stand_ins import Forms

# Modules whose weights are no layers.
_NO_LAYERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class BatchPath:
    """What a forward runs through.

    Attributes:
        blocks: the blocks by name.
        order: their names in the order of their calls. One that is called twice stands there twice.
        idle: the blocks of the same lists that are not called, by name.
        flow: how the blocks hand tensors on.
        forms: what the blocks return.
        passed_over: by the name of a list, why its modules are no blocks.
    """

    blocks: dict[str, nn.Module]
    order: list[str]
    idle: dict[str, nn.Module]
    flow: Flow
    forms: Forms
    passed_over: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def follow_batch(model: nn.Module, batch: Batch, device: torch.device) -> BatchPath:
    """Find the blocks that a model's forward on a batch runs through.

    Args:
        model: the model, in memory.
        batch: arguments of its forward.
        device: device that it runs on.

    Raises:
        InputError: it has no list of blocks, or as `Followed.record`.
    """
    passed_over: dict[str, str] = {}
    batch, ready = batch.to(device), partial(on_device, device=device)
    while stacks := _stacks(model, passed_over):
        blocks = {name: block for stack in stacks.values() for name, block in stack.items()}
        followed = Followed(model, blocks, batch, BATCHES, partial(ready, copy_buffers=True))
        inside = {module for block in blocks.values() for module in block.modules()}
        try:
            with ready(module for module in model.modules() if module not in inside):
                recording = followed.record()
        except NotABlock as error:
            # The lists inside of its modules may be such lists.
            passed_over[next(name for name, stack in stacks.items() if error.name in stack)] = str(error)
            continue
        if recording is None:
            break
        called = {name: blocks[name] for name in followed.names}
        used = [stack for stack in stacks.values() if not called.keys().isdisjoint(stack)]
        idle = {name: block for stack in used for name, block in stack.items() if name not in called}
        return BatchPath(called, followed.names, idle, recording.flow, followed.forms, passed_over)
    if passed_over:
        raise InputError(next(iter(passed_over.values())))
    raise InputError(
        f"unsupported model {type(model).__name__}: its forward on these batches calls no modules of a ModuleList or "
        "Sequential that hold layers"
    )


def _stacks(model: nn.Module, passed_over: dict[str, str]) -> dict[str, dict[str, nn.Module]]:
    """The outermost lists of modules that may be blocks, by name: for each such modules by name."""
    found: dict[str, dict[str, nn.Module]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside or name in passed_over or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        stack = {f"{name}.{n}".removeprefix("."): child for n, child in module.named_children() if _may_be_block(child)}
        if stack:
            found[name] = stack
            inside.update(module.modules())
    return found


def _may_be_block(module: nn.Module) -> bool:
    """Whether a module consists of others, and has a matrix."""
    if not any(module.children()):
        return False
    owners = (m for m in module.modules() if not isinstance(m, _NO_LAYERS))
    return any(x.dim() in (2, 3) for m in owners for x in m.parameters(recurse=False))
