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
from sparsefw.estimate.memory import MemoryNeeds, Workload, process_bytes
from sparsefw.estimate.placement import memory_limits
from sparsefw.inputs import Inputs, Output
from sparsefw.model import ModelShape, Placement
from sparsefw.model.block_model import BlockModel
from sparsefw.model.shapes import BlockShape
from sparsefw.model.stages import Confirmed
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report.log import Progress
from sparsefw.solver.config import PruneConfig

# Whether a progress bar is shown, None: in a terminal alone; or what is called with every finished block.
Shown = bool | Callable[[Progress], None] | None

# Samples run through a model: windows of tokens, or a caller's batches.
Samples = Windows | Batches


@dataclass(frozen=True)
class Job:
    """A run that is asked for.

    Attributes:
        inputs: names of what is read.
        config: how the model is pruned.
        output: where the run writes.
        dataset: calibration data without a name: documents, or token ids (windows, seqlen); None: `inputs` names it.
        tokenizer: the model's tokenizer; None: the source's.
        folder: folder of the source, the checkpoint that is read; None: the model is in memory.
        say: called with every line of the log.
        progress: how progress is shown, see `log.progress_of`.
        ranks: the processes of the run, each with its share of the windows. All of them have the same job.
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
    begun: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run: what it reads, how it prunes, and what it holds where.

    Attributes:
        job: what is asked for; its config has the defaults that depend on the calibration.
        model: the model before its first block.
        name, dtype: its name and dtype, for the log.
        shape: its shape, with the layers that are pruned.
        calibration: the windows that it is calibrated on, or the batches of a caller.
        evaluation: those of each evaluation text.
        seqlen: tokens in a window; of batches, the most vectors of one between two blocks.
        notes: what the user should know of the model, one line each.
        fingerprint: tells the model from another one.
        files: on rank 0, what tells the checkpoint's files from changed ones; empty for a model in memory, of whose
            tensors the fingerprint is.
        source: folder of the model's small files, whose card names its license; None: there is none.
        limits: memory limits in bytes: "host", and with a GPU "gpu". These and the next are found by `run.settled`.
        placement, needs: what is held at once and where, and the memory that this is expected to take.
        disk: bytes that the run takes on the disk.
        rounded: whether steps of a reconstruction round the operands of their products.
        confirmed: what is known of running blocks in parts, see `stages.survey`.
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
    confirmed: Confirmed = field(default_factory=dict)

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
        """The shape of block i."""
        return self.shape.blocks[i]

    def selected(self, i: int) -> frozenset[str]:
        """Names inside block i of the layers that are pruned."""
        return frozenset(self.shape.names_by_block[i][1])


def limits_of(job: Job, device: torch.device) -> dict[str, int]:
    """The memory limits of a run in bytes: "host", and with a GPU "gpu"."""
    free = memory.free_memory(device, job.ranks.here)
    return memory_limits(job.output.gpu_memory, job.output.host_memory, free, job.ranks)


def workload_of(job: Job, windows: Sequence[int], seqlen: int, device: torch.device) -> Workload:
    """The work of a run with these numbers of windows, the calibration's first, then each evaluation text's.

    Of several ranks, with the memory of the one that has most.
    """
    # Memory that texts and shapes have freed can be taken again: it is no part of what the process keeps.
    memory.trim_memory()
    ranks, mine = job.ranks, (memory.resident(), memory.held_on_gpu(device))
    has, held = (max(sizes) for sizes in zip(*ranks.gather(mine), strict=True))
    if job.folder is not None and job.dataset is None:
        # The plan's figure for a process, which has less now.
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
