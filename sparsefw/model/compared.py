"""Compare two recorded forwards, in which blocks return other values: what is done around the blocks must be the same.

A recorder sees the calls of torch functions. What a forward makes of blocks' outputs by other means, or of objects that
blocks change, would count as a constant.
"""

import zlib
from typing import Any

import torch
from torch import Tensor

from sparsefw.errors import InputError
from sparsefw.model.parts import UNSUPPORTED
from sparsefw.model.recording import Recorder
from sparsefw.model.values import Memo, outline, rebuilt


class Traced(Recorder):
    """A recorder that keeps what can be compared.

    Attributes:
        trace: outlines of what each block is given, and of the calls before it; at last of the calls behind them all.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trace: list[list[Any]] = []
        # An object counts as it is when a block is given it first: blocks may change it.
        self._met: Memo = {}

    def arrives(self, i: int, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """As `Recorder.arrives`."""
        super().arrives(i, hidden, args, kwargs)
        self._keep(self._names[i], self._calls[i].steps, hidden, args, kwargs)

    def leaves(self, i: int, output: Any) -> None:
        """As `Recorder.leaves`. The block may have changed the objects that it was given."""
        super().leaves(i, output)
        self._note_objects_anew()

    def ends(self) -> None:
        """Keep what was done behind the last block."""
        self._keep(self._steps)

    def _keep(self, *what: Any) -> None:
        self.trace.append(outline(rebuilt(what, self._digest, self._met), by_name=True))

    def _digest(self, x: Any) -> str:
        if not isinstance(x, Tensor):
            return str(x)
        known = self._find(x)
        return f"value {known.number}" if known else _digest_of(x)


def check_same(one: Traced, other: Traced, names: list[str], model: str) -> None:
    """Compare two forwards.

    Args:
        one, other: their recorders.
        names: names of the blocks.
        model: name of the model's class.

    Raises:
        InputError: they differ.
    """
    if one.trace == other.trace:
        return
    pairs = enumerate(zip(one.trace, other.trace, strict=False))
    first = next((n for n, (a, b) in pairs if a != b), len(names))
    place = f"before {names[first]}" if first < len(names) else "behind the last block"
    raise InputError(
        f"{UNSUPPORTED} {model}: what its forward does {place} depends on what blocks return or change in a way that "
        "cannot be followed, or on chance"
    )


def other_values(x: Tensor) -> Tensor:
    """A tensor of the same form with other values; indices are those of the tensor in another order."""
    if not (x.is_floating_point() or x.is_complex()):
        return x.flip(tuple(range(x.dim())))
    return torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype)


def _digest_of(x: Tensor) -> str:
    if x.is_meta:
        return f"{x.dtype} {tuple(x.shape)}"
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{x.dtype} {tuple(x.shape)} {zlib.crc32(data.data)}"
