"""Places of tensors in modules, which can hold other tensors for a while."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Slot:
    """A place of a parameter or buffer.

    Attributes:
        tensors: the parameters or the buffers of the module.
        name: its name there.
        path: its name in the model, or inside the block that was asked for.
        own: the tensor that is there by itself.
    """

    tensors: dict[str, Any]
    name: str
    path: str
    own: Tensor


def slots_of(modules: Iterable[tuple[str, nn.Module]]) -> list[Slot]:
    """The places of all tensors of modules, which come with their names."""
    slots = []
    for path, module in modules:
        stored: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stored:
            for name, tensor in tensors.items():
                if tensor is not None:
                    slots.append(Slot(tensors, name, f"{path}.{name}".removeprefix("."), tensor))
    return slots


def fill(slots: Iterable[Slot], make: Callable[[Slot], Tensor]) -> None:
    """Put other tensors in these places. A tensor that has several places gets one other tensor.

    Args:
        slots: the places.
        make: makes the tensor for a place.
    """
    made: dict[int, Tensor] = {}
    for slot in slots:
        if id(slot.own) not in made:
            data = make(slot)
            is_parameter = isinstance(slot.own, nn.Parameter)
            made[id(slot.own)] = nn.Parameter(data, requires_grad=False) if is_parameter else data
        slot.tensors[slot.name] = made[id(slot.own)]


def restore(slots: Iterable[Slot]) -> None:
    """Put the places' own tensors back."""
    for slot in slots:
        slot.tensors[slot.name] = slot.own


def addresses(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first entry, and behind its last one."""
    last = sum(step * (size - 1) for step, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def filled(slots: list[Slot], make: Callable[[Slot], Tensor]) -> Iterator[None]:
    """Inside the `with` block other tensors are in these places, see `fill`."""
    try:
        fill(slots, make)
        yield
    finally:
        restore(slots)


@contextmanager
def on_device(modules: Iterable[nn.Module], device: torch.device, copy_buffers: bool = False) -> Iterator[None]:
    """Inside the `with` block the tensors of modules are on a device, and none of them was made in inference mode.

    Args:
        modules: the modules.
        device: the device.
        copy_buffers: whether buffers are copies in any case. The modules may write to them.
    """
    slots = slots_of(("", module) for module in modules)
    others = [s for s in slots if is_copied(s.own, device) or (copy_buffers and not isinstance(s.own, nn.Parameter))]
    with filled(others, lambda slot: slot.own.detach().to(device, copy=True)):
        yield


def is_copied(tensor: Tensor, device: torch.device) -> bool:
    """Whether `on_device` copies a tensor."""
    return tensor.device != device or tensor.is_inference()


def overwrite(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor other values in place. One that was made in inference mode can be written to only there."""
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(values)
