"""A model in memory: all its weights are there, and a block is copied while it is worked on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.checkpoint.tensors import Loadable, dequantized
from sparsefw.compiled import as_python
from sparsefw.data import Batch
from sparsefw.finite import check_finite
from sparsefw.model.block_model import BlockModel
from sparsefw.model.hf import asked_for_no_more, attention_by_calls
from sparsefw.model.path import path_through
from sparsefw.model.shared import shared_parameters
from sparsefw.model.slots import Slot, is_copied, on_device, overwrite, slots_of


@contextmanager
def resident(model: nn.Module, batch: Batch | None, device: torch.device) -> Iterator["ResidentModel"]:
    """Inside the `with` block, a model in memory can be run one block at a time.

    It is in evaluation mode, keeps no cache of keys and values, returns no more than is needed, runs nothing compiled,
    and calls its layers one by one. At the end it is as it was.

    Args:
        model: the model.
        batch: arguments of its forward; None: it is a model of transformers, and runs on text.
        device: device that it runs on.

    Raises:
        InputError: as `path_through`; or its weights hold NaN or Inf.
    """
    with (
        as_python(),
        _evaluating(model),
        asked_for_no_more(model) as as_configured,
        attention_by_calls(),
        ResidentModel(model, batch, device, as_configured) as opened,
    ):
        yield opened


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


class ResidentModel(BlockModel):
    """A `BlockModel` in memory. Use `resident`.

    Args:
        model, batch, device: as for `resident`.
        as_configured: makes a context in which the model's configs are those of its caller.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch | None,
        device: torch.device,
        as_configured: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.as_configured = as_configured
        outside, inside = partial(on_device, device=device), partial(on_device, device=device, copy_buffers=True)
        path = path_through(model, None if batch is None else batch.to(device), outside, inside)
        everything = {slot.path for slot in slots_of(model.named_modules(remove_duplicate=False))}
        super().__init__(model, path, shared_parameters(model, path.order, {}, everything), device)
        self.notes = [f"not pruned: {reason}" for reason in path.passed_over.values()] + self.shared.notes
        if isinstance(model, PreTrainedModel) and batch is None:
            embeddings: Any = model.get_input_embeddings()
            self.vocabulary = embeddings.weight.shape[0]
        prefixes = tuple(f"{name}." for name in self.names)
        others = [(name, x) for name, x in model.named_parameters() if not name.startswith(prefixes)]
        for name, parameter in others:
            check_finite(name, parameter)
        self.outside_bytes = sum(x.nbytes for _, x in others if is_copied(x, self.device))

    def _slots(self, i: int | None) -> list[Slot]:
        slots = super()._slots(i)
        # What is on the device is used there.
        return slots if i is not None else [slot for slot in slots if is_copied(slot.own, self.device)]

    def read(self, i: int | None) -> Mapping[str, Loadable]:
        """Nothing: all tensors are in memory."""
        return {}

    def _make(self, i: int | None, tensors: Mapping[str, Loadable], slots: list[Slot]) -> Callable[[Slot], Tensor]:
        def copied(slot: Slot) -> Tensor:
            return dequantized(tensors.get(slot.path, slot.own)).detach().to(self.device, copy=True)

        return copied

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """As `BlockModel.block_tensors`. They are those of the open block, which are others when it is opened again."""
        if i not in self.unique_blocks:
            return {}
        # By their places, which hooks of `state_dict` may leave parts out of. Buffers are not changed.
        parameters = [slot for slot in self._slots(i) if isinstance(slot.own, nn.Parameter)]
        # A tensor that has several places is written once.
        first = {id(slot.own): slot for slot in reversed(parameters)}
        return {slot.path: slot.own.detach().cpu() for slot in reversed(first.values())}

    def change(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        """Give block i these weights for good, in place.

        Buffers stay as they are. Entries of theirs may share memory, which nothing can be copied to.
        """
        for slot in self._slots(i):
            if slot.path in tensors and isinstance(slot.own, nn.Parameter):
                overwrite(slot.own, tensors[slot.path])
