"""Where things are while a model is pruned, and how much of them at once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sparsefw.model.activations import Activations, activations

# Tokens in one micro-batch: enough to fill a GPU, little beside a block's weights.
BATCH_TOKENS = 4096

# Bytes of a solve's state: more makes nothing faster.
SOLVER = 4 << 30


@dataclass(frozen=True)
class Placement:
    """What a run holds at once.

    Attributes:
        batch: windows in one micro-batch.
        place: of activations, one of `activations.PLACES`.
        folder: of activations in a file.
        ahead: whether the next block is read, and the last one written, while one is worked on.
        solver: bytes that the state of a solve may take; its rows are solved in chunks.
    """

    batch: int
    place: str = "gpu"
    folder: Path | None = None
    ahead: bool = True
    solver: int = SOLVER

    def room(self, device: torch.device) -> Callable[[], Activations]:
        """What gives each stream a place for its activations."""
        return partial(activations, self.place, device, self.folder)
