"""Where things are while a model is pruned, and how much of them at once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sparsefw.activations import Activations, activations

# Tokens in one micro-batch: enough to fill a GPU, little beside a block's weights.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Placement:
    """What a run holds at once.

    Attributes:
        batch: windows in one micro-batch.
        place: of activations, one of `activations.PLACES`.
        folder: of activations in a file.
        ahead: whether the next block is read while one is worked on.
    """

    batch: int
    place: str = "gpu"
    folder: Path | None = None
    ahead: bool = True

    def room(self, device: torch.device) -> Callable[[], Activations]:
        """What gives each stream a place for its activations."""
        return partial(activations, self.place, device, self.folder)
