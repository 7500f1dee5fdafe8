"""Answer requests with a checkpoint of which one block is in memory at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sparsefw import checkpoint, process
from sparsefw.errors import InputError, counted
from sparsefw.estimate import MemoryNeeds, memory_limits
from sparsefw.evaluation.packing import Sharing, row_sizes
from sparsefw.evaluation.request import Request, Score
from sparsefw.evaluation.room import Room, Work, room_for
from sparsefw.evaluation.saved import Saved, can_be_saved
from sparsefw.evaluation.scoring import slice_rows, tables_of
from sparsefw.evaluation.shares import gathered, shares_of
from sparsefw.evaluation.streaming import Packed, RequestStates, embed_requests, embedded, pack_for, run_through
from sparsefw.flags import checked_number, set_field
from sparsefw.model import ModelShape, StreamedModel, shape_of
from sparsefw.ranks import ALONE, Ranks

# The line of the log says this for each kind of row.
SHARED = {
    Sharing.NOTHING: "none shared, as this model's blocks look at whole rows",
    Sharing.BEGINNINGS: "only whole requests shared, as this model's blocks take no trees",
    Sharing.BRANCHES: "beginnings shared",
}


@dataclass(frozen=True)
class Budget:
    """Memory limits, and the place of what does not fit.

    Attributes:
        gpu_memory, host_memory: in GiB; None: what is free, less a tenth.
        folder: folder for hidden states in a file; None: that of the system for temporary files.

    Raises:
        InputError: a limit is no number, or out of range.
    """

    gpu_memory: float | None = None
    host_memory: float | None = None
    folder: Path | None = None

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "host_memory"):
            if (value := getattr(self, name)) is not None:
                set_field(self, name, checked_number(name, value, 0, process.MOST_MEMORY))


def scores_of(
    folder: Path,
    requests: Sequence[Request],
    budget: Budget,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: bool = False,
    ranks: Ranks = ALONE,
    saved: Saved | None = None,
    number: int = 0,
) -> list[Score]:
    """The answers of a checkpoint.

    Args:
        folder: folder of the checkpoint.
        requests: the requests.
        budget: memory limits.
        say: called with every line of the log.
        progress: whether to show a progress bar.
        ranks: the processes that share the work; all of them have the same requests, and get all answers.
        saved: what an interrupted pass has finished; None: it is not looked for, and nothing is saved.
        number: number of the model there.

    Raises:
        InputError: something that the user gave is wrong; the message names it.
    """
    if saved and (answers := saved.answers(number, len(requests))) is not None:
        say(f"model: {folder}: all answers are there")
        return answers
    tokens = saved.tokens(number) if saved else None
    with _opened(folder, requests, budget, ranks, say, tokens) as opened:
        states = opened.embed()
        try:
            scores = _run(opened, states, progress, ranks, saved, number, say)
        finally:
            states.close()
        ranks.barrier()
        blocks, dtype = len(opened.model.blocks), opened.dtype
    answers = gathered(scores, requests, ranks)
    if none := sum(math.isnan(answer.loglikelihood) for answer in answers):
        raise InputError(
            f"{folder}: the log-likelihoods of {none} of {len(answers)} requests are NaN, as behind the last block "
            f"numbers are too large for {dtype}; it is of no use"
        )
    if saved:
        saved.add_answers(number, blocks, answers)
    return answers


def plan_of(
    folder: Path, requests: Sequence[Request], budget: Budget, say: Callable[[str], None], ranks: Ranks = ALONE
) -> None:
    """Say what `scores_of` would compute and take; of the weights, the embeddings and a block of each kind are read.

    Raises:
        InputError: as `scores_of`.
    """
    with _opened(folder, requests, budget, ranks, say) as opened:
        shape = opened.shape
        nbytes = sum(block.nbytes for block in shape.blocks) + shape.outside
        say(
            f"plan: {nbytes / 1e9:.2f} GB of weights are read, once; "
            f"{opened.packed.tokens} tokens go through each block"
        )


@dataclass(frozen=True)
class _Opened:
    """A model, and the requests of this rank, before the first block.

    Attributes:
        model: the model.
        shape: its shape.
        dtype: the dtype of its checkpoint.
        packed: the requests.
        room: what is held at once, and where.
        embeddings: holds the embeddings until it is closed.
    """

    model: StreamedModel
    shape: ModelShape
    dtype: torch.dtype
    packed: Packed
    room: Room
    embeddings: ExitStack

    def embed(self) -> RequestStates:
        """Embed the requests, and let the embeddings go. The caller closes the hidden states."""
        with self.embeddings:
            return embed_requests(self.model, self.packed, self.room)


@contextmanager
def _opened(
    folder: Path,
    requests: Sequence[Request],
    budget: Budget,
    ranks: Ranks,
    say: Callable[[str], None],
    tokens: int | None = None,
) -> Iterator[_Opened]:
    """Open a checkpoint, pack the requests of this rank as it allows, and place them; `tokens` as for `room_for`.

    Inside the `with` block memory is limited, and there are no gradients.

    Raises:
        InputError: the checkpoint cannot be read or run, or memory has no room for the requests.
    """
    # Otherwise what the model before has left counts as taken.
    process.give_back()
    device = process.this_device()
    limits = memory_limits(budget.gpu_memory, budget.host_memory, device, ranks)
    source = checkpoint.inspect(folder)
    shape = shape_of(source)
    mine = [requests[n] for n in shares_of(requests, ranks)[ranks.number]]
    with StreamedModel(source, device) as model, process.gpu_limited(limits.get("gpu")), torch.no_grad():
        say(f"model: {folder}, {counted(len(model.blocks), 'block')}, {source.dtype}")
        before = process.resident(), process.held_on_gpu(device)
        with ExitStack() as embeddings:
            embeddings.enter_context(embedded(model, mine))
            packed = pack_for(model, mine)
            work = work_of(model, shape, packed, before)
            room, needs = room_for(work, limits, budget.folder, ranks.here, tokens)
            say(requests_line(packed, sum(len(request.read) for request in mine)))
            say(memory_line(room, needs, limits))
            yield _Opened(model, shape, source.dtype, packed, room, embeddings)


def requests_line(packed: Packed, tokens: int) -> str:
    """The line of the log on what is computed."""
    rows = sum(len(group.rows) for group in packed.groups)
    return (
        f"requests: {len(packed.requests)} with {tokens} tokens, computed as {rows} rows with {packed.tokens}: "
        f"{SHARED[packed.sharing]}"
    )


def memory_line(room: Room, needs: MemoryNeeds, limits: dict[str, int]) -> str:
    """The line of the log on memory."""
    peaks = [f"{getattr(needs, what) / 2**30:.2f} of {n / 2**30:.2f} GiB ({what})" for what, n in limits.items()]
    where = "" if "gpu" not in limits and room.place == "host" else f"; hidden states: {room.place}"
    ahead = "" if room.ahead else "; nothing read ahead"
    return f"memory: {', '.join(peaks)} expected at the peak; {room.tokens} tokens at a time{where}{ahead}"


def work_of(model: StreamedModel, shape: ModelShape, packed: Packed, before: tuple[int, int]) -> Work:
    """The sizes that the memory of a pass depends on; `before` are the bytes of host and GPU that the process had."""
    tables, gpu = tables_of(model), model.device.type == "cuda"
    rows = slice_rows(model, tables)
    embeddings = head = shape.outside
    if tables:
        others = shape.outside - tables.nbytes
        read = len({0}.union(*(request.read for request in packed.requests)))
        embeddings = others + (tables.embedding_bytes if gpu else tables.bytes_of_rows(read))
        head = others + 2 * rows * tables.row_bytes
    positions = tuple(
        sum(len({*answers}) for row in group.rows for answers in row.answers.values()) for group in packed.groups
    )
    return Work(
        shape=shape,
        groups=row_sizes(packed.groups),
        positions=positions,
        targets=sum(len(request.targets) for request in packed.requests),
        embeddings=embeddings,
        head=head,
        vocabulary=rows,
        gpu=gpu,
        threads=torch.get_num_threads(),
        process=before[0],
        held=before[1],
    )


def _run(
    opened: _Opened,
    states: RequestStates,
    progress: bool,
    ranks: Ranks,
    saved: Saved | None,
    number: int,
    say: Callable[[str], None],
) -> list[Score]:
    """Run all requests through the blocks, from where an interrupted pass has come to."""
    model, room = opened.model, opened.room
    count, begin = len(model.blocks), saved.blocks(number) if saved else 0
    if saved and begin:
        say(f"going on with an unfinished evaluation: {begin} of {count} blocks are done")
        saved.restore(states)
    # A rank without requests could save them in any case.
    if saved and not all(ranks.gather(can_be_saved(states))):
        say("note: an interruption costs the whole pass of this model, whose blocks hand on more than hidden states")
        saved = None
    with tqdm(total=count, initial=begin, unit="block", disable=None if progress and ranks.first else True) as bar:

        def after_block(blocks: int) -> None:
            bar.update()
            if saved and blocks < count:
                saved.after_block(number, blocks, states, room.tokens)

        run_through(model, states, room, begin, after_block)
    return states.scores()
