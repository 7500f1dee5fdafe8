"""Job: a run as the user asks for it. Run: the same run with its model, its windows and its placement in memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sparsefw import memory
from sparsefw.data.windows import Samples, WindowStream
from sparsefw.errors import Say
from sparsefw.estimate.memory import MemoryNeeds
from sparsefw.estimate.placement import RecoveryPlan, memory_limits
from sparsefw.estimate.shapes import BlockShape, ModelShape
from sparsefw.estimate.workload import Workload, process_bytes
from sparsefw.inputs import Inputs, Output
from sparsefw.memory import Limits
from sparsefw.model.activations import Placement
from sparsefw.model.block_model import BlockModel
from sparsefw.model.stages import SplitFailures
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report.content import Report
from sparsefw.report.log import Shown
from sparsefw.solver.config import PruneConfig

# Writes report.html and the model card. Arguments: the report, the output's folder, the source's folder, a function
# that logs a line, and the folder to write to, which is later moved to the output's folder.
WritePages = Callable[[Report, Path, Path | None, Say, Path], None]


@dataclass(frozen=True)
class Job:
    """A run that the user asks for.

    Attributes:
        inputs: the model and the texts, by name.
        config: how the model is pruned.
        output: where the run writes.
        dataset: calibration data from the caller: documents, or token ids (windows, seqlen); None: `inputs` names the
            calibration data.
        tokenizer: the model's tokenizer from the caller; None: `folder` has the tokenizer.
        folder: folder of the checkpoint that is read; None: the model is in memory.
        say: called with every line of the log.
        progress: how progress is shown, see `log.progress_of`.
        ranks: the processes of the run. All have the same job, and each has its share of the windows.
        given: the arguments that the user gave, by name, for the report.
        write_pages: writes report.html and the model card; None: neither is written.
        begun: identity and choices of the unfinished run that this run resumes, see `Writer.begun`; empty if it resumes
            no run.
    """

    inputs: Inputs
    config: PruneConfig
    output: Output
    dataset: Iterable[Any] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None
    say: Say = print
    progress: Shown = None
    ranks: Ranks = ALONE
    given: dict[str, Any] = field(default_factory=dict)
    write_pages: WritePages | None = None
    begun: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run: a job with its model, its windows, and its placement in memory.

    Attributes:
        job: the job; its config has the defaults that depend on the calibration.
        model: the model, which runs one block at a time.
        name, dtype: the model's name and dtype, for the log.
        shape: the model's shape, which lists the layers to prune.
        calibration: the calibration windows, or the batches of a caller.
        evaluation: the windows of each evaluation text.
        seqlen: tokens in a window; with batches, the largest number of hidden-state vectors of a batch.
        notes: lines about the model for the log and the report.
        fingerprint: digest of the model. A resumed run must have a model with the same digest.
        stream: the windows that follow the calibration windows; None: the calibration uses batches, or there are
            several ranks.
        generated: number of windows that the model generates in one batch; 0: it generates no text.
        files: sizes and times of the checkpoint's files, which a resumed run compares; empty for a model in memory, and
            on all ranks but the first.
        source: folder with the model's config, tokenizer and model card; None: the model has no folder.
        limits: memory limits in bytes: "host", and with a GPU "gpu". `run.settled` sets them, and the attributes from
            `placement` to `rounded`.
        placement, needs: the placement, and the memory that the run is expected to take with this placement.
        recovery: the plan of the recovery.
        disk: bytes that the run takes on the disk.
        rounded: whether steps of reconstructions and of a recovery round the operands of their products.
        split_failures: why blocks cannot run in parts, as trials have shown so far, see `stages.survey`.
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
    stream: WindowStream | None = None
    generated: int = 0
    files: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None
    limits: Limits = field(default_factory=dict)
    placement: Placement = field(default_factory=partial(Placement, 1))
    needs: MemoryNeeds = field(default_factory=partial(MemoryNeeds, {}))
    recovery: RecoveryPlan = field(default_factory=RecoveryPlan)
    disk: int = 0
    rounded: bool = False
    split_failures: SplitFailures = field(default_factory=dict)

    @property
    def config(self) -> PruneConfig:
        """Return the config: how the model is pruned."""
        return self.job.config

    @property
    def ranks(self) -> Ranks:
        """Return the processes of the run."""
        return self.job.ranks

    def say(self, line: str) -> None:
        """Log a line."""
        self.job.say(line)

    def of(self, i: int) -> BlockShape:
        """Return the shape of block i."""
        return self.shape.blocks[i]

    def selected(self, i: int) -> frozenset[str]:
        """Return the names of the layers to prune in block i, without the block's name."""
        return frozenset(self.shape.names_by_block[i][1])

    @property
    def first(self) -> int:
        """Return the number of the first block with layers to prune."""
        return next(filter(self.selected, range(len(self.model.blocks))))


def limits_of(job: Job, model: BlockModel) -> Limits:
    """Find the memory limits of a run in bytes: "host", and with a GPU "gpu"."""
    free = memory.free_memory(model.device, job.ranks.here)
    return memory_limits(job.output.gpu_memory, job.output.host_memory, free, job.ranks)


def workload_of(job: Job, windows: Sequence[int], seqlen: int, model: BlockModel) -> Workload:
    """Describe the work of a run to the planner. All ranks plan with the memory of the rank that holds most.

    Args:
        job: the run.
        windows: numbers of windows: of the calibration, then of each evaluation text.
        seqlen: tokens in a window.
        model: the model, on the device that this rank works on.
    """
    # Returns freed memory to the system, so that it does not count as memory of this process.
    memory.trim_memory()
    ranks, sizes_here = job.ranks, (memory.resident(), memory.held_on_gpu(model.device))
    has, held = (max(sizes) for sizes in zip(*ranks.gather(sizes_here), strict=True))
    if job.folder is not None and job.dataset is None:
        # Counts at least what a plan counts: a process with all libraries loaded.
        has = max(has, process_bytes(job.inputs, windows[1:], seqlen, 0))
    return Workload(
        windows=-(-windows[0] // ranks.count),
        evaluation=tuple(-(-n // ranks.count) for n in windows[1:]),
        seqlen=seqlen,
        config=job.config,
        gpu=model.device.type == "cuda",
        process=has,
        held=held,
        ranks=ranks.count,
        ranks_here=ranks.here,
    )
