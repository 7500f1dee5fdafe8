"""A run that is asked for, the run that is settled, and the texts that it reads."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsefw.data import windows
from sparsefw.data.batches import Batches
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import Windows, Write
from sparsefw.errors import InputError
from sparsefw.estimate.memory import MemoryNeeds
from sparsefw.inputs import Inputs, Output
from sparsefw.model import ModelShape, Placement
from sparsefw.model.block_model import BlockModel
from sparsefw.model.shapes import BlockShape
from sparsefw.model.stages import Confirmed
from sparsefw.ranks import Ranks
from sparsefw.solver.config import PruneConfig

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
        begun: identity and choices of the unfinished run that this one goes on with, see `Writer.begun`.
    """

    inputs: Inputs
    config: PruneConfig
    output: Output
    dataset: Iterable[Any] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None
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
        say: called with every line of the log.
        ranks: the processes of the run, each with its share of the windows.
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
    say: Callable[[str], None]
    ranks: Ranks
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

    def of(self, i: int) -> BlockShape:
        """The shape of block i."""
        return self.shape.blocks[i]

    def selected(self, i: int) -> frozenset[str]:
        """Names inside block i of the layers that are pruned."""
        return frozenset(self.shape.names_by_block[i][1])


def windows_of_texts(
    job: Job, seqlen: int, write: Write, say: Callable[[str], None], ranks: Ranks
) -> tuple[Windows, list[Windows]]:
    """Read and tokenize the texts of a run. One rank reads them, and all have the same tokens.

    Args:
        job, say, ranks: as for `run_job`.
        seqlen: tokens in a window.
        write: has the model write its own text; None: no text is.

    Returns:
        The calibration windows, and the windows of each evaluation text.

    Raises:
        InputError: a text cannot be read or is too short, or the tokenizer cannot take it.
    """
    if seqlen < job.inputs.seqlen:
        say(f"seqlen: {seqlen} tokens, the model's maximum (asked for {job.inputs.seqlen})")
    return ranks.on_first(lambda: _read(job, seqlen, write))


def _read(job: Job, seqlen: int, write: Write) -> tuple[Windows, list[Windows]]:
    inputs, dataset = job.inputs, job.dataset
    if isinstance(dataset, Tensor):
        calibration = windows.windows_of(dataset, inputs.dataset[0])
        if calibration.seqlen > seqlen:
            raise InputError(
                f"{calibration.source}: windows of {calibration.seqlen} tokens, and the model takes {seqlen} at most"
            )
        if not inputs.evaluate:
            # Nothing has to be tokenized.
            return calibration, []
    tokenizer = job.tokenizer
    if tokenizer is None:
        assert job.folder is not None
        tokenizer = load_tokenizer(job.folder)
    # Before a model writes its own text, which takes long, the others are there.
    evaluation = [
        windows.evaluation_windows(tokenizer, name, seqlen=seqlen, limit=inputs.eval_windows)
        for name in dict.fromkeys(inputs.evaluate)
    ]
    drawn = dict(nsamples=inputs.nsamples, seqlen=seqlen, seed=inputs.seed)
    if dataset is None:
        calibration = windows.mixed_windows(tokenizer, inputs.shares, write, **drawn)
    elif not isinstance(dataset, Tensor):
        calibration = windows.calibration_windows(tokenizer, dataset, **drawn)
    return calibration, evaluation
