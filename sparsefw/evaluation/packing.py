"""Requests as rows of tokens, each computed once: what requests have in common at their beginning is shared.

A row is a tree of tokens: a token's parent is the token before it. Requests that begin alike, such as the answers to a
question, are branches of one tree. A token attends to itself and to the tokens before it on its branch.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from sparsefw.data import Batch, token_batch
from sparsefw.evaluation.request import Request

# A row is padded to a length that leaves at most 1 / PADDING of it empty, so that few lengths occur.
PADDING = 16

# A request joins a tree only if it has so many tokens in common with it: the mask of a tree costs a little.
SHARED_TOKENS = 8

# Tokens of a tree at most, in terms of its longest branch: attention computes all pairs of tokens of a row.
BRANCHES = 4


class Sharing(IntEnum):
    """The contents that a model allows for a row; each value allows what those before allow."""

    # One request, or several that read the same.
    NOTHING = 0
    # Requests that are beginnings of each other, and padding behind: later tokens change nothing.
    BEGINNINGS = 1
    # Requests that begin alike.
    BRANCHES = 2


@dataclass
class Row:
    """Requests that are computed together.

    Attributes:
        tokens: the tokens of the tree; each comes behind its parent.
        parents: place of each token's parent in `tokens`; -1 for the first.
        answers: by number of a request, the places of the tokens that its targets are predicted at.
    """

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    parents: "array[int]" = field(default_factory=lambda: array("i"))
    answers: dict[int, "array[int]"] = field(default_factory=dict)

    @property
    def branches(self) -> bool:
        """Whether it is more than a chain."""
        return any(parent != n - 1 for n, parent in enumerate(self.parents))

    def add(self, number: int, request: Request, path: list[int], common: int) -> list[int]:
        """Add a request.

        Args:
            number: number of the request.
            request: the request.
            path: places of the tokens of the request that was added last.
            common: number of tokens that both begin with.

        Returns:
            The places of its tokens.
        """
        path = path[:common]
        for token in request.read[common:]:
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.tokens))
            self.tokens.append(token)
        self.answers[number] = array("i", path[len(path) - len(request.targets) :])
        return path


@dataclass(frozen=True)
class Group:
    """Rows that are padded to the same length.

    Attributes:
        length: tokens in a row.
        rows: the rows.
        trees: whether rows have branches.
        dtype: dtype of the masks of trees.
    """

    length: int
    rows: list[Row]
    trees: bool = False
    dtype: torch.dtype = torch.float32

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of this many rows; the last one may have fewer."""
        for first in range(0, len(self.rows), size):
            rows = self.rows[first : first + size]
            yield tree_batch(rows, self.length, self.dtype) if self.trees else token_batch(padded(rows, self.length))


def row_sizes(groups: Sequence[Group]) -> tuple[tuple[int, int, bool], ...]:
    """The length of the rows of each group, their number, and whether they are trees."""
    return tuple((group.length, len(group.rows), group.trees) for group in groups)


def pack(
    requests: Sequence[Request],
    sharing: Sharing,
    longest: float = math.inf,
    dtype: torch.dtype = torch.float32,
    shortest: int = 1,
    most: float = math.inf,
) -> list[Group]:
    """Groups of rows, the longest first, which hold all requests.

    Args:
        requests: the requests.
        sharing: what a row may hold.
        longest: no branch of a tree has more tokens than this.
        dtype: dtype of the model.
        shortest: least length of a row.
        most: tokens that the model reads at once: it may have no positions for more of them.
    """
    by_length: dict[tuple[int, bool], list[Row]] = {}
    for row in rows_of(requests, sharing, longest):
        length = padded_length(len(row.tokens), most) if sharing else len(row.tokens)
        by_length.setdefault((max(length, shortest), row.branches), []).append(row)
    return [Group(length, rows, trees, dtype) for (length, trees), rows in sorted(by_length.items(), reverse=True)]


def rows_of(requests: Sequence[Request], sharing: Sharing, longest: float = math.inf) -> list[Row]:
    """The rows of requests, in the order of their tokens; see `pack`."""
    # In this order, the request before is the one with the most tokens in common, and a beginning comes before what
    # it is the beginning of.
    order = sorted(range(len(requests)), key=lambda n: np.array(requests[n].read, ">u4").tobytes())
    rows: list[Row] = []
    path: list[int] = []
    deepest = 0
    for place, n in enumerate(order):
        request = requests[n]
        length = len(request.read)
        common = _common(requests[order[place - 1]].read, request.read) if place else 0
        deepest = max(deepest, length)
        if not rows or not _joins(rows[-1], len(path), length, common, deepest, sharing, longest):
            rows.append(Row())
            path, common, deepest = [], 0, length
        path = rows[-1].add(n, request, path, common)
    return rows


def _joins(row: Row, before: int, length: int, common: int, deepest: int, sharing: Sharing, longest: float) -> bool:
    """Whether a request joins a row.

    Args:
        row: the row.
        before: number of tokens of the request that was added last.
        length: number of its own tokens.
        common: number of tokens that both begin with.
        deepest: number of tokens of the longest request in the row, with this one.
        sharing, longest: as for `pack`.
    """
    if common == before and not row.branches and (sharing or length == common):
        return True
    fits = len(row.tokens) + length - common <= BRANCHES * deepest
    return sharing == Sharing.BRANCHES and common >= SHARED_TOKENS and deepest <= longest and fits


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    most = min(len(one), len(other))
    differ = np.nonzero(np.array(one[:most]) != np.array(other[:most]))[0]
    return int(differ[0]) if len(differ) else most


def padded_length(length: int, most: float = math.inf) -> int:
    """The length that a row of so many tokens is padded to; at most so many, unless a tree has more tokens."""
    unit = 1 << max(0, length.bit_length() - PADDING.bit_length())
    rounded = -(-length // unit) * unit
    return int(most) if length <= most < rounded else rounded


def padded(rows: Sequence[Row], length: int) -> Tensor:
    """Tokens of rows (rows, length), padded on the right, where no other token reads."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row.tokens)] = torch.tensor(row.tokens, dtype=torch.int64)
    return ids


def tree_batch(rows: Sequence[Row], length: int, dtype: torch.dtype) -> Batch:
    """Trees as a batch of a language model: with the positions of the tokens, and the mask of what each attends to."""
    positions = np.zeros((len(rows), length), dtype=np.int64)
    attends = np.broadcast_to(np.eye(length, dtype=bool), (len(rows), length, length)).copy()
    for n, row in enumerate(rows):
        for place, parent in enumerate(row.parents):
            if parent >= 0:
                positions[n, place] = positions[n, parent] + 1
                attends[n, place, : parent + 1] = attends[n, parent, : parent + 1]
    # Added to the scores of attention: every implementation of it takes this form.
    mask = torch.zeros(attends.shape, dtype=dtype).masked_fill_(~torch.from_numpy(attends), torch.finfo(dtype).min)
    arguments = {"attention_mask": mask[:, None], "position_ids": torch.from_numpy(positions)}
    batch = token_batch(padded(rows, length))
    return Batch(batch.args, batch.kwargs | arguments, batch.windows)
