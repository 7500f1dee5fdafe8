"""Requests of log-likelihoods as rows of tokens: what requests have in common at their beginning is computed once.

A row is a tree of tokens: a token's parent is the token before it. Requests that begin alike, such as the answers to a
question, are branches of one tree. A token attends to itself and to the tokens before it on its branch.
"""

import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsefw.data.batches import Batch, token_batch

# A row is padded to a length that leaves at most 1 / PADDING of it empty, so that few lengths occur.
PADDING = 16

# Tokens of a padded row at least: some models take a single token for a step of generation.
LEAST = 2

# A request joins a tree only if it has this many tokens in common with it: the mask of a tree costs a little.
SHARED_TOKENS = 8

# Tokens of a tree at most, in terms of its longest branch: attention computes all pairs of tokens of a row.
BRANCHES = 4


class Request(NamedTuple):
    """Tokens that a model reads, and those that it predicts.

    Attributes:
        read: the tokens that it reads, at least as many as it predicts.
        targets: the tokens that are predicted at the last positions of `read`, at least one.
    """

    read: "array[int]"
    targets: "array[int]"


def request_of(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Request:
    """The request for a continuation behind a context, cut on the left to what the model takes, as the harness does.

    The last token of the continuation is predicted and need not be read.
    """
    return Request(array("i", [*context, *continuation][-(max_length + 1) :][:-1]), array("i", continuation))


class Sharing(IntEnum):
    """The contents that a model allows for a row; each value allows what those before allow."""

    # One request, or several that read the same.
    NOTHING = 0
    # Requests that are beginnings of each other, and padding behind: later tokens change nothing.
    BEGINNINGS = 1
    # Requests that begin alike.
    BRANCHES = 2


@dataclass(eq=False)
class Row:
    """Requests that are computed together.

    Attributes:
        tokens: the tokens of the tree; each comes behind its parent.
        parents: place of each token's parent in `tokens`; -1 for the first.
        targets: by place, the tokens that are predicted there, each with the number of its request.
        path: places of the tokens of the request that was added last.
        own: places of the tokens that the last branch does not share.
        depth: number of tokens of the longest request.
    """

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    parents: "array[int]" = field(default_factory=lambda: array("i"))
    targets: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    path: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    depth: int = 0

    @property
    def branches(self) -> bool:
        """Whether it is more than a chain."""
        return len(self.tokens) > self.depth

    def takes(self, length: int, common: int, sharing: Sharing) -> bool:
        """Whether a request joins the row.

        Args:
            length: number of its tokens.
            common: number of tokens that it and the last request begin with.
            sharing: what a row may hold.
        """
        if common == len(self.path) and not self.branches and (sharing or length == common):
            return True
        fits = len(self.tokens) + length - common <= BRANCHES * max(self.depth, length)
        return sharing == Sharing.BRANCHES and common >= SHARED_TOKENS and fits

    def add(self, number: int, request: Request, common: int) -> None:
        """Add request `number`, which has its first `common` tokens in common with the last one."""
        path, first = self.path[:common], len(self.tokens)
        for token in request.read[common:]:
            self.parents.append(path[-1] if path else -1)
            path.append(len(self.tokens))
            self.tokens.append(token)
        for place, target in zip(path[len(path) - len(request.targets) :], request.targets, strict=True):
            self.targets.setdefault(place, []).append((number, target))
        self.path, self.depth = path, max(self.depth, len(path))
        self.own = [*range(first, len(self.tokens))] or self.own


@dataclass(frozen=True)
class Group:
    """Rows that are padded to the same length.

    Attributes:
        length: tokens in a row.
        rows: the rows.
        trees: whether rows have branches.
    """

    length: int
    rows: list[Row]
    trees: bool

    def batches(self, tokens: int, dtype: torch.dtype) -> Iterator[Batch]:
        """Micro-batches of `tokens` tokens, at least one row each; `dtype` is that of the masks of trees."""
        for rows in self.split(tokens):
            yield tree_batch(rows, self.length, dtype) if self.trees else token_batch(padded(rows, self.length))

    def split(self, tokens: int) -> Iterator[list[Row]]:
        """The rows of each micro-batch."""
        size = max(1, tokens // self.length)
        return (self.rows[first : first + size] for first in range(0, len(self.rows), size))


def rows_of(requests: Sequence[Request], sharing: Sharing) -> list[Row]:
    """The rows that hold all requests.

    Args:
        requests: the requests.
        sharing: what a row may hold.
    """
    rows: list[Row] = []
    before = array("i")
    # In this order, the request before is the one with the most tokens in common, and a beginning comes before what
    # it is the beginning of.
    for number in sorted(range(len(requests)), key=lambda n: requests[n].read):
        read = requests[number].read
        common = _common(before, read)
        if not rows or not rows[-1].takes(len(read), common, sharing):
            rows.append(Row())
            common = 0
        rows[-1].add(number, requests[number], common)
        before = read
    return rows


def groups_of(rows: Sequence[Row], sharing: Sharing, most: int = sys.maxsize) -> list[Group]:
    """Rows by their padded length, the longest first; `most` is the number of tokens that the model reads at once."""
    by_length: dict[tuple[int, bool], list[Row]] = {}
    for row in rows:
        length = padded_length(len(row.tokens), most) if sharing else len(row.tokens)
        by_length.setdefault((length, row.branches), []).append(row)
    return [Group(length, of_length, trees) for (length, trees), of_length in sorted(by_length.items(), reverse=True)]


def padded_length(length: int, most: int = sys.maxsize) -> int:
    """The length that a row of `length` tokens is padded to; at most `most`, unless a tree has more tokens."""
    unit = 1 << max(0, length.bit_length() - PADDING.bit_length())
    rounded = max(LEAST, -(-length // unit) * unit)
    return most if length <= most < rounded else rounded


def padded(rows: Sequence[Row], length: int) -> Tensor:
    """Tokens of rows (rows, length), padded on the right, where no other token reads."""
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row.tokens)] = torch.tensor(row.tokens)
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
    batch = token_batch(padded(rows, length))
    arguments = {"attention_mask": mask[:, None], "position_ids": torch.from_numpy(positions)}
    return Batch(batch.args, batch.kwargs | arguments, batch.windows)


def partition(requests: Sequence[Request], count: int) -> list[list[int]]:
    """Numbers of the requests of each of `count` ranks: all have as many tokens, and what begins alike is together."""
    order = sorted(range(len(requests)), key=lambda n: requests[n].read)
    ends = [*accumulate(len(requests[n].read) for n in order)]
    cuts = [bisect_right(ends, ends[-1] * rank // count) if ends else 0 for rank in range(count)]
    return [order[first:end] for first, end in zip(cuts, [*cuts[1:], len(order)], strict=True)]


def _common(one: "array[int]", other: "array[int]") -> int:
    """Number of tokens that both begin with."""
    most = min(len(one), len(other))
    differ = np.nonzero(np.frombuffer(one, np.int32)[:most] != np.frombuffer(other, np.int32)[:most])[0]
    return int(differ[0]) if len(differ) else most
