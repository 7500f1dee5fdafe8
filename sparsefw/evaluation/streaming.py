"""Requests on their way through the blocks of a model: every block is read once, whatever the number of requests."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from sparsefw.evaluation.packing import Group, Sharing
from sparsefw.evaluation.request import Request, Score
from sparsefw.evaluation.room import Room
from sparsefw.evaluation.scoring import score_groups, tables_of
from sparsefw.evaluation.sharing import allowed_by
from sparsefw.model import BlockModel, HiddenStates, embed_batches
from sparsefw.model.activations import Store
from sparsefw.model.hidden_states import check_token


@dataclass(frozen=True)
class Packed:
    """Requests as rows, and what rows may hold.

    Attributes:
        requests: the requests.
        groups: the rows, by their length.
        sharing: what a row may hold.
    """

    requests: Sequence[Request]
    groups: list[Group]
    sharing: Sharing

    @property
    def tokens(self) -> int:
        """Tokens of all rows, without padding."""
        return sum(len(row.tokens) for group in self.groups for row in group.rows)


@dataclass(frozen=True)
class RequestStates:
    """Requests between two blocks of a model.

    Attributes:
        packed: the requests.
        states: hidden states of each group.
        store: where hidden states are.
    """

    packed: Packed
    states: list[HiddenStates]
    store: Store

    def advance(self, i: int) -> None:
        """As `HiddenStates.advance`."""
        for of_group in self.states:
            of_group.advance(i)

    def fork(self) -> "RequestStates":
        """A copy that runs independently."""
        return replace(self, states=[of_group.fork() for of_group in self.states])

    def close(self) -> None:
        """As `HiddenStates.close`."""
        for of_group in self.states:
            of_group.close()

    def scores(self) -> list[Score]:
        """The answers to all requests, behind the last block. The hidden states are gone then."""
        if not self.states:
            return []
        packed = self.packed
        found = score_groups(self.states[0].model, self.states, packed.groups, packed.requests, self.store)
        return [found[n] for n in range(len(packed.requests))]


def pack_for(model: BlockModel, requests: Sequence[Request]) -> Packed:
    """Pack requests as the model allows.

    Args:
        model: the model, inside `embedded`.
        requests: the requests.
    """
    allowed = allowed_by(model, requests)
    return Packed(requests, allowed.pack(requests), allowed.sharing)


def embed_requests(model: BlockModel, packed: Packed, room: Room) -> RequestStates:
    """Embed requests: their hidden states before the first block.

    Args:
        model: the model, inside `embedded`.
        packed: the requests.
        room: what is held at once, and where.

    Raises:
        InputError: as `embed_batches`.
    """
    store = room.store(model.device)
    states: list[HiddenStates] = []
    try:
        for group in packed.groups:
            states.append(embed_batches(model, group.split(room.batch(group.length)), store))
    except BaseException:
        RequestStates(packed, states, store).close()
        raise
    return RequestStates(packed, states, store)


@contextmanager
def embedded(model: BlockModel, requests: Sequence[Request]) -> Iterator[None]:
    """Inside the `with` block, what lies before the first block is on the device for the tokens of all requests.

    Raises:
        InputError: the model does not know a token, or weights hold NaN or Inf, or cannot be read any more.
    """
    # A token that is predicted and not read is looked up nowhere, so that nothing else would refuse it.
    largest = max((max(max(request.read), max(request.targets)) for request in requests), default=0)
    check_token(largest, model.vocabulary)
    tables = tables_of(model)
    # Rows are padded with token 0.
    with tables.embeddings({0}.union(*(request.read for request in requests))) if tables else model.outside():
        yield


@torch.no_grad()
def run_through(
    model: BlockModel,
    states: RequestStates,
    room: Room,
    begin: int = 0,
    after_block: Callable[[int], None] = lambda blocks: None,
) -> None:
    """Run requests through the blocks of a model, each of which is read once.

    Args:
        model: the model.
        states: the requests, at the input of block `begin`; behind the last block afterwards.
        room: what is held at once, and where.
        begin: number of the first block to run.
        after_block: called after every block with the number of blocks that are finished.

    Raises:
        InputError: weights or activations hold NaN or Inf.
    """
    for i in range(begin, len(model.blocks)):
        # A rank may have no requests.
        if states.states:
            model.open(i, room.ahead)
            states.advance(i)
            model.close(i)
        after_block(i + 1)
