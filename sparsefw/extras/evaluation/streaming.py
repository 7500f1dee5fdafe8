"""Answer requests with a checkpoint of which one block is in memory at a time.

Every block is read once and all rows go through it. Then logits are computed where a token is predicted, and nowhere
else: log p(target) = logit(target) - log(sum over the vocabulary of exp(logit)).

What rows may hold (`Sharing`) is found on the way. No architecture is named: some requests are computed by themselves,
too, and their hidden states are compared behind every block. Where they differ, the pass begins anew with rows that
hold less. Recurrent layers show behind the first block that they take no trees.
"""

import math
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from sparsefw import arithmetic, memory
from sparsefw.caller import bar_of_blocks
from sparsefw.checkpoint.source import Checkpoint
from sparsefw.data.batches import token_batch
from sparsefw.errors import InputError, counted
from sparsefw.estimate.memory import Workload
from sparsefw.estimate.placement import memory_limits, place
from sparsefw.extras.evaluation.rows import Group, Request, Row, Sharing, batch_of, groups_of, partition, rows_of
from sparsefw.model import ModelShape, Placement, StreamedModel, shape_of
from sparsefw.model.forward import check_token, embed_batches, run_behind_blocks
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report.log import block_row
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
    progress: bool | None = False,
    ranks: Ranks = ALONE,
) -> list[Score]:
    """The answers of a checkpoint to requests.

    Args:
        source: the checkpoint.
        requests: the requests.
        gpu_memory, host_memory: memory limits in GiB; None: what is free, less a tenth.
        say: called with every line of the log.
        progress: whether to show a progress bar; None: in a terminal alone.
        ranks: the processes that share the work; all of them have the same requests, and get all answers.

    Raises:
        InputError: the checkpoint cannot be read or run, memory is too little, or answers are NaN.
    """
    # Otherwise what a model before has left counts as taken.
    memory.trim_memory()
    device = memory.this_device()
    limits = memory_limits(gpu_memory, host_memory, memory.free_memory(device, ranks.here), ranks)
    parts = partition(requests, ranks.count)
    mine = [requests[n] for n in parts[ranks.number]]
    in_fp32 = ranks.on_first(lambda: arithmetic.computes_in_fp32(source.dtype, device))
    with (
        StreamedModel(source, device, in_fp32=in_fp32) as model,
        memory.gpu_limited(limits.get("gpu"), gpu_memory is not None),
        torch.no_grad(),
    ):
        say(f"model: {source.folder}, {counted(len(model.blocks), 'block')}, {source.dtype}")
        if in_fp32:
            say(f"note: {arithmetic.note(source.dtype)}")
        check_token(max((max(*r.read, *r.targets) for r in mine), default=0), model.vocabulary)
        shape = shape_of(source, in_fp32)
        found = _answers(model, shape, mine, limits, say, progress if ranks.first else False) if mine else []
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
    progress: bool | None,
) -> list[Score]:
    """The answers of one rank, in rows that hold as much as the model allows."""
    for sharing in sorted(Sharing, reverse=True):
        rows = rows_of(requests, sharing)
        checks = _checks(rows) if sharing else []
        if sharing and (not checks or (sharing == Sharing.BRANCHES and not any(row.branches for row in rows))):
            continue
        groups = groups_of(rows, sharing, model.max_seqlen or sys.maxsize) + [check.alone for check in checks]
        placement = _placement(shape, model.device, groups, limits)
        say(
            f"requests: {len(requests)} with {sum(len(request.read) for request in requests)} tokens, computed as "
            f"{len(rows)} rows with {sum(len(row.tokens) for row in rows)}; shared: {sharing.name.lower()}"
        )
        try:
            if _pass(model, groups, checks, placement, say, progress):
                with model.outside():
                    return _scores(model, shape.by_window, requests, groups)
        except InputError:
            # Some models take no mask of a tree.
            if sharing < Sharing.BRANCHES:
                raise
    raise AssertionError("without sharing nothing is checked")


class _Check(NamedTuple):
    """A request that is computed by itself, too.

    Attributes:
        row: the row that holds it.
        places: places there that are compared: the last ones, which no other request has.
        alone: the request alone; the last places there are compared.
    """

    row: Row
    places: list[int]
    alone: Group


def _checks(rows: Sequence[Row]) -> list[_Check]:
    """Of the longest chain, the first half; of the deepest and of the largest tree, the last branch."""
    picked = ((False, lambda row: row.depth), (True, lambda row: row.depth), (True, lambda row: len(row.tokens)))
    found = [max((row for row in rows if row.branches == trees), key=key, default=None) for trees, key in picked]
    checks = []
    for row in dict.fromkeys(found):
        if row is None or row.depth < LEAST:
            continue
        path = np.array([*row.paths.values()][-1]) if row.branches else np.arange(row.depth // 2)
        # The last places that follow each other are those of the branch.
        own = np.split(path, np.flatnonzero(np.diff(path) != 1) + 1)[-1]
        alone = Row(array("i", [row.tokens[place] for place in path]), depth=len(path))
        checks.append(_Check(row, own[-COMPARED:].tolist(), Group(len(path), [alone])))
    return checks


def _placement(shape: ModelShape, device: torch.device, groups: Sequence[Group], limits: dict[str, int]) -> Placement:
    """What a pass holds at once: that of a run on as many tokens, in windows of the longest row, that prunes nothing.

    Raises:
        InputError: nothing fits; the message names the smallest limit that could.
    """
    seqlen = max(group.length for group in groups)
    # The mask of a tree has a number for each two of its tokens.
    masks = [group.rows[0].branches * group.length // shape.hidden for group in groups]
    tokens = sum(len(group.rows) * group.length * (1 + n) for group, n in zip(groups, masks, strict=True))
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


def _pass(
    model: StreamedModel,
    groups: Sequence[Group],
    checks: Sequence[_Check],
    placement: Placement,
    say: Callable[[str], None],
    progress: bool | None,
) -> bool:
    """Run all rows through all blocks; False once a check has failed."""
    store, tokens = placement.store(model.device), placement.batch * max(group.length for group in groups)
    dtypes = (x.dtype for x in model.model.parameters() if x.is_floating_point())
    dtype = torch.float32 if model.in_fp32 else next(dtypes)
    with model.outside():
        for group in groups:
            size = max(1, tokens // group.length)
            group.batches = [group.rows[first : first + size] for first in range(0, len(group.rows), size)]
            batches = (batch_of(rows, group.length, dtype) for rows in group.batches)
            group.states = embed_batches(model, batches, store)
    count, started = len(model.blocks), time.perf_counter()
    with bar_of_blocks(count, progress) as bar:
        for i in range(count):
            model.open(i, placement.ahead)
            for group in groups:
                group.states.advance(i)
            model.close(i)
            if not all(_alike(check, groups) for check in checks):
                return False
            bar.update()
            if progress is None and bar.disable:
                # A bar is no use there.
                say(block_row(model.names[i], i + 1, count, (count / (i + 1) - 1) * (time.perf_counter() - started)))
    return True


def _alike(check: _Check, groups: Sequence[Group]) -> bool:
    """Whether a request has the same hidden states by itself and with others, but for what products round.

    The median over positions counts: a router may send single tokens to other experts.
    """
    alone = check.alone.states.hidden[0]
    if alone.shape[:2] != (1, check.alone.length):
        # The hidden states of tokens cannot be told from each other.
        return False
    group = next(group for group in groups if check.row in group.rows)
    j, n = divmod(group.rows.index(check.row), len(group.batches[0]))
    shared, own = group.states.hidden[j][n, check.places].float(), alone[0, -len(check.places) :].float()
    distances = (shared - own).norm(dim=-1) / own.norm(dim=-1)
    return float(distances.median()) <= TOLERANCE[alone.dtype.itemsize]


def _scores(model: StreamedModel, by_window: bool, requests: Sequence[Request], groups: Sequence[Group]) -> list[Score]:
    """The answers, from the hidden states behind the last block.

    Args:
        model: the model.
        by_window: whether logits are made of the hidden states of single tokens.
        requests: the requests.
        groups: their rows.
    """
    sums = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.ones(len(requests), dtype=torch.bool)
    # The placement has room for logits of the longest row.
    size = max(1, min(LOGITS // (4 * (model.vocabulary or 1)), max(group.length for group in groups)))
    for group in groups:
        for j, rows in enumerate(group.batches):
            predicted = [
                (n, place, number, target)
                for n, row in enumerate(rows)
                for number, path in row.paths.items()
                for place, target in zip(path[-len(requests[number].targets) :], requests[number].targets, strict=True)
            ]
            hidden, whole = group.states.hidden[j], None
            if not by_window:
                batch = batch_of(rows, group.length, hidden.dtype)
                whole = run_behind_blocks(model, batch, hidden, group.states.behind_last(j)).logits
            for first in range(0, len(predicted), size):
                n, place, numbers, targets = torch.tensor(predicted[first : first + size]).T
                if whole is None:
                    # The tokens make no difference behind the last block.
                    batch = token_batch(torch.zeros(len(n), 1, dtype=torch.int64))
                    logits = run_behind_blocks(model, batch, hidden[n, place][:, None], {}).logits[:, 0].float()
                else:
                    logits = whole[n, place].float()
                logprobs = logits[torch.arange(len(targets)), targets].double() - logits.logsumexp(-1).double()
                sums.index_add_(0, numbers, logprobs.cpu())
                greedy[numbers[logits.argmax(-1).cpu() != targets]] = False
    return [Score(*of) for of in zip(sums.tolist(), greedy.tolist(), strict=True)]
