"""Results that are the same bits in every run.

On a GPU some of torch's algorithms add numbers up in the order in which they arrive, such as the gradients of attention
and of convolutions. For nearly all of them torch has others that do not, and it can be told to refuse the rest.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic(refuse: bool = True) -> Iterator[None]:
    """Inside the `with` block, torch takes algorithms that give the same bits in every run.

    Args:
        refuse: whether torch refuses operations for which it has none, see `refused`. If not, it makes them as usual,
            and attention, too.
    """
    # Its attributes are made when torch is imported: mypy does not see them.
    memory: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    with warnings.catch_warnings():
        # Of operations that are not refused: the caller knows of them.
        warnings.filterwarnings("ignore", message=".*deterministic")
        try:
            # Filled memory shows what reads it before it is written. That takes time, and gives no other bits.
            memory.fill_uninitialized_memory = False
            torch.set_deterministic_debug_mode("error" if refuse else "warn")
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            memory.fill_uninitialized_memory = fill


def refused(error: BaseException | None) -> str:
    """The operation that torch has refused inside `deterministic`; empty if the error has no such cause."""
    while error:
        said = str(error)
        if match := re.match(r"(\w+) does not have a deterministic implementation", said):
            return match[1]
        if isinstance(error, RuntimeError) and "deterministic" in said.lower():
            return "cuBLAS" if "CuBLAS" in said else "an operation"
        error = error.__cause__
    return ""
