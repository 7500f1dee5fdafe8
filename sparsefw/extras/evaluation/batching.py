"""Requests for log-likelihoods in micro-batches. Tokens that requests have in common at the start are computed once.

Requests that begin alike, such as the answers to a question, make a tree of tokens. A token attends to itself and to
the tokens before it in its own request.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from sparsefw.data.batches import Batch, token_batch

# A request joins a tree if they have at least this many tokens in common: the mask of a tree costs a little.
MIN_COMMON = 8

# A tree has at most this many times the tokens of its longest request: attention computes all pairs of tokens.
MAX_BRANCHES = 4

# At most 1 / PADDING of a padded tree is empty, so that few lengths occur.
PADDING = 16


class Request(NamedTuple):
    """Tokens that a model reads, and tokens that it predicts.

    Attributes:
        read: the tokens that the model reads, at least as many as it predicts.
        targets: the tokens that are predicted at the last positions of `read`, at least one.
    """

    read: "array[int]"
    targets: "array[int]"


def request_of(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Request:
    """The request for a continuation after a context, cut on the left to the model's length, as the harness cuts it.

    The last token of the continuation is predicted and need not be read.
    """
    return Request(array("i", [*context, *continuation][-(max_length + 1) :][:-1]), array("i", continuation))


@dataclass(eq=False)
class Tree:
    """Requests that are computed in one row.

    Attributes:
        tokens: the tokens of all requests; common tokens stand there once.
        paths: by the number of a request, the places of its tokens in `tokens`, in ascending order.
        min_length: tokens in the row at least.
    """

    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    paths: "dict[int, array[int]]" = field(default_factory=dict)
    min_length: int = 1

    @property
    def depth(self) -> int:
        """Number of tokens of the longest request."""
        return max(map(len, self.paths.values()), default=0)

    @property
    def branched(self) -> bool:
        """Whether its requests read different tokens. Such a tree has a mask, and is padded."""
        return any(len(path) < len(self.tokens) for path in self.paths.values())

    @property
    def length(self) -> int:
        """Number of tokens in the row, with padding."""
        unit = 1 << max(0, len(self.tokens).bit_length() - PADDING.bit_length()) if self.branched else 1
        return max(self.min_length, -(-len(self.tokens) // unit) * unit)


def trees_of(requests: Mapping[int, Request], branch: bool, min_length: int = 1) -> list[Tree]:
    """Trees that hold all requests.

    Args:
        requests: the requests by number.
        branch: whether requests that begin alike share a tree; else only requests that read the same tokens do.
        min_length: tokens in a row at least.
    """
    trees = list[Tree]()
    before = path = array("i")
    # In this order, a request has most tokens in common with the request before it.
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
    """The tokens of trees of one length, padded on the right: (trees, length) int64."""
    ids = torch.zeros(len(trees), trees[0].length, dtype=torch.int64)
    for n, tree in enumerate(trees):
        ids[n, : len(tree.tokens)] = torch.tensor(tree.tokens)
    return ids


def batch_of(trees: Sequence[Tree], dtype: torch.dtype) -> Batch:
    """A micro-batch of trees of one length, all of them branched or not one.

    Branched trees come with the positions of their tokens, and with a mask in `dtype` of what each token attends to.
    """
    ids = ids_of(trees)
    batch = token_batch(ids)
    if not trees[0].branched:
        return batch
    positions = np.zeros(ids.shape, dtype=np.int64)
    # Padding attends to itself, so that no sum of probabilities is 0 / 0.
    attends = np.broadcast_to(np.eye(ids.shape[1], dtype=bool), (*ids.shape, ids.shape[1])).copy()
    for n, tree in enumerate(trees):
        for path in tree.paths.values():
            positions[n, path] = range(len(path))
            for parent, place in pairwise(path):
                # Other requests may have both tokens, too.
                if not attends[n, place, parent]:
                    attends[n, place] |= attends[n, parent]
    # It is added to the scores of attention: every implementation of attention takes this form.
    mask = torch.zeros(attends.shape, dtype=dtype).masked_fill_(~torch.from_numpy(attends), torch.finfo(dtype).min)
    arguments = {"attention_mask": mask[:, None], "position_ids": torch.from_numpy(positions)}
    return Batch(batch.args, batch.kwargs | arguments, batch.windows)


def _common(one: "array[int]", other: "array[int]") -> int:
    """Number of tokens that both begin with."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(np.array(one[:shorter]) != np.array(other[:shorter]))
    return int(differ[0]) if len(differ) else shorter
