"""Replace the tensors of modules temporarily, and find parameters that several blocks share.

A parameter is shared if several blocks use it, or if its block runs more than once in a forward.
"""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.arithmetic import HALF, computed
from sparsefw.errors import InputError


@dataclass(frozen=True, eq=False)
class TensorSlot:
    """A place in a module for a parameter or a buffer.

    Attributes:
        tensors: the module's dict of parameters, or its dict of buffers.
        name: key of the slot in this dict.
        path: the slot's full name: the name of the module that `slots_of` was given, and `name`.
        own: the module's own tensor.
    """

    tensors: dict[str, Any]
    name: str
    path: str
    own: Tensor


# Makes the tensor for a slot.
MakeTensor = Callable[[TensorSlot], Tensor]


def slots_of(modules: Iterable[tuple[str, nn.Module]]) -> list[TensorSlot]:
    """List the slots of all tensors in modules. Each module comes with its name."""
    return [
        TensorSlot(tensors, name, f"{path}.{name}".removeprefix("."), tensor)
        for path, module in modules
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]


def fill(slots: Iterable[TensorSlot], make: MakeTensor) -> None:
    """Put other tensors into slots. All slots of one own tensor get the same new tensor.

    Args:
        slots: the slots.
        make: makes the tensor for a slot.
    """
    made: dict[int, Tensor] = {}
    for slot in slots:
        if id(slot.own) not in made:
            data = make(slot)
            is_parameter = isinstance(slot.own, nn.Parameter)
            made[id(slot.own)] = nn.Parameter(data, requires_grad=False) if is_parameter else data
        slot.tensors[slot.name] = made[id(slot.own)]


def restore(slots: Iterable[TensorSlot]) -> None:
    """Put the modules' own tensors back into their slots."""
    for slot in slots:
        slot.tensors[slot.name] = slot.own


class DenseBlock(nn.Module):
    """A block that keeps a copy of its present tensors, and runs with this copy after the block has been pruned."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        # The bound method is kept, since the block itself would be registered as a submodule.
        self._slots, self._run = slots_of(block.named_modules()), block.__call__
        self._copies = {id(slot.own): copy.deepcopy(slot.own) for slot in self._slots}
        self._named = [(name, self._copies[id(x)]) for name, x in block.named_parameters()]
        self._parameters_of = block.parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with the copies. All torch functions that this calls are the block's."""
        try:
            for slot in self._slots:
                slot.tensors[slot.name] = self._copies[id(slot.own)]
            return self._run(*args, **kwargs)
        finally:
            restore(self._slots)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the tensors back into the block."""
        for parameter, (_, before) in zip(self._parameters_of(), self._named, strict=True):
            parameter.copy_(before)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Yield the copies by the names of the block's parameters."""
        return iter(self._named)


@contextmanager
def filled(slots: list[TensorSlot], make: MakeTensor) -> Iterator[None]:
    """Put other tensors into slots inside the `with` block, see `fill`."""
    try:
        fill(slots, make)
        yield
    finally:
        restore(slots)


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device, in_fp32: bool = False) -> Iterator[None]:
    """Put the tensors of modules on a device inside the `with` block, as ordinary tensors (not of inference mode).

    Parameters are copied only if needed, see `is_copied`. Buffers are always copied: the modules may write to them.

    Args:
        modules: the modules.
        device: the device.
        in_fp32: whether tensors in half precision are converted to fp32.
    """
    slots = slots_of(("", module) for module in modules)
    others = [slot for slot in slots if not isinstance(slot.own, nn.Parameter) or is_copied(slot.own, device, in_fp32)]
    with filled(others, lambda slot: computed(slot.own.detach().to(device, copy=True), in_fp32)):
        yield


def is_copied(tensor: Tensor, device: torch.device, in_fp32: bool) -> bool:
    """Whether `on_device` copies a parameter."""
    return tensor.device != device or tensor.is_inference() or (in_fp32 and tensor.dtype in HALF)


@dataclass(frozen=True)
class SharedParameters:
    """Parameters of blocks that stay dense because they are used at several depths, by their names in the model.

    Attributes:
        names: all parameters that are one tensor, or overlap in memory, with a parameter of a block, this parameter
            included; and all parameters of `repeated` blocks.
        sources: maps a parameter without a tensor in the checkpoint to the parameter whose tensor it shares.
        repeated: names of the blocks that run more than once in a forward.
    """

    names: frozenset[str]
    sources: dict[str, str]
    repeated: tuple[str, ...]

    @property
    def notes(self) -> list[str]:
        """What the user should know about shared parameters, one line each."""
        inside = tuple(f"{block}." for block in self.repeated)
        between = sorted(name for name in self.names if not name.startswith(inside))
        notes = [f"stay dense: {len(between)} parameters that blocks share, {between[0]} first"] if between else []
        if self.repeated:
            count, first = len(self.repeated), self.repeated[0]
            notes.append(f"stay dense: {count} blocks that run more than once in a forward, {first} first")
        return notes


def block_of(parameter: str, blocks: Container[str]) -> str | None:
    """Name the block that a parameter belongs to; None if the parameter is outside of the blocks."""
    parts = parameter.split(".")
    return next((name for n in range(1, len(parts)) if (name := ".".join(parts[:n])) in blocks), None)


def shared_parameters(
    model: nn.Module, blocks: Iterable[str], tied: dict[str, str], stored: Collection[str]
) -> SharedParameters:
    """Find the parameters that blocks share with each other, or with the rest of the model.

    Args:
        model: the model. Its parameters may be on the meta device.
        blocks: names of the blocks, in the order of their calls.
        tied: maps a tied parameter to the parameter that it is tied to.
        stored: names of the parameters that the checkpoint has tensors for.

    Raises:
        InputError: a parameter outside of the blocks shares a block's tensor, and is not in the checkpoint.
    """
    calls = Counter(blocks)
    inside, repeated = tuple(f"{block}." for block in calls), tuple(block for block, n in calls.items() if n > 1)
    parameters = _named(model, calls)
    names = {name for name, _ in parameters if name.startswith(tuple(f"{block}." for block in repeated))}
    sources: dict[str, str] = {}
    for group in _groups(parameters, tied):
        if not any(name.startswith(inside) for name in group):
            continue
        names.update(group)
        source = next((name for name in group if name in stored), group[0])
        for name in group:
            if name in stored or name == source:
                continue
            if not name.startswith(inside):
                raise InputError(
                    f"{name}: unsupported model {type(model).__name__}: this parameter outside of the blocks is one "
                    f"tensor with {source}"
                )
            sources[name] = source
    return SharedParameters(frozenset(names), sources, repeated)


def _named(model: nn.Module, blocks: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """List all parameters of the model under all their names.

    Inside a block the names are those of the block's `named_parameters`, which the names of layers follow. In a block
    that is a wrapper they may differ from the names in the model.
    """
    slots = slots_of(model.named_modules(remove_duplicate=False))
    parameters = {slot.path: slot.own for slot in slots if isinstance(slot.own, nn.Parameter)}
    for block in blocks:
        module = model.get_submodule(block)
        own = {f"{block}.{name}": x for name, x in module.named_parameters(remove_duplicate=False)}
        for slot in slots_of(module.named_modules(prefix=block, remove_duplicate=False)):
            if slot.path not in own:
                parameters.pop(slot.path, None)
        parameters |= own
    return [*parameters.items()]


def _groups(parameters: list[tuple[str, nn.Parameter]], tied: dict[str, str]) -> list[list[str]]:
    """Group the names of parameters that are one tensor, or whose memory overlaps."""
    pairs, last = [*tied.items()], ("", 0, "")
    for memory, start, end, name in sorted((*_memory_of(x), name) for name, x in parameters):
        # Disjoint parts of one storage do not overlap, and are not grouped.
        if memory == last[0] and start < last[1]:
            pairs.append((name, last[2]))
        last = max(last, (memory, end, name))
    groups: dict[str, list[str]] = {}
    for name, other in pairs:
        one, two = groups.get(name, [name]), groups.get(other, [other])
        if one is not two:
            two += one
            groups |= dict.fromkeys(two, two)
    return [sorted(group) for group in {id(group): group for group in groups.values()}.values()]


def _memory_of(x: nn.Parameter) -> tuple[str, int, int]:
    """Name the memory of a parameter, with the addresses of its first entry and after its last entry.

    A tensor without data has a memory for itself alone.
    """
    if x.is_meta or not x.numel() or not x.data_ptr():
        return f"tensor {id(x)}", 0, 1
    last = sum(step * (size - 1) for step, size in zip(x.stride(), x.shape, strict=True))
    return str(x.device), x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
