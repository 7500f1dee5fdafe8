"""Find out whether a model takes rows with later tokens, or with branches of a tree, that change no answer.

Attention allows both, given the mask and the positions of a tree. Recurrent layers and convolutions allow no tree, and
layers that look at the whole row allow neither. No architecture is named here: a block of each kind runs on a few rows
and on what they are made of, and the outputs are compared.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsefw.data import token_batch
from sparsefw.errors import InputError
from sparsefw.evaluation.packing import Group, Row, Sharing, pack, padded, rows_of, tree_batch
from sparsefw.evaluation.request import Request
from sparsefw.evaluation.trial import compared, pair_of
from sparsefw.model import BlockModel, embed_batches
from sparsefw.model.skeleton import max_seqlen


@dataclass(frozen=True)
class Allowed:
    """The rows that a model takes.

    Attributes:
        sharing: what a row may hold.
        longest: most tokens of a branch.
        shortest: least length of a row.
        dtype: dtype of the model.
        most: tokens that the model reads at once.
    """

    sharing: Sharing
    longest: float
    shortest: int
    dtype: torch.dtype
    most: float

    def pack(self, requests: Sequence[Request]) -> list[Group]:
        """See `packing.pack`."""
        return pack(requests, self.sharing, self.longest, self.dtype, self.shortest, self.most)


def allowed_by(model: BlockModel, requests: Sequence[Request]) -> Allowed:
    """Find the rows that a model takes, by these requests.

    Args:
        model: the model, inside `BlockModel.outside`, with the embeddings of token 0 and of all tokens of the requests.
        requests: the requests.
    """
    sharing = sharing_of(model, requests) if requests else Sharing.NOTHING
    return Allowed(sharing, longest_branch(model), shortest_row(model), model_dtype(model), most_tokens(model))


def longest_branch(model: BlockModel) -> float:
    """The most tokens of a branch: local attention reads no further, and the mask of a tree does not tell it so."""
    config = getattr(model.runs, "config", None)
    text = config.get_text_config() if config else None
    names = ("sliding_window", "attention_chunk_size", "window_size")
    windows = [size for size in (getattr(text, name, None) for name in names) if isinstance(size, int) and size > 0]
    return min(windows, default=math.inf)


def most_tokens(model: BlockModel) -> float:
    """The most tokens that a model reads at once, infinite if its config does not say."""
    config = getattr(model.runs, "config", None)
    return (max_seqlen(config) if config else None) or math.inf


def shortest_row(model: BlockModel) -> int:
    """The least length of a row: some models run otherwise on a single token, as if they were writing a text.

    Args:
        model: the model, inside `BlockModel.outside`, with the embedding of token 0.
    """
    try:
        embed_batches(model, [token_batch(torch.zeros(1, 1, dtype=torch.int64))])
    except InputError:
        return 2
    return 1


def sharing_of(model: BlockModel, requests: Sequence[Request]) -> Sharing:
    """Find what rows of these requests may hold.

    Args:
        model: the model, inside `BlockModel.outside`, with the embeddings of all tokens.
        requests: the requests.
    """
    whole = Row(array("i", max(requests, key=lambda request: len(request.read)).read))
    # Its beginning must come out as it does by itself.
    beginning = [*range(-(-len(whole.tokens) // 2))]
    pairs = [pair_of(model, token_batch(padded([whole], len(whole.tokens))), whole, [beginning])]
    trees = [row for row in rows_of(requests, Sharing.BRANCHES, longest_branch(model)) if row.branches]
    if trees:
        # The first has the longest branch; in the second, the most tokens lie between a token and one that it reads.
        chosen = {id(row): row for row in (max(trees, key=_depth), max(trees, key=lambda row: len(row.tokens)))}
        for row in chosen.values():
            pairs.append(pair_of(model, tree_batch([row], len(row.tokens), torch.float32), row, _two(_branches(row))))
    same = compared(model, pairs)
    if not same[0]:
        return Sharing.NOTHING
    return Sharing.BRANCHES if all(same) else Sharing.BEGINNINGS


def model_dtype(model: BlockModel) -> torch.dtype:
    """The dtype of a model's first weights."""
    return next(x.dtype for x in model.model.parameters() if x.is_floating_point())


def _branches(row: Row) -> list[list[int]]:
    """Places of the tokens of each branch, from the first to one that is nobody's parent."""
    parents, branches = {*row.parents}, []
    for place in range(len(row.tokens)):
        if place not in parents:
            branch = [place]
            while row.parents[branch[-1]] >= 0:
                branch.append(row.parents[branch[-1]])
            branches.append(branch[::-1])
    return branches


def _two(branches: list[list[int]]) -> list[list[int]]:
    """The longest branch and the last one, which lies farthest from the tokens that all share.

    More would take more memory than the pass itself: each of them is a row by itself, and a row may have hundreds.
    """
    return [max(branches[:-1], key=len), branches[-1]]


def _depth(row: Row) -> int:
    return max(map(len, _branches(row)))
