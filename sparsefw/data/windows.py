"""Windows of tokens: what the driver knows of a text."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens.

    Attributes:
        ids: (n, seqlen) int64.
        source: what was read.
        hash: SHA-256 of the bytes of `ids`, in hex.
    """

    ids: Tensor
    source: str
    hash: str

    @property
    def n(self) -> int:
        """Number of windows."""
        return self.ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens in a window."""
        return self.ids.shape[1]
