"""Compute log-likelihoods with a checkpoint, with one block in memory at a time.

Every block is read once, and all requests or windows go through it. Logits are computed after the last block.

Whether requests may share a tree is measured, for any architecture. Two requests are computed in a tree and alone, and
their hidden states are compared after every block. If the hidden states differ, or if the model rejects the mask of a
tree, the pass starts again without trees. In a recurrent model the hidden states differ after the first block.
"""

import math
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsefw import arithmetic, memory
from sparsefw.caller import bar_of_blocks
from sparsefw.checkpoint.source import Checkpoint
from sparsefw.data.windows import Windows
from sparsefw.errors import InputError, Say, counted
from sparsefw.estimate.placement import memory_limits, place
from sparsefw.estimate.profile import shape_of
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.extras.evaluation.batching import Request, Tree, batch_of, ids_of, trees_of
from sparsefw.model.activations import Placement
from sparsefw.model.forward import check_token, embed, embed_batches
from sparsefw.model.head import logits, window_losses
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.streamed import StreamedModel
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report.log import block_row
from sparsefw.solver.config import PruneConfig

# Bytes of fp32 logits that are computed at once.
LOGIT_BYTES = 64 * 2**20
# Rows have at least two tokens, since some models treat a row of one token as a step of generation.
MIN_LENGTH = 2
# Largest relative distance of hidden states that products of different shapes may cause, by the bytes of a value.
TOLERANCE = {4: 1e-3, 2: 0.05}
# Hidden states are compared at this many last positions of a request.
COMPARED = 8


class Score(NamedTuple):
    """The score of a request.

    Attributes:
        loglikelihood: sum of the log-probabilities of all targets, in nats.
        greedy: whether each target is the most likely token at its position.
    """

    loglikelihood: float
    greedy: bool


def window_losses_of(source: Checkpoint, windows: Windows, ranks: Ranks = ALONE, **options: Any) -> list[float]:
    """Compute the mean negative log-likelihood per predicted token of each window.

    Args:
        source: the checkpoint.
        windows: the windows.
        ranks: the processes that share the windows. Every process gets all losses.
        options: as for `_opened`.

    Raises:
        InputError: the checkpoint cannot be read or run, memory is too little, or a loss is NaN.
    """
    mine, losses = windows.shard(ranks.share(windows.n)), list[float]()
    with _opened(source, ranks, **options) as opened:
        if mine.n:
            placement = opened.placement(mine.n, windows.seqlen)
            states = embed(opened.model, mine.ids, placement.batch, placement.store(opened.model.device))
            for _ in opened.blocks([states], placement):
                pass
            losses = [loss for of_batch in window_losses(states, mine) for loss in of_batch]
    losses = [loss for of_rank in ranks.gather(losses) for loss in of_rank]
    _check_numbers(source, losses, "windows")
    return losses


def scores_of(source: Checkpoint, requests: Sequence[Request], ranks: Ranks = ALONE, **options: Any) -> list[Score]:
    """Compute the scores of requests with a checkpoint.

    Args:
        source: the checkpoint.
        requests: the requests.
        ranks: the processes that share the requests. Every process passes the same requests, and gets all scores.
        options: as for `_opened`.

    Raises:
        InputError: the checkpoint cannot be read or run, memory is too little, or a score is NaN.
    """
    # Trees are dealt to the ranks by length, so that all ranks have about the same number of tokens.
    trees = trees_of(dict(enumerate(requests)), True, MIN_LENGTH)
    trees = sorted(trees, key=lambda tree: -len(tree.tokens))[ranks.number :: ranks.count]
    mine = {n: requests[n] for tree in trees for n in tree.paths}
    found: dict[int, Score] = {}
    with _opened(source, ranks, **options) as opened:
        if mine:
            check_token(max(max(request.targets) for request in mine.values()), opened.model.vocabulary)
        flow = opened.model.flow
        # Trees are tried only if logits do not depend on the places of tokens in a row.
        if flow.windows_first and not flow.batch_after and any(tree.branched for tree in trees):
            try:
                found = _scores_of_trees(opened, mine, trees)
            except InputError as error:
                # An error that trees did not cause is raised again by the pass without trees.
                opened.say(f"requests are computed without trees: {error}")
        if mine and not found:
            found = _scores_of_trees(opened, mine, trees_of(mine, False, MIN_LENGTH if flow.windows_first else 1))
    answers: dict[int, Score] = {}
    for of_rank in ranks.gather(found):
        answers |= of_rank
    _check_numbers(source, [score.loglikelihood for score in answers.values()], "requests")
    return [answers[n] for n in range(len(requests))]


def _check_numbers(source: Checkpoint, values: Sequence[float], what: str) -> None:
    """Refuse log-likelihoods that are NaN, since comparing NaN would choose arbitrary answers.

    Raises:
        InputError: a log-likelihood is NaN.
    """
    if count := sum(map(math.isnan, values)):
        raise InputError(
            f"{source.folder}: the log-likelihoods of {count} of {len(values)} {what} are NaN, since values after the "
            f"last block overflow {source.dtype}; evaluate another checkpoint"
        )


@dataclass
class _OpenModel:
    """A model that is ready to run block by block, with its memory limits and log.

    Attributes:
        model: the model.
        shape: shape of the model.
        limits: memory limits in bytes.
        say: called with every line of the log.
        progress: whether to show a progress bar; None: only in a terminal.
    """

    model: StreamedModel
    shape: ModelShape
    limits: dict[str, int]
    say: Say
    progress: bool | None

    def placement(self, windows: int, seqlen: int) -> Placement:
        """Choose the placement for running this number of windows through the model.

        Raises:
            InputError: no placement fits; the message names the smallest limit that could be enough.
        """
        device = self.model.device
        workload = Workload(
            windows=windows,
            # The estimate counts logits only if there is an evaluation text.
            evaluation=(0,),
            seqlen=seqlen,
            config=PruneConfig(method="magnitude", reconstruct=0),
            gpu=device.type == "cuda",
            process=memory.resident(),
            held=memory.held_on_gpu(device),
        )
        return place(self.shape.selected(lambda name: False), workload, self.limits, fixed={"solver": 0})

    def blocks(self, several: Sequence[HiddenStates], placement: Placement) -> Iterator[str]:
        """Run hidden states through all blocks. Yields the name of each block after it has run.

        Raises:
            InputError: an output holds NaN or Inf.
        """
        names, started = self.model.names, time.perf_counter()
        with bar_of_blocks(len(names), self.progress) as bar:
            for i, name in enumerate(names):
                self.model.open(i, placement.ahead)
                for states in several:
                    states.advance(i)
                self.model.close(i)
                yield name
                bar.update()
                if self.progress is None and bar.disable:
                    # Without a terminal there is no bar: log a line for each block.
                    left = (len(names) / (i + 1) - 1) * (time.perf_counter() - started)
                    self.say(block_row(names, i, left))


@contextmanager
def _opened(
    source: Checkpoint,
    ranks: Ranks,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    say: Say = lambda line: None,
    progress: bool | None = False,
) -> Iterator[_OpenModel]:
    """Open a checkpoint's model for the `with` block.

    Args:
        source: the checkpoint.
        ranks: the processes that share the work.
        gpu_memory, host_memory: memory limits in GiB; None: the free memory less a tenth.
        say: called with every line of the log.
        progress: whether to show a progress bar; None: only in a terminal.
    """
    # Return memory of an earlier model to the system, so that it counts as free.
    memory.trim_memory()
    device = memory.this_device()
    limits = memory_limits(gpu_memory, host_memory, memory.free_memory(device, ranks.here), ranks)
    in_fp32 = ranks.on_first(lambda: arithmetic.computes_in_fp32(source.dtype, device))
    with (
        StreamedModel(source, device, in_fp32=in_fp32) as model,
        memory.gpu_limited(limits, gpu_memory),
        torch.no_grad(),
    ):
        say(f"model: {source.folder}, {counted(len(model.blocks), 'block')}, {source.dtype}")
        if in_fp32:
            say(f"note: {arithmetic.note(source.dtype)}")
        yield _OpenModel(model, shape_of(source, in_fp32), limits, say, progress if ranks.first else False)


# Trees of one length, all branched or all not: the trees of each micro-batch, and the hidden states of all trees.
_Group = tuple[list[list[Tree]], HiddenStates]


def _scores_of_trees(opened: _OpenModel, requests: Mapping[int, Request], trees: Sequence[Tree]) -> dict[int, Score]:
    """Compute the scores of requests, by number, in one pass.

    Raises:
        InputError: a request scores differently in a tree than alone, the model rejects a tree's mask, or as for
            `scores_of`.
    """
    opened.say(
        f"requests: {len(requests)} with {sum(len(request.read) for request in requests.values())} tokens, computed as "
        f"{len(trees)} rows with {sum(len(tree.tokens) for tree in trees)}"
    )
    probes = _probes(trees)
    trees = [*trees, *(probe.alone for probe in probes)]
    longest = max(tree.length for tree in trees)
    # A branched tree has a mask with a value for each pair of tokens, which counts as further tokens here.
    tokens = sum(tree.length * (1 + tree.branched * tree.length // opened.shape.hidden) for tree in trees)
    placement = opened.placement(-(-tokens // longest), longest)
    with opened.model.outside_loaded():
        groups = list(_embedded(opened, trees, placement))
    for block in opened.blocks([states for _, states in groups], placement):
        for probe in probes:
            probe.check(block, groups)
    with opened.model.outside_loaded():
        return dict(_scores(opened, requests, groups))


def _embedded(opened: _OpenModel, trees: Sequence[Tree], placement: Placement) -> Iterator[_Group]:
    """Embed trees: yields groups of trees with their hidden states before the first block."""
    shape_of_tree = attrgetter("length", "branched")
    dtype: Any = opened.model.model.dtype
    store, tokens = placement.store(opened.model.device), placement.batch * max(tree.length for tree in trees)
    for (length, _), alike in groupby(sorted(trees, key=shape_of_tree, reverse=True), shape_of_tree):
        group, size = list(alike), tokens // length
        batches = [group[first : first + size] for first in range(0, len(group), size)]
        made = (batch_of(batch, dtype) for batch in batches)
        yield batches, embed_batches(opened.model, made, store)


class _Probe(NamedTuple):
    """A request that is computed twice, in its tree and alone, to compare the hidden states.

    Attributes:
        tree: the tree with other requests.
        alone: a tree of this request alone.
        places: the places in the tree of the request's last tokens, which no earlier request of the tree has.
    """

    tree: Tree
    alone: Tree
    places: list[int]

    def check(self, block: str, groups: Sequence[_Group]) -> None:
        """Refuse trees if the request's hidden states in the tree differ from those alone by more than rounding.

        The median over positions is compared, since a router may send single tokens to other experts.

        Raises:
            InputError: the hidden states differ.
        """
        found = _hidden_of(groups, self.tree)[self.places].float()
        expected = _hidden_of(groups, self.alone)[-len(self.places) :]
        distances = (found - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
        if not float(distances.median()) <= TOLERANCE[expected.dtype.itemsize]:
            raise InputError(f"{block} returns other hidden states for a request in a tree than for the request alone")


def _hidden_of(groups: Sequence[_Group], tree: Tree) -> Tensor:
    """Find the hidden states (length, d) of a tree."""
    return next(
        states.hidden[j][batch.index(tree)]
        for batches, states in groups
        for j, batch in enumerate(batches)
        if tree in batch
    )


def _probes(trees: Sequence[Tree]) -> list[_Probe]:
    """Choose two requests to compare: the longest one, and the one that ends furthest to the right in a tree.

    With local attention, a window may count positions of tokens or places in the row. Each request tests one case.
    """
    branches = [(tree, path) for tree in trees if tree.branched for path in tree.paths.values()]
    probes = []
    for key in (lambda branch: len(branch[1]), lambda branch: branch[1][-1]) if branches else ():
        tree, path = max(branches, key=key)
        # The last run of consecutive places in a path are the request's own tokens.
        own = np.split(path, np.flatnonzero(np.diff(path) != 1) + 1)[-1]
        alone = Tree(array("i", [tree.tokens[place] for place in path]))
        probes.append(_Probe(tree, alone, own[-COMPARED:].tolist()))
    return probes


def _scores(
    opened: _OpenModel, requests: Mapping[int, Request], groups: Sequence[_Group]
) -> Iterator[tuple[int, Score]]:
    """Yield the number and the score of each request, from the hidden states after the last block."""
    for batches, states in groups:
        for j, batch in enumerate(batches):
            paths = [(number, n, path) for n, tree in enumerate(batch) for number, path in tree.paths.items()]
            # A tree that was only compared has no requests.
            if not paths:
                continue
            lengths = [len(requests[number].targets) for number, *_ in paths]
            places = [(n, at) for (_, n, path), length in zip(paths, lengths, strict=True) for at in path[-length:]]
            targets = torch.tensor([target for number, *_ in paths for target in requests[number].targets])
            logprobs, greedy = _predictions(opened, ids_of(batch), states, j, torch.tensor(places), targets)
            parts = zip(paths, logprobs.split(lengths), greedy.split(lengths), strict=True)
            for (number, *_), of_request, likeliest in parts:
                yield number, Score(of_request.sum().item(), bool(likeliest.all()))


def _predictions(
    opened: _OpenModel, ids: Tensor, states: HiddenStates, j: int, places: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of each target, and whether the target is the most likely token, on the host.

    Many targets share one product with the head, since each product reads all of the head's weights.

    Args:
        opened: the model.
        ids: (rows, length) tokens of micro-batch j.
        states: the hidden states after the last block.
        j: number of the micro-batch.
        places: (targets, 2) row and position of each token before a target.
        targets: (targets,) the tokens to predict.
    """
    hidden, whole = states.hidden[j], None
    if not opened.shape.by_window:
        whole = logits(opened.model, ids, hidden, states.after_last(j))
    # The targets go through the head as one window.
    size = max(1, min(LOGIT_BYTES // (4 * (opened.model.vocabulary or 1)), opened.model.max_seqlen or LOGIT_BYTES))
    found = []
    for at, wanted in zip(places.split(size), targets.to(hidden.device).split(size), strict=True):
        n, place = at.T
        rows = (
            logits(opened.model, ids[n, place][None], hidden[n, place][None])[0] if whole is None else whole[n, place]
        ).float()
        logprobs = rows.gather(1, wanted[:, None])[:, 0].double() - rows.logsumexp(-1).double()
        found.append((logprobs.cpu(), (rows.argmax(-1) == wanted).cpu()))
    logprobs, greedy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return logprobs, greedy
