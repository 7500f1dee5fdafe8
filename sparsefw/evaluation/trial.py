"""Trials of a model's blocks: a row of tokens beside the branches that it is made of, each as a row of its own.

A block of each kind runs on both, from the embeddings on. If the outputs of all tokens are the same, a row may hold
such branches. Blocks that are given more than hidden states of blocks before run in order, up to the last one of a new
kind. All is computed in fp32, whatever the dtype of the model: in half precision a small difference would be noise.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefw.data import Batch, token_batch
from sparsefw.errors import InputError
from sparsefw.evaluation.alike import different_blocks
from sparsefw.evaluation.packing import Row, padded
from sparsefw.evaluation.precise import Precise
from sparsefw.model import BlockModel, HiddenStates, embed_batches
from sparsefw.model.stand_ins import hidden_of


class Tolerance(NamedTuple):
    """Allowed differences of tokens.

    Attributes:
        relative: in terms of what a block adds to the hidden states.
        absolute: in terms of what is there behind it.
        differing: share of the tokens that may differ by more.
    """

    relative: float
    absolute: float
    differing: float


# In half precision, which is for blocks that do not run in fp32, a mixture may send a token to another expert.
PRECISE, ROUNDED = Tolerance(1e-3, 1e-5, 0.0), Tolerance(0.05, 0.004, 0.02)


@dataclass(frozen=True)
class Pair:
    """A row, and its branches as rows of their own.

    Attributes:
        together, apart: hidden states of both.
        branches: places in the row of each branch's tokens.
        tokens: number of tokens in the row.
    """

    together: HiddenStates
    apart: HiddenStates
    branches: list[list[int]]
    tokens: int


def pair_of(model: BlockModel, batch: Batch, row: Row, branches: list[list[int]]) -> Pair | None:
    """A row and its branches before the first block; None if the model's forward does not take the row.

    Args:
        model: the model, inside `BlockModel.outside`, with the embeddings of all tokens.
        batch: the row as a batch.
        row: the row.
        branches: places in the row of each branch's tokens.
    """
    by_itself = [Row(array("i", (row.tokens[place] for place in branch))) for branch in branches]
    apart = token_batch(padded(by_itself, max(map(len, branches))))
    try:
        return Pair(embed_batches(model, [batch]), embed_batches(model, [apart]), branches, len(row.tokens))
    except InputError:
        # It takes no such mask, or no positions.
        return None


@torch.no_grad()
def compared(model: BlockModel, pairs: Sequence[Pair | None]) -> list[bool]:
    """For each pair, whether the outputs of all blocks are the same.

    Args:
        model: the model, inside `BlockModel.outside`.
        pairs: the pairs; they may be used up.
    """
    same = [pair is not None for pair in pairs]
    if not any(same):
        return same
    states, flow = next(pair.together for pair in pairs if pair), model.flow
    in_order = bool(flow.has_steps or flow.end or any(flow.live.values()) or states.carried[0].boxes)
    firsts = different_blocks(model, states)
    for i in range(firsts[-1] + 1) if in_order else firsts:
        if not any(same):
            break
        model.open_alone(i)
        for n, pair in enumerate(pairs):
            if same[n] and pair:
                same[n] = _same(pair, i, in_order)
        model.close(i)
    return same


def _same(pair: Pair, i: int, in_order: bool) -> bool:
    """Whether block i puts out the same for both.

    Args:
        pair: the pair.
        i: number of the block.
        in_order: whether both are then what the next block is given.
    """
    both, before = (pair.together, pair.apart), pair.apart.hidden[0]
    precise = torch.promote_types(before.dtype, torch.float32)
    try:
        with Precise():
            outputs, tolerance = [_output(states, i, in_order, precise) for states in both], PRECISE
    except InputError:
        if in_order or before.dtype == precise:
            return False
        try:
            outputs, tolerance = [_output(states, i, in_order, before.dtype) for states in both], ROUNDED
        except InputError:
            return False
    return _alike(pair, outputs[0], outputs[1], before, tolerance)


def _output(states: HiddenStates, i: int, in_order: bool, dtype: torch.dtype) -> Tensor:
    """The hidden states behind block i, from those before it in this dtype."""
    hidden = states.hidden[0].to(dtype)
    if not in_order:
        return hidden_of(states.call(i, 0, hidden))
    states.hidden[0] = hidden
    states.advance(i)
    return states.hidden[0]


def _alike(pair: Pair, together: Tensor, apart: Tensor, before: Tensor, tolerance: Tolerance) -> bool:
    """Whether the outputs for a pair are the same; `before` is what the branches were."""
    place = _place_of_tokens(together, apart, pair)
    if place is None or before.shape != apart.shape:
        return False
    ones, others, befores = (_tokens_first(x, place) for x in (together, apart, before))
    differing, count = 0, 0
    for n, branch in enumerate(pair.branches):
        one, other, given = ones[0, branch], others[n, : len(branch)], befores[n, : len(branch)]
        allowed = tolerance.relative * _norms(other - given) + tolerance.absolute * _norms(other)
        # Not a number is not the same.
        differing += int((~(_norms(one - other) <= allowed)).sum())
        count += len(branch)
    return differing <= tolerance.differing * count


def _place_of_tokens(together: Tensor, apart: Tensor, pair: Pair) -> int | None:
    """Which dimension of hidden states counts rows, and the next one tokens; None if no two of them do."""
    one, other = list(together.shape), list(apart.shape)
    rows = [1, pair.tokens], [len(pair.branches), max(map(len, pair.branches))]
    for n in range(len(one) - 1):
        if (one[n : n + 2], other[n : n + 2]) == rows and one[:n] + one[n + 2 :] == other[:n] + other[n + 2 :]:
            return n
    return None


def _tokens_first(x: Tensor, place: int) -> Tensor:
    """Hidden states (rows, tokens, entries)."""
    return x.movedim((place, place + 1), (0, 1)).flatten(2)


def _norms(x: Tensor) -> Tensor:
    return x.float().norm(dim=-1)
