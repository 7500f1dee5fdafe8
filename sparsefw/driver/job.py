"""A run that is asked for, and what it is before its first block."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsefw.driver.loop import Samples
from sparsefw.inputs import Inputs, Output
from sparsefw.model import ModelShape
from sparsefw.solver import PruneConfig


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
    dataset: Sequence[str] | Tensor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Prepared:
    """A run before its first block.

    Attributes:
        device: device that the model runs on.
        calibration, evaluation: the windows, or the batches of a caller.
        shape: shape of the model, with the layers that are to be pruned.
        seqlen: tokens in a window; of batches, the most vectors of one between two blocks.
        limits: memory limits in bytes: "host", and with a GPU "gpu".
        notes: what the user should know of the model, one line each.
        fingerprint: tells the model from another one.
        files: what tells the checkpoint's files from changed ones; empty: the fingerprint is of all tensors in memory.
        fixed: values of `Placement` that are settled, by field.
        saved: bytes that the end of the run writes while the finished blocks are still on the disk.
    """

    device: torch.device
    calibration: Samples
    evaluation: Sequence[Samples]
    shape: ModelShape
    seqlen: int
    limits: dict[str, int]
    notes: list[str]
    fingerprint: str
    files: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    saved: int = 0
