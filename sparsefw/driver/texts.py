"""The texts of a run as tokens: windows to calibrate and evaluate on."""

from collections.abc import Callable

from torch import Tensor

from sparsefw import data
from sparsefw.data import Windows
from sparsefw.driver.job import Job
from sparsefw.errors import InputError
from sparsefw.ranks import Ranks


def windows_of_texts(
    job: Job, longest: int | None, say: Callable[[str], None], ranks: Ranks
) -> tuple[tuple[Windows, list[Windows]], int]:
    """Read and tokenize the texts of a run. One rank reads them, and all have the same tokens.

    Args:
        job, say, ranks: as for `run_job`.
        longest: tokens in the longest window that the model takes; None: not known.

    Returns:
        The calibration windows with the windows of each evaluation text, and the tokens in a window.

    Raises:
        InputError: a text cannot be read or is too short, or the tokenizer cannot take it.
    """
    inputs = job.inputs
    seqlen = data.window_length(inputs.model, inputs.seqlen, longest)
    if seqlen < inputs.seqlen:
        say(f"seqlen: {seqlen} tokens, the model's maximum (asked for {inputs.seqlen})")
    return ranks.on_first(lambda: _read(job, seqlen)), seqlen


def _read(job: Job, seqlen: int) -> tuple[Windows, list[Windows]]:
    inputs, dataset = job.inputs, job.dataset
    if isinstance(dataset, Tensor):
        calibration = data.windows_of(dataset, inputs.dataset[0])
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
        tokenizer = data.load_tokenizer(job.folder)
    nsamples, seed = inputs.nsamples, inputs.seed
    if dataset is None:
        calibration = data.mixed_windows(tokenizer, inputs.shares, nsamples=nsamples, seqlen=seqlen, seed=seed)
    elif not isinstance(dataset, Tensor):
        calibration = data.calibration_windows(tokenizer, dataset, nsamples=nsamples, seqlen=seqlen, seed=seed)
    return calibration, [
        data.evaluation_windows(tokenizer, name, seqlen=seqlen, limit=inputs.eval_windows)
        for name in dict.fromkeys(inputs.evaluate)
    ]
