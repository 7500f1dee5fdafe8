"""Work in the dtypes that tensors have."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside the `with` block, torch casts nothing by itself, whatever a caller has asked it for.

    Products of a solver would be less exact than they are said to be. And weights that ask for gradients would be cast
    once, so that forwards would not see their later values.
    """
    with ExitStack() as left:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                left.enter_context(torch.autocast(device, enabled=False))
        yield
