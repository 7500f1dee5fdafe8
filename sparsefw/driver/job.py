"""A run that is asked for, and the run that is settled."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sparsefw import memory
from sparsefw.data.batches import Batches
from sparsefw.data.windows import Windows
from sparsefw.estimate.memory import MemoryNeeds
from sparsefw.estimate.placement import memory_limits
from sparsefw.estimate.shapes import BlockShape, ModelShape
from sparsefw.estimate.workload import Workload, process_bytes
from sparsefw.inputs import Inputs, Output
from sparsefw.model import Placement
from sparsefw.model.block_model import BlockModel
from sparsefw.model.stages import SplitFailures
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report.content import Report
from sparsefw.report.log import Progress
from sparsefw.solver.config import PruneConfig

# Whether a progress bar is shown, None: in a terminal alone; or what is called with every finished block.
Shown = bool | Callable[[Progress], None] | None

# Samples run through a model: windows of tokens, or a caller's batches.
Samples = Windows | Batches

# Writes report.html and the model card. Takes the report, the output's folder, the source's folder, a function for
# lines of the log, and the folder to write to, which becomes the output's.
WritePages = Callable[[Report, Path, Path | None, Callable[[str], None], Path], None]


@dataclass(frozen=True)
class Job:
    """A run that the user asks for.

    Attributes:
        inputs: the model and the texts, by name.
        config: how the model is pruned.
        output: where the run writes.
        dataset: calibration data without a name: documents, or token ids (windows, seqlen); None: `inputs` names it.
        tokenizer: the model's tokenizer; None: the source's.
        folder: folder of the source, the checkpoint that is read; None: the model is in memory.
        say: called with every line of the log.
        progress: how progress is shown, see `log.progress_of`.
        ranks: the processes of the run, each with its share of the windows. All of them have the same job.
        given: the arguments that the user gave, by name, for the report.
        write_pages: writes the page and the model card; None: there are none.
        begun: identity and choices of the unfinished run that this one resumes, see `Writer.begun`.
    """

    inputs: Inputs
    config: PruneConfig
    output: Output
    dataset: Iterable[Any] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None
    say: Callable[[str], None] = print
    progress: Shown = None
    ranks: Ranks = ALONE
    given: dict[str, Any] = field(default_factory=dict)
    write_pages: WritePages | None = None
    begun: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run: its model, its windows, and the placement that it has settled.

    Attributes:
        job: the job; its config has the defaults that depend on the calibration.
        model: the model before its first block.
        name, dtype: the model's name and dtype, for the log.
        shape: the model's shape, with the layers that are pruned.
        calibration: the calibration windows, or the batches of a caller.
        evaluation: the windows of each evaluation text.
        seqlen: tokens in a window; with batches, the most vectors of a batch between two blocks.
        notes: lines about the model that the user should know.
        fingerprint: a digest of the model, by which a resumed run knows it.
        files: sizes and times of the checkpoint's files, by which rank 0 of a resumed run knows them; empty for a model
            in memory.
        source: folder of the model's small files, whose card names its license; None: the model has no folder.
        limits: memory limits in bytes: "host", and with a GPU "gpu". `run.settled` finds these and all that follow.
        placement, needs: the placement, and the memory that the run is expected to take with it.
        disk: bytes that the run takes on the disk.
        rounded: whether steps of a reconstruction round the operands of their products.
        confirmed: results of trials to run blocks in parts, see `stages.survey`.
    """

    job: Job
    model: BlockModel
    name: str
    dtype: torch.dtype
    shape: ModelShape
    calibration: Samples
    evaluation: Sequence[Samples]
    seqlen: int
    notes: list[str]
    fingerprint: str
    files: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None
    limits: dict[str, int] = field(default_factory=dict)
    placement: Placement = field(default_factory=partial(Placement, 1))
    needs: MemoryNeeds = field(default_factory=partial(MemoryNeeds, {}))
    disk: int = 0
    rounded: bool = False
    confirmed: SplitFailures = field(default_factory=dict)

    @property
    def config(self) -> PruneConfig:
        """How the model is pruned."""
        return self.job.config

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.job.ranks

    def say(self, line: str) -> None:
        """Log a line."""
        self.job.say(line)

    def of(self, i: int) -> BlockShape:
        """Return the shape of block i."""
        return self.shape.blocks[i]

    def selected(self, i: int) -> frozenset[str]:
        """Return the names, inside of block i, of the layers that are pruned."""
        return frozenset(self.shape.names_by_block[i][1])


def limits_of(job: Job, device: torch.device) -> dict[str, int]:
    """Find the memory limits of a run in bytes: "host", and with a GPU "gpu"."""
    free = memory.free_memory(device, job.ranks.here)
    return memory_limits(job.output.gpu_memory, job.output.host_memory, free, job.ranks)


def workload_of(job: Job, windows: Sequence[int], seqlen: int, device: torch.device) -> Workload:
    """Describe the work of a run to the planner.

    Args:
        job: the run.
        windows: numbers of windows: of the calibration, then of each evaluation text.
        seqlen: tokens in a window.
        device: the device; all ranks count the memory of the rank that has taken most.
    """
    # Memory that texts and shapes have freed does not count as the process's.
    memory.trim_memory()
    ranks, mine = job.ranks, (memory.resident(), memory.held_on_gpu(device))
    has, held = (max(sizes) for sizes in zip(*ranks.gather(mine), strict=True))
    if job.folder is not None and job.dataset is None:
        # At least the figure of a plan, which is for a process with all libraries loaded.
        has = max(has, process_bytes(job.inputs, windows[1:], seqlen, 0))
    return Workload(
        windows=-(-windows[0] // ranks.count),
        evaluation=tuple(-(-n // ranks.count) for n in windows[1:]),
        seqlen=seqlen,
        config=job.config,
        gpu=device.type == "cuda",
        process=has,
        held=held,
        ranks=ranks.count,
        ranks_here=ranks.here,
    )
