"""A pass on disk, so that an interrupted one goes on after the last block whose hidden states were saved.

The folder is that of any unfinished run, see `checkpoint.resume`. Its parts are moments of the evaluation, in their
order: hidden states behind a block of a model, or all answers of a model. Only the last hidden states are kept.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from sparsefw.checkpoint import check_free, durably
from sparsefw.checkpoint.files import convert
from sparsefw.checkpoint.reader import read_into
from sparsefw.checkpoint.resume import Part, PartialFolder
from sparsefw.errors import InputError, naming
from sparsefw.evaluation.request import Score
from sparsefw.evaluation.streaming import RequestStates
from sparsefw.model.placement import BATCH_TOKENS
from sparsefw.ranks import Ranks

# The file that an evaluation writes, and what shows that a folder is an older output.
RESULT = "evaluation.json"
KIND = (RESULT,), "an evaluation"

# Seconds between two times of saving: at least so many, and so many times what saving has taken.
SECONDS, TIMES = 60.0, 10.0

# The dtypes that hidden states may have, by their names in a record.
DTYPES = {
    str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype) and dtype.is_floating_point
}
# Dimensions of hidden states at most.
DIMENSIONS = 16

# Name of the dtype, and shape, of a micro-batch.
Form = tuple[str, list[int]]


@dataclass(frozen=True)
class Moment:
    """A step of the evaluation that is finished: hidden states behind a block, or all answers of a model.

    Attributes:
        model: number of the model.
        blocks: number of its blocks that are finished.
        answers: its answers, (log-likelihood, greedy) each, if all blocks are; else None.
        tokens: by rank, most tokens in a micro-batch of the hidden states that are saved, as in `Room`.
        forms: by rank, group and micro-batch, the form of the hidden states that are saved.
    """

    model: int
    blocks: int
    answers: list[tuple[float, bool]] | None = None
    tokens: list[int] = field(default_factory=list)
    forms: list[list[list[Form]]] = field(default_factory=list)


class Saved:
    """The finished part of an evaluation, on disk. Use it in a `with` statement, after which other runs may go on.

    Args:
        output: folder that the evaluation writes.
        identity: what makes the evaluation the same, see `PartialFolder.open`.
        restart: whether to discard what another run has finished.
        say: called with every line of the log.
        ranks: the ranks, each of which saves its own hidden states.
        overwrite: whether an older evaluation may be replaced.

    Raises:
        InputError: as `PartialFolder.lock` and `PartialFolder.open`.
    """

    def __init__(
        self,
        output: Path,
        identity: dict[str, Any],
        restart: bool,
        say: Callable[[str], None],
        ranks: Ranks,
        overwrite: bool = False,
    ) -> None:
        # The folder that a link points to is replaced, not the link. An unfinished run must lie on the same disk.
        self._output, self._overwrite, self._done = output.resolve(), overwrite, False
        self._partial, self._ranks = PartialFolder(self._output), ranks
        self._identity, self._restart, self._say = identity, restart, say
        self._last, self._interval = time.monotonic(), SECONDS
        self._moments: list[Moment] = []

    def __enter__(self) -> "Saved":
        try:
            parts = self._ranks.on_first(self._open)
            if not self._ranks.first:
                self._partial.join(parts)
            self._moments = [self._moment(n) for n in sorted(parts)]
        except BaseException:
            self._partial.release()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._partial.release()
        if error and self._done:
            error.add_note(f"{self._output} is complete")
        elif error and self._partial.parts and not isinstance(error, InputError):
            # A mistake in the input ends the next run, too.
            error.add_note("the same command goes on from what was saved")

    def _open(self) -> dict[int, Part]:
        self._partial.lock()
        self._partial.check_apart()
        self._partial.restore_output()
        self._partial.open(self._identity, restart=self._restart, say=self._say)
        self._partial.share()
        return self._partial.parts

    def _moment(self, n: int) -> Moment:
        """The moment of a part on disk.

        Raises:
            InputError: it is none that these ranks can have recorded.
        """
        records = self._partial.folder / "records"
        try:
            moment = convert(Moment, self._partial.parts[n].note, f"part {n + 1}: ")
        except InputError as error:
            raise self._partial.damaged(records, str(error)) from error
        if moment.answers is None and not self._is_possible(moment):
            raise self._partial.damaged(records, f"part {n + 1}: it is not what an evaluation by these ranks records")
        return moment

    def _is_possible(self, moment: Moment) -> bool:
        """Whether these ranks can have saved such hidden states."""
        forms = [form for of_rank in moment.forms for of_group in of_rank for form in of_group]
        return (
            0 < moment.blocks < 2**31
            and len(moment.tokens) == len(moment.forms) == self._ranks.count
            and all(0 < tokens <= max(BATCH_TOKENS.values()) for tokens in moment.tokens)
            and all(dtype in DTYPES and len(shape) <= DIMENSIONS for dtype, shape in forms)
            and all(size > 0 for _, shape in forms for size in shape)
        )

    def answers(self, model: int, count: int) -> list[Score] | None:
        """The answers of a model to `count` requests; None if they are not there yet.

        Raises:
            InputError: there are more or fewer.
        """
        found = [moment.answers for moment in self._moments if moment.model == model and moment.answers is not None]
        if found and len(found[0]) != count:
            how = f"{len(found[0])} answers of a model to {count} requests"
            raise self._partial.damaged(self._partial.folder / "records", how)
        return [Score(*answer) for answer in found[0]] if found else None

    def blocks(self, model: int) -> int:
        """Number of the blocks of a model whose output is saved."""
        last = self._states_of(model)
        return last.blocks if last else 0

    def tokens(self, model: int) -> int | None:
        """Most tokens in a micro-batch of this rank's hidden states of a model; None if none are saved."""
        last = self._states_of(model)
        return last.tokens[self._ranks.number] if last else None

    def _states_of(self, model: int) -> Moment | None:
        """The last moment, if it is hidden states of this model."""
        last = self._moments[-1] if self._moments else None
        return last if last and last.model == model and last.answers is None else None

    def restore(self, states: RequestStates) -> None:
        """Put the hidden states that were saved last in the place of those of the same requests before a block.

        Args:
            states: the requests, in micro-batches of as many tokens as `tokens` says.

        Raises:
            InputError: they are damaged.
        """
        last, digests = self._moments[-1], self._partial.parts[max(self._partial.parts)].kept
        path, forms = self._path(last.blocks), last.forms[self._ranks.number]
        # Opening a pipe would block for ever.
        if path.is_symlink() or not path.is_file():
            raise self._partial.damaged(path, "it is missing, or no file")
        if any(last.blocks >= len(of_group.model.blocks) for of_group in states.states):
            raise self._partial.damaged(path, "it is of a model with more blocks")
        if [*map(len, forms)] != [*map(len, states.states)]:
            raise self._partial.damaged(path, "it holds other micro-batches than those of the requests")
        try:
            file = path.open("rb", buffering=0)
        except OSError as error:
            raise self._partial.damaged(path, "it cannot be read") from error
        found = xxhash.xxh3_128()
        with file:
            # A record that was forged must not make this allocate more than there is on the disk.
            if os.fstat(file.fileno()).st_size != sum(_nbytes(form) for of_group in forms for form in of_group):
                raise self._partial.damaged(path, "it has more or fewer bytes than were written")
            for of_group, its in zip(states.states, forms, strict=True):
                of_group.replace(x.to(of_group.model.device) for x in self._read(file, path, its, found))
        if found.hexdigest() != digests.get(path.name):
            raise self._partial.damaged(path)

    def _read(self, file: FileIO, path: Path, forms: Sequence[Form], digest: xxhash.xxh3_128) -> Iterator[Tensor]:
        for dtype, shape in forms:
            hidden = torch.empty(shape, dtype=DTYPES[dtype])
            data = _bytes(hidden)
            try:
                read_into(file, data)
            except (OSError, InputError) as error:
                raise self._partial.damaged(path, "it cannot be read, or ends early") from error
            digest.update(data)
            yield hidden

    def after_block(self, model: int, blocks: int, states: RequestStates, tokens: int) -> None:
        """Save the hidden states behind a block, if the last time is long enough ago. All ranks call it, at long work.

        Args:
            model: number of the model.
            blocks: number of its blocks that are finished.
            states: the hidden states.
            tokens: most tokens in a micro-batch of this rank, as in `Room`.
        """
        self._ranks.barrier()
        if not self._ranks.broadcast_object(time.monotonic() - self._last >= self._interval):
            return
        begin = time.monotonic()
        new = self._path(blocks)
        digest, forms = self._write(new, states)
        names, digests, sizes, all_forms = zip(*self._ranks.gather((new.name, digest, tokens, forms)), strict=True)
        if self._ranks.first:
            moment = Moment(model, blocks, tokens=[*sizes], forms=[*all_forms])
            self._add(moment, dict(zip(names, digests, strict=True)))
        self._ranks.broadcast_object(None)
        self._last = time.monotonic()
        self._interval = max(SECONDS, TIMES * (self._last - begin))

    def add_answers(self, model: int, blocks: int, scores: Sequence[Score]) -> None:
        """Record the answers of a model, of which all blocks are finished. All ranks call it with all answers."""
        if self._ranks.first:
            self._add(Moment(model, blocks, [(score.loglikelihood, score.greedy) for score in scores]), {})
        self._ranks.broadcast_object(None)

    def finish(self, files: dict[str, str]) -> None:
        """Write the output: files by name, with their content. All ranks call it.

        Raises:
            InputError: something that may not be replaced came to lie there meanwhile.
        """
        if not self._ranks.first:
            self._partial.release()
        self._ranks.barrier()
        if self._ranks.first:
            for name, content in files.items():
                durably(self._partial.new / name, partial(Path.write_text, data=content, encoding="utf-8"))
            check_free(self._output, self._overwrite, KIND)
            check_nothing_else(self._output)
            self._partial.move_into_place(self._partial.new)
            self._done = True
            self._partial.remove()
        self._ranks.broadcast_object(None)

    def _add(self, moment: Moment, kept: dict[str, str]) -> None:
        self._partial.add(len(self._partial.parts), Part([], 0, 0, "", kept, [], asdict(moment)))
        self._moments.append(moment)
        self._partial.remove_unknown({self._partial.kept(name.removesuffix(".safetensors")) for name in kept})

    def _path(self, blocks: int) -> Path:
        """Path of this rank's hidden states behind so many blocks."""
        return self._partial.kept(f"states-{blocks:05d}-{self._ranks.number:05d}")

    def _write(self, path: Path, states: RequestStates) -> tuple[str, list[list[Form]]]:
        """Write hidden states; returns the digest of their bytes, and their forms by group and micro-batch."""
        digest = xxhash.xxh3_128()
        forms: list[list[Form]] = [[] for _ in states.states]

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for of_group, its in zip(states.states, forms, strict=True):
                    for hidden in of_group.hidden:
                        its.append((str(hidden.dtype), [*hidden.shape]))
                        data = _bytes(hidden.cpu().contiguous())
                        file.write(data)
                        digest.update(data)

        path.parent.mkdir(exist_ok=True)
        with naming(path):
            durably(path, write)
        return digest.hexdigest(), forms


def check_nothing_else(output: Path) -> None:
    """Refuse an output folder that holds more than an evaluation.

    Raises:
        InputError: it does.
    """
    others = sorted(path.name for path in output.iterdir() if path.name != RESULT) if output.is_dir() else []
    if others:
        raise InputError(
            f"{output}: holds {others[0]}, too, so --overwrite will not remove it; choose another --output"
        )


def can_be_saved(states: RequestStates) -> bool:
    """Whether hidden states are all that blocks hand on: no tensors, and none in an object that all are given."""
    flows = [of_group.flow for of_group in states.states]
    boxes = any(of_group.carried[0].boxes for of_group in states.states)
    return not boxes and not any(flow.has_steps or flow.end or any(flow.live.values()) for flow in flows)


def _nbytes(form: Form) -> int:
    dtype, shape = form
    return prod(shape) * DTYPES[dtype].itemsize


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
