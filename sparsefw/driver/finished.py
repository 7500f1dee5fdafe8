"""The finished blocks of a run: their records, the time left for other blocks, and a thread that writes them."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sparsefw.checkpoint.files import convert
from sparsefw.checkpoint.tensors import Tensors
from sparsefw.checkpoint.writer import Writer
from sparsefw.driver.job import Run
from sparsefw.memory import highest, on_gpu, peak_memory, release_pinned, trim_memory
from sparsefw.report import log
from sparsefw.report.content import BlockRecord
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import WRITE

# Tensors of a block on the host, by method and then by their names in the checkpoint.
TensorsByMethod = dict[str, Tensors]


@dataclass
class FinishedBlock:
    """Record of a finished block. It is written with the block's tensors, so that a resumed run can report it.

    Attributes:
        block: name, seconds and memory.
        layers: a result for each layer and method.
        kept_dense: names of the matrices that the config's method left dense.
    """

    block: BlockRecord
    layers: list[LayerResult] = field(default_factory=list)
    kept_dense: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, i: int, name: str, calibration_mode: str = "") -> "FinishedBlock":
        """Make the record of block i, without measurements yet."""
        return cls(BlockRecord(i, name, calibration_mode, {}, 0, 0))


@dataclass(frozen=True)
class Outcome:
    """The measurements of a run.

    Attributes:
        finished: the records of all blocks. The first ones may be from the unfinished run that this run resumes.
        unused: names of the matrices in blocks that the model's forward never runs.
        perplexity: perplexity by evaluation text, then by "dense" and by method; empty without evaluation.
    """

    finished: list[FinishedBlock]
    unused: list[str]
    perplexity: dict[str, dict[str, float]]


class Finished:
    """The finished blocks of a run. Inside its `with` block a thread writes them while the next block is pruned.

    Args:
        run: the run.
        writer: writes the blocks, and lists the blocks that an unfinished run has written.
        on_block: called with every finished block.

    Attributes:
        blocks: the records of the finished blocks. A block that repeats an earlier one has no record.
        before, left: numbers of the blocks that an unfinished run has finished, and of the blocks that are left.
        first, last: numbers of the first and of the last block in which layers are pruned.
    """

    def __init__(self, run: Run, writer: Writer, on_block: log.OnBlock) -> None:
        self._run, self._writer, self._on_block = run, writer, on_block
        unique, count = run.model.unique_blocks, len(run.model.blocks)
        self._done = len(writer.finished)
        records = writer.finished[: len(unique)]
        self.blocks = [convert(FinishedBlock, record, "the record of a finished block: ") for record in records]
        # Repeats of blocks are not written. Repeats that follow the last finished block count as finished.
        begin = [*unique, count][len(self.blocks)]
        self.before, self.left = range(begin), range(begin, count)
        pruned = [*filter(run.selected, range(count))] or [0]
        self.first, self.last = pruned[0], pruned[-1]
        self._started = time.perf_counter()
        self._background = ThreadPoolExecutor(1)
        self._written: Future[None] | None = None

    def __enter__(self) -> "Finished":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                with self._run.model.timeline.span("wait"):
                    self._wait()
        finally:
            self._background.shutdown()

    def is_written_here(self, i: int) -> bool:
        """Tell whether this rank writes block i."""
        return i in self._run.model.unique_blocks and self._writer.writes(self._run.model.unique_blocks.index(i))

    def report_again(self, i: int) -> None:
        """Report block i, which an unfinished run has finished."""
        model = self._run.model
        self._run.say(log.block_row(model.names, i))
        found = FinishedBlock.of(i, model.names[i])
        if i in model.unique_blocks:
            found = self.blocks[model.unique_blocks.index(i)]
        self._on_block(found.block, found.layers)
        self._started = time.perf_counter()

    def add(self, i: int, found: FinishedBlock, tensors: TensorsByMethod) -> None:
        """Report block i, and begin to write it.

        Args:
            i: number of the block.
            found: the block's record.
            tensors: the block's tensors, freed once they are written; empty if another rank writes them.
        """
        run, model, ranks = self._run, self._run.model, self._run.ranks
        self._say(i, found)
        if i in model.unique_blocks:
            with model.timeline.span("wait", i):
                if tensors:
                    self._wait()
            measured: dict[str, Any] = highest(*ranks.gather(peak_memory()))
            found.block = replace(found.block, seconds=model.timeline.seconds(i), **measured)
            # Each rank writes some of the records. All of them have rank 0's values, since rank 0 makes the report.
            found = ranks.broadcast_object(found)
            if tensors:
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
                # Without this, the C library keeps the memory of freed small tensors while it allocates the next ones.
                trim_memory()

    def _say(self, i: int, found: FinishedBlock) -> None:
        """Log block i with the time left. Blocks before the first and after the last pruned one do not count."""
        first = max(self.first, self.left.start)
        if i < first:
            # The clock starts at the first block in which layers are pruned.
            self._started, left = time.perf_counter(), 0.0
        else:
            left = max(0.0, (self.last - i) * (time.perf_counter() - self._started) / (i + 1 - first))
        model = self._run.model
        self._run.say(log.block_row(model.names, i, left, found.block.reconstruction))

    def _wait(self) -> None:
        if self._written:
            self._written.result()

    def _write(self, i: int, tensors: TensorsByMethod, found: FinishedBlock, copied: torch.cuda.Event | None) -> None:
        """Write a block as each method has pruned it. Only the tensors of the config's method are in the checkpoint.

        On a GPU, the event `copied` tells when all tensors have reached the host.
        """
        run = self._run
        with run.model.timeline.span("write", i, WRITE):
            if copied:
                # A new thread would begin on the first GPU, and take some of its memory.
                with on_gpu(run.model.device):
                    copied.synchronize()
            compared = {method: tensors[method] for method in run.config.compare}
            shard = run.model.unique_blocks.index(i)
            self._writer.write(shard, tensors[run.config.method], asdict(found), compared)
