"""What the pruning needs of a model: its blocks, one of which is open at a time, and how they hand tensors on."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from sparsefw.checkpoint.tensors import Loadable
from sparsefw.model.flow import Flow
from sparsefw.model.shared import SharedParameters
from sparsefw.model.stand_ins import Forms, Kind
from sparsefw.timeline import Timeline


class BlockModel(Protocol):
    """A model that runs one block at a time.

    Attributes:
        device: device that the model runs on.
        given: what the forward is given, in words, for messages.
        blocks: the blocks that the forward runs through, in the order of their calls. One that is called twice stands
            there twice, and stays dense.
        names: their names in the model, e.g. "model.layers.0".
        kinds: their kinds.
        firsts: numbers of the blocks that are called for the first time.
        idle: the blocks that it does not run through, by name.
        shared: parameters of blocks that stay dense.
        notes: what the user should know of the model, one line each.
        timeline: receives the time of reading.
        flow: how blocks hand tensors on.
        forms: what blocks return, as far as it is known.
    """

    device: torch.device
    given: str
    blocks: list[nn.Module]
    names: list[str]
    kinds: list[Kind]
    firsts: list[int]
    idle: dict[str, nn.Module]
    shared: SharedParameters
    notes: list[str]
    timeline: Timeline
    flow: Flow
    forms: Forms

    @property
    def model(self) -> nn.Module:
        """The whole model."""

    @property
    def runs(self) -> nn.Module:
        """The module whose forward is run: the model, or a part of it."""

    @property
    def vocabulary(self) -> int | None:
        """Number of the tokens that the model embeds; None if it may read something else."""

    @property
    def pieces(self) -> list[list[str]]:
        """Names of all tensors outside of `blocks` that are written, as many together as are held in memory anyway."""

    def open(self, i: int, ahead: bool = True) -> nn.Module:
        """Block i on the device, its parameters checked for NaN and Inf.

        Args:
            i: number of the block.
            ahead: whether to read the next block meanwhile.

        Raises:
            InputError: a parameter holds NaN or Inf.
        """

    def open_alone(self, i: int) -> nn.Module:
        """Block i on the device, unchecked, while nothing else is read."""

    def open_as(self, i: int, tensors: Mapping[str, Loadable]) -> nn.Module:
        """Block i on the device with these weights, which have the names of `block_tensors`."""

    def close(self, i: int) -> None:
        """Drop the weights of block i."""

    def outside(self) -> AbstractContextManager[None]:
        """Inside the `with` block, the weights that the forward needs outside of the blocks are on the device.

        Raises:
            InputError: they hold NaN or Inf.
        """

    def block_tensors(self, i: int) -> dict[str, Tensor]:
        """Block i's tensors by the names that they are written under, on the host; none of a repeat."""

    def other_tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors outside of the blocks, on the host; see `pieces`."""
