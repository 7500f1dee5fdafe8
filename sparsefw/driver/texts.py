"""The texts of a run as tokens: windows to calibrate and evaluate on."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsefw import data, process
from sparsefw.data import Tokenizer, Windows
from sparsefw.driver.job import CheckpointJob
from sparsefw.errors import InputError


@dataclass(frozen=True)
class Tokenized:
    """The texts of a run.

    Attributes:
        calibration: the calibration windows.
        evaluation: the windows of each evaluation text.
        tokenizer: bytes that the tokenizer's own process has taken.
    """

    calibration: Windows
    evaluation: list[Windows]
    tokenizer: int


def tokenized_texts(job: CheckpointJob, seqlen: int, limit: int) -> Tokenized:
    """Read and tokenize the texts of a run in `limit` bytes of host memory.

    Args:
        job: the run.
        seqlen: tokens in a window.
        limit: bytes that this process and that of the tokenizer may take.

    Raises:
        InputError: a text cannot be read or is too short, or the tokenizer cannot take it.
    """
    inputs = job.inputs
    tokens = data.windows_of(job.dataset, inputs.dataset[0]) if isinstance(job.dataset, Tensor) else None
    if tokens is not None and tokens.seqlen > seqlen:
        raise InputError(f"{tokens.source}: windows of {tokens.seqlen} tokens, and the model takes {seqlen} at most")
    if tokens is not None and not inputs.evaluate:
        # Nothing has to be tokenized.
        return Tokenized(tokens, [], 0)
    if job.tokenizer:
        return Tokenized(*_windows(job, seqlen, tokens, job.tokenizer, limit), 0)
    with data.TokenizerProcess(job.folder, limit - process.resident()) as tokenizer:
        windows = _windows(job, seqlen, tokens, tokenizer, limit - tokenizer.nbytes())
        return Tokenized(*windows, tokenizer.nbytes())


def _windows(
    job: CheckpointJob, seqlen: int, tokens: Windows | None, tokenizer: Tokenizer, limit: int
) -> tuple[Windows, list[Windows]]:
    inputs = job.inputs
    if tokens is None:
        size: dict[str, Any] = dict(
            nsamples=inputs.nsamples, seqlen=seqlen, seed=inputs.seed, room=limit - process.resident()
        )
        if job.dataset is None:
            tokens = data.mixed_windows(tokenizer, inputs.shares, **size)
        else:
            assert not isinstance(job.dataset, Tensor)
            tokens = data.calibration_windows(tokenizer, job.dataset, **size)
    return tokens, [
        data.evaluation_windows(
            tokenizer, name, seqlen=seqlen, limit=inputs.eval_windows, room=limit - process.resident()
        )
        for name in dict.fromkeys(inputs.evaluate)
    ]
