"""Sizes of what lies between two blocks, for any number of tokens in a window."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Extent:
    """The size of a tensor that belongs to one window.

    Attributes:
        sizes: by dimension, its size without tokens, and what each token adds.
        itemsize: bytes of an entry.
    """

    sizes: tuple[tuple[float, float], ...]
    itemsize: int

    @classmethod
    def of(cls, few: Tensor, more: Tensor, few_tokens: int, more_tokens: int) -> "Extent":
        """The extent of a tensor, from windows of two lengths."""
        slopes = [(b - a) / (more_tokens - few_tokens) for a, b in zip(few.shape, more.shape, strict=True)]
        sizes = [(a - slope * few_tokens, slope) for a, slope in zip(few.shape, slopes, strict=True)]
        return cls(tuple(sizes), few.element_size())

    @classmethod
    def fixed(cls, x: Tensor) -> "Extent":
        """The extent of a tensor that does not depend on the number of tokens."""
        return cls(tuple((float(size), 0.0) for size in x.shape), x.element_size())

    def nbytes(self, tokens: int) -> int:
        """Bytes of the tensor for a window of this many tokens."""
        return math.ceil(math.prod(max(0.0, size + slope * tokens) for size, slope in self.sizes)) * self.itemsize


@dataclass(frozen=True)
class Between:
    """What a window has between two blocks.

    Attributes:
        hidden: the hidden states.
        handed_on: what blocks hand on beside them, where it is most.
        before: what the model's forward makes of the tokens before its first block, for later ones.
    """

    hidden: Extent
    handed_on: tuple[Extent, ...] = ()
    before: tuple[Extent, ...] = ()

    def of_stream(self, tokens: int) -> list[int]:
        """Bytes of each tensor that every stream has."""
        return [extent.nbytes(tokens) for extent in (self.hidden, *self.handed_on)]

    def of_text(self, tokens: int) -> list[int]:
        """Bytes of each tensor that all streams of a text share."""
        return [extent.nbytes(tokens) for extent in self.before]
