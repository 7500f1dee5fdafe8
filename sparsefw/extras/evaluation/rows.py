"""Requests of log-likelihoods as rows of tokens: what requests have in common at their beginning is computed once.

A row is a tree of tokens: a token's parent is the token before it. Requests that begin alike, such as the answers to a
question, are branches of one tree. A token attends to itself and to the tokens before it on its branch.
"""

import sys
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from sparsefw.data.batches import Batch, token_batch
from sparsefw.model import HiddenStates

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
        paths: by the number of a request, the places of its tokens in `tokens`. Those that no request before it has
            follow each other at the end.
        depth: number of tokens of the longest request.
    """

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    paths: dict[int, "array[int]"] = field(default_factory=dict)
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
        if common == len(self.tokens) and (sharing or length == common):
            return True
        fits = len(self.tokens) + length - common <= BRANCHES * max(self.depth, length)
        return sharing == Sharing.BRANCHES and common >= SHARED_TOKENS and fits

    def add(self, number: int, read: "array[int]", shared: "array[int]") -> "array[int]":
        """Add request `number`, which has the tokens at the places `shared` in common with others; returns its path."""
        added = read[len(shared) :]
        path = shared + array("i", range(len(self.tokens), len(self.tokens) + len(added)))
        self.tokens += added
        self.paths[number], self.depth = path, max(self.depth, len(path))
        return path


@dataclass
class Group:
    """Rows that are padded to the same length, all of them trees or none.

    Attributes:
        length: tokens in a row.
        rows: the rows.
        batches: the rows of each micro-batch, during a pass.
        states: the hidden states of these.
    """

    length: int
    rows: list[Row]
    batches: list[list[Row]] = field(init=False)
    states: HiddenStates = field(init=False)


def rows_of(requests: Sequence[Request], sharing: Sharing) -> list[Row]:
    """The rows that hold all requests.

    Args:
        requests: the requests.
        sharing: what a row may hold.
    """
    rows: list[Row] = []
    before = path = array("i")
    # In this order, the request before is the one with the most tokens in common, and a beginning comes before what
    # it is the beginning of.
    for number in sorted(range(len(requests)), key=lambda n: requests[n].read):
        read = requests[number].read
        common = _common(before, read)
        if not rows or not rows[-1].takes(len(read), common, sharing):
            rows.append(Row())
            common = 0
        before, path = read, rows[-1].add(number, read, path[:common])
    return rows


def groups_of(rows: Sequence[Row], sharing: Sharing, most: int = sys.maxsize) -> list[Group]:
    """Rows by their padded length, the longest first; `most` is the number of tokens that the model reads at once."""
    groups: dict[tuple[int, bool], list[Row]] = defaultdict(list)
    for row in rows:
        groups[padded_length(len(row.tokens), most) if sharing else len(row.tokens), row.branches].append(row)
    return [Group(length, of_length) for (length, _), of_length in sorted(groups.items(), reverse=True)]


def padded_length(length: int, most: int = sys.maxsize) -> int:
    """The length that a row of `length` tokens is padded to; at most `most`, unless a tree has more tokens."""
    unit = 1 << max(0, length.bit_length() - PADDING.bit_length())
    rounded = max(LEAST, -(-length // unit) * unit)
    return most if length <= most < rounded else rounded


def batch_of(rows: Sequence[Row], length: int, dtype: torch.dtype) -> Batch:
    """Rows of a group as a batch of a language model, padded on the right, where no other token reads.

    Trees have the positions of their tokens, and a mask in `dtype` of what each token attends to.
    """
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    for n, row in enumerate(rows):
        ids[n, : len(row.tokens)] = torch.tensor(row.tokens)
    batch = token_batch(ids)
    if not rows[0].branches:
        return batch
    positions = np.zeros((len(rows), length), dtype=np.int64)
    attends = np.broadcast_to(np.eye(length, dtype=bool), (len(rows), length, length)).copy()
    for n, row in enumerate(rows):
        placed = 0
        for path in map(np.array, row.paths.values()):
            shared = int(np.searchsorted(path, placed))
            own, placed = path[shared:], placed + len(path) - shared
            positions[n, own] = np.arange(shared, len(path))
            attends[n][np.ix_(own, path)] = np.tri(len(own), len(path), shared, dtype=bool)
    # Added to the scores of attention: every implementation of it takes this form.
    mask = torch.zeros(attends.shape, dtype=dtype).masked_fill_(~torch.from_numpy(attends), torch.finfo(dtype).min)
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
