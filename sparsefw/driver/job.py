"""A run that is asked for, the texts that it reads, and what it prunes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
from sparsefw.inputs import Inputs, Output
from sparsefw.model import ModelShape
from sparsefw.model.block_model import BlockModel
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
    """

    inputs: Inputs
    config: PruneConfig
    output: Output
    dataset: Iterable[Any] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A model before its first block, and what runs through it.

    Attributes:
        model: the model.
        name, dtype: its name and dtype, for the log.
        shape: its shape, with all prunable layers.
        calibration: the windows that it is calibrated on, or the batches of a caller.
        evaluation: those of each evaluation text.
        seqlen: tokens in a window; of batches, the most vectors of one between two blocks.
        notes: what the user should know of the model, one line each.
        fingerprint: tells the model from another one.
        files: on rank 0, what tells the checkpoint's files from changed ones; empty for a model in memory, of whose
            tensors the fingerprint is.
        fixed: values of `Placement` that are settled, by field.
        tokens: calibration tokens without padding; 0: all positions count.
        source: folder of the model's small files, whose card names its license; None: there is none.
        written: windows of its own calibration text that the model has written at once; 0: it is another's.
        saved: bytes that the end of the run writes while the finished blocks are still on the disk.
    """

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
    fixed: dict[str, int] = field(default_factory=dict)
    source: Path | None = None
    saved: int = 0
    tokens: int = 0
    written: int = 0


def windows_of_texts(
    job: Job, longest: int | None, write: Write, say: Callable[[str], None], ranks: Ranks
) -> tuple[Windows, list[Windows], int]:
    """Read and tokenize the texts of a run. One rank reads them, and all have the same tokens.

    Args:
        job, say, ranks: as for `run_job`.
        longest: tokens in the longest window that the model takes; None: not known.
        write: has the model write its own text; None: no text is.

    Returns:
        The calibration windows, the windows of each evaluation text, and the tokens in a window.

    Raises:
        InputError: a text cannot be read or is too short, or the tokenizer cannot take it.
    """
    inputs = job.inputs
    seqlen = windows.window_length(inputs.model, inputs.seqlen, longest)
    if seqlen < inputs.seqlen:
        say(f"seqlen: {seqlen} tokens, the model's maximum (asked for {inputs.seqlen})")
    return *ranks.on_first(lambda: _read(job, seqlen, write)), seqlen


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
