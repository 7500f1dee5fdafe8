"""The blocks that a run has finished: their records, the time that is left, and the writing beside the next block."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sparsefw.checkpoint.files import convert
from sparsefw.checkpoint.writer import Writer
from sparsefw.driver.job import Run
from sparsefw.memory import give_back, peak_memory, release_pinned
from sparsefw.report import log
from sparsefw.report.content import BlockRecord
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import WRITE

# Is called with a finished block and the results of its layers.
OnBlock = Callable[[BlockRecord, list[LayerResult]], None]

# Tensors of a block on the host by method, then by their names in the checkpoint.
Written = dict[str, dict[str, Tensor]]


@dataclass
class FinishedBlock:
    """What a run that goes on has to know of a block, on the disk with it.

    Attributes:
        block: its name, seconds and memory.
        layers: a result for each layer and method.
        kept_dense: names of the matrices that the method whose weights are written left dense.
    """

    block: BlockRecord
    layers: list[LayerResult] = field(default_factory=list)
    kept_dense: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, i: int, name: str, way: str = "") -> "FinishedBlock":
        """Block i, of which nothing is measured yet."""
        return cls(BlockRecord(i, name, way, {}, 0, 0))


@dataclass(frozen=True)
class Outcome:
    """Measurements of a run.

    Attributes:
        finished: the blocks. Those that an earlier run finished are as that run measured them.
        unused: names of the matrices in blocks that the model does not run through.
        perplexity: by evaluation text, then by "dense" and by method; empty without evaluation.
    """

    finished: list[FinishedBlock]
    unused: list[str]
    perplexity: dict[str, dict[str, float]]


class Finished:
    """The finished blocks of a run. Inside its `with` block they are written while the next ones are worked on.

    Args:
        run: what all blocks share.
        writer: what writes them; has those that an earlier run has finished.
        on_block: called with every block.

    Attributes:
        blocks: the finished ones, of a repeated one the first.
        before, left: numbers of the blocks that were finished before this run, and of the others.
        first, last: numbers of the first and of the last block in which layers are pruned.
    """

    def __init__(self, run: Run, writer: Writer, on_block: OnBlock) -> None:
        self._run, self._writer, self._on_block = run, writer, on_block
        unique, count = run.model.unique_blocks, len(run.model.blocks)
        self._done = len(writer.finished)
        records = writer.finished[: len(unique)]
        self.blocks = [convert(FinishedBlock, record, "the record of a finished block: ") for record in records]
        # Repeats are not written. Those before the next block that is can be run.
        begin = [*unique, count][len(self.blocks)]
        self.before, self.left = range(begin), range(begin, count)
        pruned = [i for i in range(count) if run.selected(i)] or [0]
        self.first, self.last = pruned[0], pruned[-1]
        self._started = time.perf_counter()
        self._background = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def __enter__(self) -> "Finished":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._run.model.timeline.span("wait"):
                    self._wait()
        finally:
            self._background.shutdown()

    def is_written_here(self, i: int) -> bool:
        """Whether this rank writes block i."""
        return i in self._run.model.unique_blocks and self._writer.writes(self._run.model.unique_blocks.index(i))

    def tell_again(self, i: int) -> None:
        """Report block i, which was finished before this run."""
        model = self._run.model
        self._run.say(log.block_row(model.names[i], i + 1, len(model.blocks)))
        found = FinishedBlock.of(i, model.names[i])
        if i in model.unique_blocks:
            found = self.blocks[model.unique_blocks.index(i)]
        self._on_block(found.block, found.layers)
        self._started = time.perf_counter()

    def add(self, i: int, found: FinishedBlock, tensors: Written) -> None:
        """Report block i, and begin to write it.

        Args:
            i: its number.
            found: its record.
            tensors: its tensors, none if another rank writes it. They leave memory when they are written.
        """
        run, model, ranks = self._run, self._run.model, self._run.ranks
        self._say(i, found)
        if i not in model.unique_blocks:
            self._on_block(found.block, found.layers)
            return
        written_here = self.is_written_here(i)
        with model.timeline.span("wait", i):
            if written_here:
                self._wait()
        peaks = ranks.gather(peak_memory())
        measured: dict[str, Any] = {name: max(peak[name] for peak in peaks) for name in peaks[0]}
        found.block = replace(found.block, seconds=model.timeline.seconds(i), **measured)
        # Each rank writes some of the records. All are those of rank 0, which reports runs that go through.
        found = ranks.broadcast_object(found)
        if written_here:
            cuda = model.device.type == "cuda"
            copied = torch.cuda.current_stream(model.device).record_event() if cuda else None
            self._written = self._background.submit(self._write, i, tensors, found, copied)
            if not run.placement.ahead:
                self._wait()
        self.blocks.append(found)
        self._on_block(found.block, found.layers)

    def write_the_rest(self) -> None:
        """Write the tensors outside of the blocks, piece by piece."""
        model, writer = self._run.model, self._writer
        release_pinned()
        for shard, names in enumerate(model.pieces, len(model.unique_blocks)):
            if shard >= self._done and writer.writes(shard):
                with model.timeline.span("write"):
                    writer.write(shard, model.other_tensors(names))
                # Tensors that are small enough for the C library to keep would lie beside the next ones.
                give_back()

    def _say(self, i: int, found: FinishedBlock) -> None:
        """Log block i with the time that is left. Blocks that are only passed take little."""
        first = max(self.first, self.left.start)
        if i < first:
            # The clock begins with the first block that is pruned.
            self._started, left = time.perf_counter(), 0.0
        else:
            left = max(0.0, (self.last - i) * (time.perf_counter() - self._started) / (i + 1 - first))
        model = self._run.model
        self._run.say(log.block_row(model.names[i], i + 1, len(model.blocks), left, found.block.reconstruction))

    def _wait(self) -> None:
        if self._written:
            self._written.result()

    def _write(self, i: int, tensors: Written, found: FinishedBlock, copied: torch.cuda.Event | None) -> None:
        """Write a block as each method pruned it. The tensors of the config's method belong to the checkpoint.

        They are on the host once they are `copied`.
        """
        run = self._run
        with run.model.timeline.span("write", i, WRITE):
            if copied:
                copied.synchronize()
            compared = {method: tensors[method] for method in run.config.compare}
            shard = run.model.unique_blocks.index(i)
            self._writer.write(shard, tensors[run.config.method], asdict(found), compared)
