"""A pass on disk, so that an interrupted one goes on after the last block whose hidden states were saved.

The folder is that of any unfinished run, see `checkpoint.resume`. Its parts are moments of the evaluation, in their
order: hidden states behind a block of a model, or all answers of a model. Only the last hidden states are kept.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from sparsefw.checkpoint import durably
from sparsefw.checkpoint.reader import read_into
from sparsefw.checkpoint.resume import Part, PartialFolder
from sparsefw.errors import InputError, naming
from sparsefw.evaluation.request import Score
from sparsefw.evaluation.streaming import RequestStates
from sparsefw.ranks import Ranks

# Seconds between two times of saving: at least so many, and so many times what saving has taken.
SECONDS, TIMES = 60.0, 10.0


@dataclass(frozen=True)
class Moment:
    """What is finished.

    Attributes:
        model: number of the model.
        blocks: number of its blocks that are finished.
        answers: its answers, (log-likelihood, greedy) each, if all blocks are; else None.
    """

    model: int
    blocks: int
    answers: list[tuple[float, bool]] | None = None


class Saved:
    """What is finished of an evaluation. Use it in a `with` statement, after which other runs may go on.

    Args:
        output: folder that the evaluation writes.
        identity: what makes the evaluation the same, see `PartialFolder.open`.
        restart: whether to discard what another run has finished.
        say: called with every line of the log.
        ranks: the ranks, each of which saves its own hidden states.

    Raises:
        InputError: as `PartialFolder.lock` and `PartialFolder.open`.
    """

    def __init__(
        self, output: Path, identity: dict[str, Any], restart: bool, say: Callable[[str], None], ranks: Ranks
    ) -> None:
        self._output, self._done = output, False
        self._partial, self._ranks = PartialFolder(output), ranks
        self._identity, self._restart, self._say = identity, restart, say
        self._last, self._interval = time.monotonic(), SECONDS

    def __enter__(self) -> "Saved":
        try:
            parts = self._ranks.one_does(self._open)
            if not self._ranks.first:
                self._partial.join(parts)
        except BaseException:
            self._partial.release()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._partial.release()
        if error and self._done:
            error.add_note(f"{self._output} is complete")
        elif error and self._partial.parts and not isinstance(error, InputError):
            # What is wrong with the input is wrong the next time, too.
            error.add_note("the same command goes on from what was saved")

    def _open(self) -> dict[int, Part]:
        self._partial.lock()
        self._partial.check_apart()
        self._partial.restore_output()
        self._partial.open(self._identity, restart=self._restart, say=self._say)
        self._partial.share()
        return self._partial.parts

    @property
    def moments(self) -> list[Moment]:
        """All that was recorded, in order."""
        return [_moment(part) for _, part in sorted(self._partial.parts.items())]

    def answers(self, model: int) -> list[Score] | None:
        """The answers of a model; None if they are not there yet."""
        found = [moment.answers for moment in self.moments if moment.model == model and moment.answers is not None]
        return [Score(*answer) for answer in found[0]] if found else None

    def blocks(self, model: int) -> int:
        """Number of the blocks of a model whose output is saved."""
        last = self.moments[-1:]
        return last[0].blocks if last and last[0].model == model and last[0].answers is None else 0

    def restore(self, states: RequestStates) -> None:
        """Load the hidden states that were saved last, in the place of others of the same form.

        Raises:
            InputError: they are damaged.
        """
        path, digest = self._path(), self._partial.parts[max(self._partial.parts)].kept
        # Opening a pipe would block for ever.
        if path.is_symlink() or not path.is_file():
            raise self._partial.damaged(path, "it is missing, or no file")
        found = xxhash.xxh3_128()
        try:
            with path.open("rb", buffering=0) as file:
                for of_group, j in _places(states):
                    hidden = torch.empty_like(of_group.hidden[j], device="cpu")
                    data = _bytes(hidden)
                    read_into(file, data)
                    found.update(data)
                    of_group.hidden[j] = hidden.to(of_group.model.device)
        except (OSError, InputError) as error:
            raise self._partial.damaged(path, "it cannot be read, or ends early") from error
        if found.hexdigest() != digest.get(path.name):
            raise self._partial.damaged(path)

    def after_block(self, model: int, blocks: int, states: RequestStates) -> None:
        """Save the hidden states behind a block, if the last time is long enough ago. All ranks call it.

        Args:
            model: number of the model.
            blocks: number of its blocks that are finished.
            states: the hidden states.
        """
        if not self._ranks.tell(time.monotonic() - self._last >= self._interval):
            return
        begin = time.monotonic()
        new = self._path(blocks)
        digests = self._ranks.gather((new.name, self._write(new, states)))
        if self._ranks.first:
            self._add(Moment(model, blocks), dict(digests))
        self._ranks.tell(None)
        self._last = time.monotonic()
        self._interval = max(SECONDS, TIMES * (self._last - begin))

    def add_answers(self, model: int, blocks: int, scores: Sequence[Score]) -> None:
        """Record the answers of a model, of which all blocks are finished. All ranks call it with all answers."""
        if self._ranks.first:
            self._add(Moment(model, blocks, [(score.loglikelihood, score.greedy) for score in scores]), {})
        self._ranks.tell(None)

    def finish(self, files: dict[str, str]) -> None:
        """Write the output: files by name, with their content. All ranks call it."""
        if not self._ranks.first:
            self._partial.release()
        self._ranks.wait()
        if self._ranks.first:
            for name, content in files.items():
                durably(self._partial.new / name, partial(Path.write_text, data=content, encoding="utf-8"))
            self._partial.move_into_place()
            self._done = True
            self._partial.remove()
        self._ranks.tell(None)

    def _add(self, moment: Moment, kept: dict[str, str]) -> None:
        note = {"model": moment.model, "blocks": moment.blocks, "answers": moment.answers}
        self._partial.add(len(self._partial.parts), Part([], 0, 0, "", kept, [], note))
        self._partial.remove_unknown({self._partial.kept(name.removesuffix(".safetensors")) for name in kept})

    def _path(self, blocks: int | None = None) -> Path:
        """Path of this rank's hidden states behind so many blocks; None: of those that were saved last."""
        count = self.moments[-1].blocks if blocks is None else blocks
        return self._partial.kept(f"states-{count:05d}-{self._ranks.number:05d}")

    def _write(self, path: Path, states: RequestStates) -> str:
        digest = xxhash.xxh3_128()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                for of_group, j in _places(states):
                    data = _bytes(of_group.hidden[j].cpu().contiguous())
                    file.write(data)
                    digest.update(data)

        path.parent.mkdir(exist_ok=True)
        with naming(path):
            durably(path, write)
        return digest.hexdigest()


def can_be_saved(states: RequestStates) -> bool:
    """Whether hidden states are all that blocks hand on."""
    flows = [of_group.flow for of_group in states.states]
    return not any(flow.has_steps or flow.end or any(flow.live.values()) for flow in flows)


def _moment(part: Part) -> Moment:
    return Moment(part.note["model"], part.note["blocks"], part.note["answers"])


def _places(states: RequestStates) -> Iterator[tuple[Any, int]]:
    return ((of_group, j) for of_group in states.states for j in range(len(of_group)))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
