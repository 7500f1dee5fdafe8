"""Batch requests for log-likelihoods. Tokens that several requests begin with are computed once.

Requests with a common beginning, such as the answers to one question, form a tree of tokens. A token attends to itself
and to the earlier tokens of its own request.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from sparsefw.data.batches import Batch, token_batch

# A request joins a tree only if it shares at least this many tokens with the tree, since the tree's mask has a cost.
MIN_COMMON = 8

# A tree has at most this many times the tokens of its longest request, since attention computes all pairs of tokens.
MAX_BRANCHES = 4

# Trees are padded, so that fewer different lengths occur. At most about 1 / PADDING of a tree is padding.
PADDING = 16


class Request(NamedTuple):
    """Tokens that a model reads, and tokens that it predicts.

    Attributes:
        read: the tokens that the model reads, at least as many as it predicts.
        targets: the tokens to predict at the last positions of `read`, at least one.
    """

    read: "array[int]"
    targets: "array[int]"


def request_of(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Request:
    """Make the request for a continuation after a context, cut on the left to the model's length as in the harness.

    The last token of the continuation is only predicted, so it is not read.
    """
    return Request(array("i", [*context, *continuation][-(max_length + 1) :][:-1]), array("i", continuation))


@dataclass(eq=False)
class Tree:
    """Requests that are computed together in one row of a micro-batch.

    Attributes:
        tokens: the tokens of all requests; shared tokens occur once.
        paths: maps a request's number to the places of the request's tokens in `tokens`, in ascending order.
        min_length: smallest number of tokens in the row.
    """

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    paths: "dict[int, array[int]]" = field(default_factory=dict)
    min_length: int = 1

    @property
    def depth(self) -> int:
        """Number of tokens of the longest request."""
        return max(map(len, self.paths.values()))

    @property
    def branched(self) -> bool:
        """Whether the tree's requests read different tokens. Such a tree needs a mask, and is padded."""
        return any(len(path) < len(self.tokens) for path in self.paths.values())

    @property
    def length(self) -> int:
        """Number of tokens in the row, with padding."""
        unit = 1 << max(0, len(self.tokens).bit_length() - PADDING.bit_length()) if self.branched else 1
        return max(self.min_length, -(-len(self.tokens) // unit) * unit)


def trees_of(requests: Mapping[int, Request], branch: bool, min_length: int = 1) -> list[Tree]:
    """Group all requests into trees.

    Args:
        requests: the requests by number.
        branch: whether requests with a common beginning share a tree. If not, only requests that read the same tokens
            share one.
        min_length: smallest number of tokens in a row.
    """
    trees = list[Tree]()
    before = path = array("i")
    # In this order the request before a request is the one that shares most tokens with it.
    for number in sorted(requests, key=lambda n: requests[n].read):
        read = requests[number].read
        common = _common(before, read)
        joins = bool(trees) and read == before
        if branch and common >= MIN_COMMON:
            tokens = len(trees[-1].tokens) + len(read) - common
            joins = joins or tokens <= MAX_BRANCHES * max(trees[-1].depth, len(read))
        if not joins:
            trees.append(Tree(min_length=min_length))
            common = 0
        tree, before = trees[-1], read
        path = path[:common] + array("i", range(len(tree.tokens), len(tree.tokens) + len(read) - common))
        tree.tokens += read[common:]
        tree.paths[number] = path
    return trees


def ids_of(trees: Sequence[Tree]) -> torch.Tensor:
    """Return the tokens of trees of one length, padded on the right: (trees, length) int64."""
    return torch.tensor([[*tree.tokens, *[0] * (tree.length - len(tree.tokens))] for tree in trees])


def batch_of(trees: Sequence[Tree], dtype: torch.dtype) -> Batch:
    """Make a micro-batch of trees of one length. Either all trees are branched, or no tree is.

    The micro-batch of branched trees also has the positions of tokens, and an attention mask in `dtype`.
    """
    ids = ids_of(trees)
    batch = token_batch(ids)
    if not trees[0].branched:
        return batch
    positions = np.zeros(ids.shape, dtype=np.int64)
    # Padding attends to itself, so that its softmax is not 0 / 0.
    attends = np.broadcast_to(np.eye(ids.shape[1], dtype=bool), (*ids.shape, ids.shape[1])).copy()
    for n, tree in enumerate(trees):
        for path in tree.paths.values():
            positions[n, path] = range(len(path))
            for parent, place in pairwise(path):
                # Another request with the same two tokens may have set this already.
                if not attends[n, place, parent]:
                    attends[n, place] |= attends[n, parent]
    # An additive mask, which every implementation of attention accepts.
    mask = torch.zeros(attends.shape, dtype=dtype).masked_fill_(~torch.from_numpy(attends), torch.finfo(dtype).min)
    arguments = {"attention_mask": mask[:, None], "position_ids": torch.from_numpy(positions)}
    return replace(batch, kwargs=batch.kwargs | arguments)


def _common(one: "array[int]", other: "array[int]") -> int:
    """Count the tokens of the common beginning."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(np.array(one[:shorter]) != np.array(other[:shorter]))
    return int(differ[0]) if len(differ) else shorter
