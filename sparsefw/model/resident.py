"""A model in memory: all its weights are there, and a block is copied while it is worked on."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.checkpoint.tensors import Loadable, dequantized
from sparsefw.compiled import as_python
from sparsefw.data import Batch
from sparsefw.errors import InputError
from sparsefw.finite import check_finite
from sparsefw.model.batch_path import follow_batch
from sparsefw.model.configs import asked_for_no_more
from sparsefw.model.explained import BATCHES
from sparsefw.model.shared import shared_parameters
from sparsefw.model.slots import Slot, fill, on_device, overwrite, restore, slots_of
from sparsefw.model.stand_ins import kind_of_block
from sparsefw.model.torch_attention import attention_by_calls
from sparsefw.model.transformers_private import expert_by_expert
from sparsefw.timeline import Timeline


@contextmanager
def resident(model: nn.Module, batch: Batch, device: torch.device) -> Iterator["ResidentModel"]:
    """Inside the `with` block, a model in memory can be run one block at a time.

    It is in evaluation mode, keeps no cache of keys and values, returns no more than is needed, runs nothing compiled,
    and calls its layers one by one. At the end it is as it was.

    Args:
        model: the model.
        batch: arguments of its forward.
        device: device that it runs on.

    Raises:
        InputError: as `follow_batch`; or its weights hold NaN or Inf.
    """
    with (
        as_python(),
        _evaluating(model),
        asked_for_no_more(model) as as_configured,
        attention_by_calls(),
        expert_by_expert(model),
    ):
        opened = ResidentModel(model, batch, device, as_configured)
        try:
            yield opened
        finally:
            opened.close_all()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class ResidentModel:
    """A `BlockModel` in memory. Use `resident`.

    Args:
        model: the model.
        batch: arguments of its forward.
        device: device that it runs on.
        as_configured: makes a context in which the model's configs are those of its caller.
    """

    # It may read anything.
    vocabulary = None
    given = BATCHES

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        device: torch.device,
        as_configured: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = self.runs = model
        self.as_configured = as_configured
        self.device, self.timeline = device, Timeline()
        # Nothing outside of the blocks is changed.
        self.pieces: list[list[str]] = []
        path = follow_batch(model, batch, device)
        self.blocks, self.names, self.idle = [path.blocks[name] for name in path.order], path.order, path.idle
        self.firsts = [self.names.index(name) for name in dict.fromkeys(self.names)]
        self.kinds = [kind_of_block(block) for block in self.blocks]
        self.flow, self.forms = path.flow, path.forms
        everything = {slot.path for slot in slots_of(model.named_modules(remove_duplicate=False))}
        self.shared = shared_parameters(model, self.names, {}, everything)
        self.notes = [f"not pruned: {reason}" for reason in path.passed_over.values()]
        self.notes += self.shared.notes
        inside = {module for block in self.blocks for module in block.modules()}
        self._others = [module for module in model.modules() if module not in inside]
        # The places of the tensors of the open blocks.
        self._slots: dict[int, list[Slot]] = {}
        for name, parameter in self.parameters(None):
            check_finite(name, parameter)

    def parameters(self, i: int | None) -> list[tuple[str, Tensor]]:
        """The parameters of block i, named as layers are, or None: those outside of all blocks."""
        if i is not None:
            return [(f"{self.names[i]}.{name}", x) for name, x in self.blocks[i].named_parameters()]
        inside = tuple(f"{name}." for name in self.names)
        return [(name, x) for name, x in self.model.named_parameters() if not name.startswith(inside)]

    def open(self, i: int, ahead: bool = True) -> nn.Module:
        """As `BlockModel.open`; nothing has to be read ahead."""
        with self.timeline.span("read", i):
            block = self.open_alone(i)
            for name, parameter in self.parameters(i):
                check_finite(name, parameter)
        return block

    def open_alone(self, i: int) -> nn.Module:
        """As `BlockModel.open_alone`."""
        return self.open_as(i, {})

    def open_as(self, i: int, tensors: Mapping[str, Loadable]) -> nn.Module:
        """As `BlockModel.open_as`. The block's tensors are copies; those that are not given are its own."""
        if i not in self._slots:
            self._slots[i] = self._slots_in(i)
        _check_places(self._slots[i], tensors)

        def copied(slot: Slot) -> Tensor:
            return dequantized(tensors.get(slot.path, slot.own)).detach().to(self.device, copy=True)

        fill(self._slots[i], copied)
        return self.blocks[i]

    def close(self, i: int) -> None:
        """Put the block's own tensors back."""
        restore(self._slots.pop(i))

    def close_all(self) -> None:
        """Close the blocks that an error has left open."""
        for i in list(self._slots):
            self.close(i)

    @contextmanager
    def outside(self) -> Iterator[None]:
        """As `BlockModel.outside`."""
        with on_device(self._others, self.device):
            yield

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """As `BlockModel.block_tensors`. They are those of the open block, which are others when it is opened again."""
        if i not in self.firsts:
            return {}
        # By their places, which hooks of `state_dict` may leave parts out of. Buffers are not changed.
        parameters = [slot for slot in self._slots_in(i) if isinstance(slot.own, nn.Parameter)]
        # A tensor that has several places is written once.
        first = {id(slot.own): slot for slot in reversed(parameters)}
        return {slot.path: slot.own.detach().cpu() for slot in reversed(first.values())}

    def other_tensors(self, names: list[str]) -> dict[str, Tensor]:
        """None: see `pieces`."""
        return {}

    def change(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        """Give block i these weights for good, in place.

        Buffers stay as they are. Entries of theirs may share memory, which nothing can be copied to.
        """
        slots = self._slots_in(i)
        _check_places(slots, tensors)
        for slot in slots:
            if slot.path in tensors and isinstance(slot.own, nn.Parameter):
                overwrite(slot.own, tensors[slot.path])

    def _slots_in(self, i: int) -> list[Slot]:
        """The places in block i, with their names in the model, of the tensors that are there now."""
        return slots_of(self.blocks[i].named_modules(prefix=self.names[i]))


def _check_places(slots: list[Slot], tensors: Collection[str]) -> None:
    """Refuse tensors that have no place any more: weights would stay dense unsaid."""
    if lost := sorted(set(tensors) - {slot.path for slot in slots}):
        raise InputError(f"{lost[0]}: the model had this tensor, and has it no more; its modules change while it runs")
