"""Log-likelihoods of targets, from the hidden states behind the last block.

Logits are computed where a target is predicted, and nowhere else, a slice of the vocabulary at a time: 2 d V flops a
position, for hidden states of d entries and V tokens of the vocabulary. The rows of the head are read once.

    log p(target) = logit(target) - log(sum over the vocabulary of exp(logit))
"""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.data import token_batch
from sparsefw.errors import InputError
from sparsefw.evaluation.packing import Group, Row
from sparsefw.evaluation.request import Request, Score
from sparsefw.evaluation.room import LOGITS
from sparsefw.model import BlockModel, HiddenStates, StreamedModel
from sparsefw.model.activations import Activations, Store
from sparsefw.model.forward import run_behind_blocks
from sparsefw.model.head import same_logits
from sparsefw.model.tables import Tables

# Rows of a slice of the head at least.
ROWS = 1024


@dataclass
class Predicted:
    """Positions at which a token is predicted.

    Attributes:
        at: by group and micro-batch, (2, positions): the row in the micro-batch and the place in the row.
        count: number of positions.
        positions, tokens, requests: for every target its position, its token, and the number of its request.
    """

    at: list[list[Tensor]] = field(default_factory=list)
    count: int = 0
    positions: "array[int]" = field(default_factory=lambda: array("q"))
    tokens: "array[int]" = field(default_factory=lambda: array("q"))
    requests: "array[int]" = field(default_factory=lambda: array("q"))

    @classmethod
    def of(cls, groups: Sequence[Group], sizes: Sequence[Sequence[int]], requests: Sequence[Request]) -> "Predicted":
        """The positions of all requests; `sizes` are the numbers of rows in the micro-batches of each group."""
        predicted = cls()
        for group, counts in zip(groups, sizes, strict=True):
            rows = iter(group.rows)
            predicted.at.append([predicted._note(list(islice(rows, count)), requests) for count in counts])
        return predicted

    def _note(self, rows: list[Row], requests: Sequence[Request]) -> Tensor:
        at: list[tuple[int, int]] = []
        for n, row in enumerate(rows):
            places = sorted({place for answers in row.answers.values() for place in answers})
            number_of = {place: self.count + k for k, place in enumerate(places)}
            self.count += len(places)
            at += [(n, place) for place in places]
            for number, answers in row.answers.items():
                self.positions.extend(number_of[place] for place in answers)
                self.tokens.extend(iter(requests[number].targets))
                self.requests.extend(repeat(number, len(answers)))
        return torch.tensor(at, dtype=torch.int32).T


class Likelihoods:
    """Log-probabilities of targets, from logits that come a slice of the vocabulary at a time.

    Args:
        predicted: the positions, and all targets.
    """

    def __init__(self, predicted: Predicted) -> None:
        positions, tokens = (torch.frombuffer(x, dtype=torch.int64) for x in (predicted.positions, predicted.tokens))
        count = predicted.count
        self._order = positions.argsort(stable=True)
        self._positions, self._tokens = positions[self._order], tokens[self._order]
        self._logits = torch.zeros(len(tokens), dtype=torch.float64)
        # Each position has the logarithm of its sum so far, its largest logit, and the token of that one.
        self._sums = torch.full((count,), -torch.inf, dtype=torch.float64)
        self._best = torch.full((count,), -torch.inf)
        self._best_tokens = torch.zeros(count, dtype=torch.int64)

    def add(self, first: int, logits: Tensor, start: int) -> None:
        """Take in logits (positions, tokens) in fp32: of positions from `first` on, and of tokens from `start` on."""
        where = slice(first, first + len(logits))
        largest, token = (x.cpu() for x in logits.max(-1))
        better = largest > self._best[where]
        self._best[where][better], self._best_tokens[where][better] = largest[better], token[better] + start
        self._sums[where] = torch.logaddexp(self._sums[where], logits.logsumexp(-1).cpu().double())
        begin, end = torch.searchsorted(self._positions, torch.tensor([first, first + len(logits)])).tolist()
        tokens = self._tokens[begin:end] - start
        inside = (tokens >= 0) & (tokens < logits.shape[1])
        rows = self._positions[begin:end][inside] - first
        picked = logits[rows.to(logits.device), tokens[inside].to(logits.device)]
        self._logits[begin:end][inside] = picked.cpu().double()

    def found(self) -> tuple[Tensor, Tensor]:
        """Log-probability of every target, float64; and whether it is the most likely token of its position."""
        back = self._order.argsort()
        logprobs = self._logits - self._sums[self._positions]
        return logprobs[back], (self._best_tokens[self._positions] == self._tokens)[back]


def tables_of(model: BlockModel) -> Tables | None:
    """The tables of a model's vocabulary, if they can be read in parts."""
    tables = Tables(model) if isinstance(model, StreamedModel) else None
    return tables if tables and tables.found else None


def slice_rows(model: BlockModel, tables: Tables | None) -> int:
    """Rows of the head that are in memory at once: about as large as a block; all of them if it cannot be cut."""
    if tables is None:
        return model.vocabulary or 1
    block = max(sum(x.nbytes for x in block.parameters()) for block in model.blocks)
    return min(tables.rows, max(ROWS, block // tables.row_bytes))


@torch.no_grad()
def score_groups(
    model: BlockModel,
    states: Sequence[HiddenStates],
    groups: Sequence[Group],
    requests: Sequence[Request],
    store: Store,
) -> dict[int, Score]:
    """The scores of all requests in groups, by their numbers.

    Args:
        model: the model.
        states: hidden states of each group behind the last block; they are closed one after another.
        groups: the groups.
        requests: all requests, by their numbers.
        store: where hidden states are.
    """
    tables = tables_of(model)
    rows = slice_rows(model, tables)
    size = max(1, LOGITS[model.device.type == "cuda"] // (4 * rows))
    predicted = Predicted.of(groups, [of_group.windows for of_group in states], requests)
    found = Likelihoods(predicted)
    if all(_by_window(of_group, group) for of_group, group in zip(states, groups, strict=True)):
        hidden = Activations(store)
        try:
            _gather(predicted, states, hidden, size)
            _by_position(model, tables, rows, hidden, found)
        finally:
            hidden.clear()
    else:
        _by_row(model, predicted, states, groups, size, found)
    sums, greedy = dict.fromkeys(predicted.requests, 0.0), dict.fromkeys(predicted.requests, True)
    for number, logprob, best in zip(predicted.requests, *(x.tolist() for x in found.found()), strict=True):
        sums[number] += logprob
        greedy[number] = greedy[number] and best
    return {number: Score(sums[number], greedy[number]) for number in sums}


def _by_window(states: HiddenStates, group: Group) -> bool:
    """Whether what lies behind the last block reads the hidden states alone, and these are vectors of tokens."""
    alone = states.flow.by_window and not states.flow.batch_behind
    return alone and states.hidden[0].shape[:2] == (states.windows[0], group.length)


def _gather(predicted: Predicted, states: Sequence[HiddenStates], hidden: Activations, size: int) -> None:
    """Collect the hidden states at which a token is predicted, in pieces of `size` positions, (positions, 1, d)."""
    waiting: list[Tensor] = []
    for of_group, at in zip(states, predicted.at, strict=True):
        for j, places in enumerate(at):
            n, place = places.to(of_group.model.device)
            waiting.append(of_group.hidden[j][n, place])
            if sum(map(len, waiting)) >= size:
                *whole, last = torch.cat(waiting).split(size)
                waiting = [last]
                for piece in whole:
                    hidden.append(piece[:, None].clone())
        of_group.close()
    if waiting:
        hidden.append(torch.cat(waiting)[:, None])


def _by_position(model: BlockModel, tables: Tables | None, rows: int, hidden: Activations, found: Likelihoods) -> None:
    """Run what lies behind the last block on all positions, for each slice of the head."""
    if tables and not _can_be_cut(model, tables, rows, hidden[0][:1]):
        tables = None
    with tables.head(rows) if tables else _whole(model) as slices:
        for cut in slices:
            first = 0
            for piece in hidden:
                found.add(first, _logits(model, piece), cut.start)
                first += len(piece)


@contextmanager
def _whole(model: BlockModel) -> Iterator[list[slice]]:
    with model.outside():
        yield [slice(0, None)]


def _logits(model: BlockModel, hidden: Tensor) -> Tensor:
    """Logits (positions, tokens) in fp32 of hidden states (positions, 1, d)."""
    # The tokens make no difference behind the last block.
    batch = token_batch(torch.zeros(len(hidden), 1, dtype=torch.int64))
    return run_behind_blocks(model, batch, hidden, {}).logits[:, 0].float()


def _can_be_cut(model: BlockModel, tables: Tables, rows: int, hidden: Tensor) -> bool:
    """Whether a slice of the head makes the same logits as the head.

    What the forward does with logits must be the same for all tokens, as a cap or a scale is. Two halves of a slice
    are compared with the slice.
    """
    half = max(1, min(rows, tables.rows) // 2)
    try:
        with tables.head(2 * half) as slices:
            whole = next((_logits(model, hidden) for _ in slices), hidden)
        with tables.head(half) as slices:
            halves = torch.cat([_logits(model, hidden) for _ in islice(slices, 2)], -1)
    except InputError:
        # Its forward needs the logits of certain tokens.
        return False
    return same_logits(whole, halves)


def _by_row(
    model: BlockModel,
    predicted: Predicted,
    states: Sequence[HiddenStates],
    groups: Sequence[Group],
    size: int,
    found: Likelihoods,
) -> None:
    """Run what lies behind the last block on whole micro-batches, up to the head: it reads more than hidden states."""
    first = 0
    with model.outside():
        for of_group, group, at in zip(states, groups, predicted.at, strict=True):
            batches = group.split(of_group.windows[0])
            for j, (batch, of_batch) in enumerate(zip(batches, at, strict=True)):
                for places in of_batch.to(model.device).split(size, dim=1):
                    n, place = places
                    with _head_reads(model, n, place, (batch.windows, group.length)) as reads:
                        out = run_behind_blocks(model, batch, of_group.hidden[j], of_group.behind_last(j))
                    logits = out.logits[0] if reads else out.logits[n, place]
                    found.add(first, logits.float(), 0)
                    first += places.shape[1]
            of_group.close()


@contextmanager
def _head_reads(model: BlockModel, n: Tensor, place: Tensor, shape: tuple[int, int]) -> Iterator[list[bool]]:
    """Inside the `with` block the model's head reads only these places of these rows, as one row.

    Yields:
        A list that is empty as long as the head has not read them: it reads what has no such rows.
    """
    head: Any = model.runs.get_output_embeddings()  # type: ignore[operator]
    reads: list[bool] = []

    def read(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if args[0].shape[:-1] != shape:
            return args
        reads.append(True)
        return (args[0][n, place][None], *args[1:])

    handle = head.register_forward_pre_hook(read)
    try:
        yield reads
    finally:
        handle.remove()
