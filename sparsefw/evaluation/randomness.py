"""The random numbers that libraries draw for all of a process, kept and set back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch


class Randomness(NamedTuple):
    """The state of the generators of Python, numpy and torch."""

    python: Any
    numpy: Any
    torch: torch.Tensor

    def set(self) -> None:
        """Have the generators go on from here."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)


def randomness() -> Randomness:
    """The state as it is now."""
    return Randomness(random.getstate(), np.random.get_state(), torch.get_rng_state())


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Set back, at the end of the `with` block, what has been drawn in it."""
    before = randomness()
    try:
        yield
    finally:
        before.set()
