"""Answer requests with a checkpoint of which one block is in memory at a time.

Every block is read once and all rows go through it. Then logits are computed where a token is predicted, and nowhere
else: log p(target) = logit(target) - log(sum over the vocabulary of exp(logit)).

What rows may hold (`Sharing`) is found on the way. No architecture is named: some requests are computed by themselves,
too, and their hidden states are compared behind every block. Where they differ, the pass begins anew with rows that
hold less. Recurrent layers show behind the first block that they take no trees.
"""

import math
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sparsefw import arithmetic, memory
from sparsefw.checkpoint.source import Checkpoint
from sparsefw.data.batches import token_batch
from sparsefw.errors import InputError, counted
from sparsefw.estimate.memory import Workload
from sparsefw.estimate.placement import memory_limits, place
from sparsefw.evaluation.rows import Group, Request, Row, Sharing, groups_of, partition, rows_of
from sparsefw.model import HiddenStates, ModelShape, Placement, StreamedModel, shape_of
from sparsefw.model.forward import check_token, embed_batches, run_behind_blocks
from sparsefw.model.skeleton import max_seqlen
from sparsefw.ranks import ALONE, Ranks
from sparsefw.solver.config import PruneConfig

# Bytes of logits in fp32 that are computed at once.
LOGITS = 64 * 2**20

# Relative distance of hidden states that other shapes of products account for, by the bytes of a number.
TOLERANCE = {4: 1e-3, 2: 0.05}
# Positions at which they are compared, at most; and the tokens of a request of which half is compared, at least.
COMPARED, LEAST = 8, 4


class Score(NamedTuple):
    """The answer to a request.

    Attributes:
        loglikelihood: sum of the log-probabilities of all targets, in nats.
        greedy: whether each target is the most likely token at its position.
    """

    loglikelihood: float
    greedy: bool


def scores_of(
    source: Checkpoint,
    requests: Sequence[Request],
    *,
    gpu_memory: float | None = None,
    host_memory: float | None = None,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> list[Score]:
    """The answers of a checkpoint to requests.

    Args:
        source: the checkpoint.
        requests: the requests.
        gpu_memory, host_memory: memory limits in GiB; None: what is free, less a tenth.
        say: called with every line of the log.
        progress: whether to show a progress bar.
        ranks: the processes that share the work; all of them have the same requests, and get all answers.

    Raises:
        InputError: the checkpoint cannot be read or run, memory is too little, or answers are NaN.
    """
    # Otherwise what a model before has left counts as taken.
    memory.give_back()
    device = memory.this_device()
    limits = memory_limits(gpu_memory, host_memory, memory.free_memory(device, ranks.here), ranks)
    parts = partition(requests, ranks.count)
    mine = [requests[n] for n in parts[ranks.number]]
    in_fp32 = ranks.on_first(lambda: arithmetic.computes_in_fp32(source.dtype, device))
    with (
        StreamedModel(source, device, in_fp32=in_fp32) as model,
        memory.gpu_limited(limits.get("gpu")),
        torch.no_grad(),
    ):
        say(f"model: {source.folder}, {counted(len(model.blocks), 'block')}, {source.dtype}")
        if in_fp32:
            say(f"note: {arithmetic.note(source.dtype)}")
        check_token(max((max(*r.read, *r.targets) for r in mine), default=0), model.vocabulary)
        shape = shape_of(source, in_fp32)
        found = _answers(model, shape, mine, limits, say, progress and ranks.first, ranks) if mine else []
    answers: dict[int, Score] = {}
    for numbers, of_rank in zip(parts, ranks.gather(found), strict=True):
        answers |= zip(numbers, of_rank, strict=True)
    if none := sum(math.isnan(score.loglikelihood) for score in answers.values()):
        raise InputError(
            f"{source.folder}: the log-likelihoods of {none} of {len(requests)} requests are NaN, as behind the last "
            f"block numbers are too large for {source.dtype}; it is of no use"
        )
    return [answers[n] for n in range(len(requests))]


def _answers(
    model: StreamedModel,
    shape: ModelShape,
    requests: Sequence[Request],
    limits: dict[str, int],
    say: Callable[[str], None],
    progress: bool,
    ranks: Ranks,
) -> list[Score]:
    """The answers of one rank, in rows that hold as much as the model allows."""
    for sharing in sorted(Sharing, reverse=True):
        rows = rows_of(requests, sharing)
        checks = _checks(rows) if sharing else []
        if sharing and (not checks or (sharing == Sharing.BRANCHES and not any(row.branches for row in rows))):
            continue
        groups = groups_of(rows, sharing, max_seqlen(model.config) or sys.maxsize)
        groups += groups_of([check.alone for check in checks], Sharing.NOTHING)
        placement = _placement(shape, model.device, groups, limits, ranks)
        say(
            f"requests: {len(requests)} with {sum(len(request.read) for request in requests)} tokens, computed as "
            f"{len(rows)} rows with {sum(len(row.tokens) for row in rows)}; shared: {sharing.name.lower()}"
        )
        try:
            found = _Pass(model, shape.by_window, groups, checks, placement).run(progress)
        except InputError:
            # Some models take no mask of a tree.
            if sharing < Sharing.BRANCHES:
                raise
            found = None
        if found is not None:
            return [found[n] for n in range(len(requests))]
    raise AssertionError("without sharing nothing is checked")


class _Check(NamedTuple):
    """A request that is computed by itself, too.

    Attributes:
        row: the row that holds it.
        places: places there that are compared: the last ones, which no other request has.
        alone: a row that holds it alone; the last places there are compared.
    """

    row: Row
    places: list[int]
    alone: Row


def _checks(rows: Sequence[Row]) -> list[_Check]:
    """Of the longest chain, the first half; of the deepest and of the largest tree, the last branch."""
    picked = ((False, lambda row: row.depth), (True, lambda row: row.depth), (True, lambda row: len(row.tokens)))
    found = [max((row for row in rows if row.branches == trees), key=key, default=None) for trees, key in picked]
    checks = []
    for row in dict.fromkeys(found):
        if row is None or row.depth < LEAST:
            continue
        # The request's path, and those of its places that no other request has.
        path, own = (row.path, row.own) if row.branches else [row.path[: row.depth // 2]] * 2
        alone = Row()
        alone.add(0, Request(array("i", [row.tokens[place] for place in path]), array("i")), 0)
        checks.append(_Check(row, own[-COMPARED:], alone))
    return checks


def _placement(
    shape: ModelShape, device: torch.device, groups: Sequence[Group], limits: dict[str, int], ranks: Ranks
) -> Placement:
    """What a pass holds at once: that of a run on as many tokens, in windows of the longest row, that prunes nothing.

    Raises:
        InputError: nothing fits; the message names the smallest limit that could.
    """
    seqlen = max(group.length for group in groups)
    # The mask of a tree has a number for each two of its tokens.
    tokens = sum(len(group.rows) * group.length * (1 + group.trees * group.length // shape.hidden) for group in groups)
    workload = Workload(
        windows=-(-tokens // seqlen),
        # Logits are computed.
        evaluation=(0,),
        seqlen=seqlen,
        config=PruneConfig(method="magnitude", reconstruct=0),
        gpu=device.type == "cuda",
        process=memory.resident(),
        held=memory.held_on_gpu(device),
    )
    placement, _ = place(shape.selected(lambda name: False), workload, limits, fixed={"solver": 0})
    return placement


class _Pass:
    """A pass of rows through a model.

    Args:
        model: the model.
        by_window: whether logits are made of the hidden states of single tokens.
        groups: the rows.
        checks: what is compared behind every block.
        placement: what is held at once, and where.
    """

    def __init__(
        self,
        model: StreamedModel,
        by_window: bool,
        groups: Sequence[Group],
        checks: Sequence[_Check],
        placement: Placement,
    ) -> None:
        self._model, self._by_window, self._groups, self._checks = model, by_window, groups, checks
        self._placement, self._longest = placement, max(group.length for group in groups)
        self._tokens = placement.batch * self._longest
        self._dtype = next(x.dtype for x in model.model.parameters() if x.is_floating_point())
        self._dtype = torch.float32 if model.in_fp32 else self._dtype
        self._found = {row: (g, n) for g, group in enumerate(groups) for n, row in enumerate(group.rows)}
        self._states: list[HiddenStates] = []

    def run(self, progress: bool) -> dict[int, Score] | None:
        """Run all rows; returns the answers by the numbers of requests, or None once a check has failed."""
        model, store = self._model, self._placement.store(self._model.device)
        with ExitStack() as stack:
            with model.outside():
                for group in self._groups:
                    self._states.append(embed_batches(model, group.batches(self._tokens, self._dtype), store))
                    stack.callback(self._states[-1].close)
            bar = stack.enter_context(tqdm(total=len(model.blocks), unit="block", disable=None if progress else True))
            for i in range(len(model.blocks)):
                model.open(i, self._placement.ahead)
                for states in self._states:
                    states.advance(i)
                model.close(i)
                if not all(map(self._alike, self._checks)):
                    return None
                bar.update()
            with model.outside():
                return self._scores()

    def _alike(self, check: _Check) -> bool:
        """Whether a request has the same hidden states by itself and with others, but for what products round.

        The median over positions counts: a router may send single tokens to other experts.
        """
        g, _ = self._found[check.alone]
        if self._states[g].hidden[0].shape[:2] != (self._states[g].windows[0], self._groups[g].length):
            # The hidden states of tokens cannot be told from each other.
            return False
        shared, alone = self._hidden(check.row)[check.places], self._hidden(check.alone)[-len(check.places) :]
        distances = (shared - alone).norm(dim=-1) / alone.norm(dim=-1)
        return float(distances.median()) <= TOLERANCE[self._dtype.itemsize]

    def _hidden(self, row: Row) -> Tensor:
        """The hidden states (tokens, d) of a row, in fp32."""
        g, n = self._found[row]
        j, n = divmod(n, self._states[g].windows[0])
        return self._states[g].hidden[j][n].float()

    def _scores(self) -> dict[int, Score]:
        """The answers, from the hidden states behind the last block."""
        sums: dict[int, float] = {}
        greedy: dict[int, bool] = {}
        for group, states in zip(self._groups, self._states, strict=True):
            for j, rows in enumerate(group.split(self._tokens)):
                places = [(n, place) for n, row in enumerate(rows) for place in row.targets]
                for logits, where in self._logits(group, states, j, places):
                    answers = [(k, *of) for k, (n, place) in enumerate(where) for of in rows[n].targets[place]]
                    at, numbers, targets = zip(*answers, strict=True)
                    logprobs = logits[at, targets].double() - logits.logsumexp(-1).double()[[*at]]
                    best = logits.argmax(-1)[[*at]].tolist()
                    for number, logprob, most, target in zip(numbers, logprobs.tolist(), best, targets, strict=True):
                        sums[number] = sums.get(number, 0.0) + logprob
                        greedy[number] = greedy.get(number, True) and most == target
        return {number: Score(sums[number], greedy[number]) for number in sums}

    def _logits(
        self, group: Group, states: HiddenStates, j: int, places: list[tuple[int, int]]
    ) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
        """Logits (positions, vocabulary) in fp32 at places of micro-batch j, some at a time, with their places."""
        model, hidden = self._model, states.hidden[j]
        if not self._by_window:
            batch = next(islice(group.batches(self._tokens, self._dtype), j, None))
            whole = run_behind_blocks(model, batch, hidden, states.behind_last(j)).logits
        # The placement has room for logits of the longest row.
        size = max(1, min(LOGITS // (4 * (model.vocabulary or 1)), self._longest))
        for first in range(0, len(places), size):
            where = places[first : first + size]
            n, place = torch.tensor(where, device=hidden.device).T
            if self._by_window:
                # The tokens make no difference behind the last block.
                batch = token_batch(torch.zeros(len(where), 1, dtype=torch.int64))
                yield run_behind_blocks(model, batch, hidden[n, place][:, None], {}).logits[:, 0].float(), where
            else:
                yield whole[n, place].float(), where
