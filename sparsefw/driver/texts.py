"""The texts of a run as tokens: windows to calibrate and evaluate on, and the questions of tasks."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparsefw import data, process
from sparsefw.checkpoint import Checkpoint
from sparsefw.data import Tokenizer, Windows
from sparsefw.driver.job import CheckpointJob
from sparsefw.driver.tasks import encoded_questions
from sparsefw.errors import InputError
from sparsefw.evaluation.encoding import Encoded

if TYPE_CHECKING:
    from sparsefw.evaluation.harness import Questions


@dataclass(frozen=True)
class Tokenized:
    """The texts of a run.

    Attributes:
        calibration: the calibration windows.
        evaluation: the windows of each evaluation text.
        encoded: the questions of tasks; None without tasks.
        tokenizer: bytes that the tokenizer's own process has taken.
    """

    calibration: Windows
    evaluation: list[Windows]
    encoded: Encoded | None
    tokenizer: int


def tokenized_texts(
    job: CheckpointJob, source: Checkpoint, questions: "Questions | None", seqlen: int, limit: int
) -> Tokenized:
    """Read and tokenize the texts of a run in `limit` bytes of host memory.

    Args:
        job: the run.
        source: the checkpoint.
        questions: the questions of tasks.
        seqlen: tokens in a window.
        limit: bytes that this process and that of the tokenizer may take.

    Raises:
        InputError: a text cannot be read or is too short, or the tokenizer cannot take it.
    """
    inputs = job.inputs
    tokens = data.windows_of(job.dataset, inputs.dataset[0]) if isinstance(job.dataset, Tensor) else None
    if tokens is not None and tokens.seqlen > seqlen:
        raise InputError(f"{tokens.source}: windows of {tokens.seqlen} tokens, and the model takes {seqlen} at most")
    if tokens is not None and not inputs.evaluate and questions is None:
        # Nothing has to be tokenized.
        return Tokenized(tokens, [], None, 0)
    if job.tokenizer:
        return _tokenized(job, source, questions, seqlen, tokens, job.tokenizer, limit)
    with data.TokenizerProcess(job.folder, limit - process.resident()) as tokenizer:
        found = _tokenized(job, source, questions, seqlen, tokens, tokenizer, limit - tokenizer.nbytes())
        return replace(found, tokenizer=tokenizer.nbytes())


def _tokenized(
    job: CheckpointJob,
    source: Checkpoint,
    questions: "Questions | None",
    seqlen: int,
    tokens: Windows | None,
    tokenizer: Tokenizer,
    limit: int,
) -> Tokenized:
    calibration, evaluation = _windows(job, seqlen, tokens, tokenizer, limit)
    encoded = None if questions is None else encoded_questions(questions, source, tokenizer)
    return Tokenized(calibration, evaluation, encoded, 0)


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
