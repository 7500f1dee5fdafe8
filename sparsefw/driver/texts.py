"""The texts of a run: calibration and evaluation windows. One rank reads them, or the dense model generates them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sparsefw import memory
from sparsefw.checkpoint.writer import Writer
from sparsefw.data import windows
from sparsefw.data.batches import BATCHES
from sparsefw.data.text import OWN_TEXT
from sparsefw.data.tokens import Tokenizer, load_tokenizer
from sparsefw.data.windows import Generate, Samples, Windows, WindowStream
from sparsefw.driver import generation
from sparsefw.driver.job import Job, limits_of, workload_of
from sparsefw.errors import InputError, option
from sparsefw.estimate.placement import generation_batch, place
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import pruned_shape
from sparsefw.model.block_model import BlockModel


@dataclass(frozen=True)
class Texts:
    """The texts of a run.

    Attributes:
        calibration: the calibration windows, or the batches of a caller.
        evaluation: the windows of each evaluation text.
        seqlen: tokens in a window.
        stream: the windows that follow the calibration windows; None: there are batches, or several ranks.
        generated: number of windows that the model generates in one batch; 0: it generates no text.
    """

    calibration: Samples
    evaluation: Sequence[Samples]
    seqlen: int
    stream: WindowStream | None = None
    generated: int = 0


def read_texts(job: Job, model: BlockModel, whole: ModelShape) -> tuple[Job, Texts]:
    """Read the texts of a run.

    Args:
        job: the run.
        model: the dense model, which may generate the calibration text.
        whole: the shape of the model, with all prunable layers.

    Returns:
        The job with the defaults that depend on the calibration, and the texts.

    Raises:
        InputError: a text cannot be read or is too short, or memory is too little.
    """
    seqlen = windows.window_length(job.inputs.model, job.inputs.seqlen, model.max_seqlen)
    job = with_defaults(job, job.inputs.nsamples, seqlen)
    shape = pruned_shape(whole, job.config)
    _check_memory(job, shape, seqlen, model)
    if seqlen < job.inputs.seqlen:
        job.say(f"seqlen: {seqlen} tokens, the model's maximum (asked for {job.inputs.seqlen})")
    generate, batch = own_text(job, model, whole, seqlen)
    calibration, evaluation, stream = job.ranks.on_first(lambda: _read(job, seqlen, generate))
    return job, Texts(calibration, evaluation, seqlen, stream, batch)


def with_defaults(job: Job, count: int, tokens: int) -> Job:
    """Set the defaults of a job's config that depend on the calibration: `count` windows of `tokens` tokens each."""
    ranks = job.ranks.count
    if count < ranks:
        named = "calibration" if job.inputs.dataset == (BATCHES,) else "nsamples"
        raise InputError(f"{option(named)}: {count} for {ranks} ranks; give at least one for each rank")
    config = job.config.for_calibration(count, tokens, ranks)
    if job.config.reconstruct and not config.reconstruct:
        job.say("note: no block is reconstructed: every rank needs two calibration windows, one of them held out")
    return replace(job, config=config)


def _check_memory(job: Job, shape: ModelShape, seqlen: int, model: BlockModel) -> None:
    """Refuse a run that does not fit into memory, as its plan would, before the texts are read, which may take long.

    The check is made only if there is a single rank, since flags of several ranks may differ, and if the numbers of
    windows are known.

    Raises:
        InputError: memory is too little.
    """
    inputs, texts = job.inputs, len(dict.fromkeys(job.inputs.evaluate))
    if job.ranks.alone and job.dataset is None and (inputs.eval_windows or not texts):
        counts = [inputs.nsamples, *texts * [inputs.eval_windows or 0]]
        place(shape, workload_of(job, counts, seqlen, model), limits_of(job, model))


def own_text(job: Job, model: BlockModel, shape: ModelShape, seqlen: int) -> tuple[Generate, int]:
    """Make a function with which the dense model generates calibration text, and choose how many windows a batch has.

    In a resumed run the function returns the text of the unfinished run. Without `--dataset self` the result is
    (None, 0).

    Raises:
        InputError: the model does not fit into memory with a single window.
    """
    inputs, output = job.inputs, job.output
    name = inputs.own
    if name is None:
        return None, 0
    limits = limits_of(job, model)
    batch = generation_batch(shape, workload_of(job, [inputs.nsamples], seqlen, model), limits, inputs)

    def generate(tokenizer: Tokenizer, seqlen: int, n: int) -> Windows:
        path = Writer(output.folder, 0).folder / OWN_TEXT
        source = f"{name} (T={generation.TEMPERATURE:g}, top_p={generation.TOP_P:g}, seed {inputs.seed})"
        ids = generation.tokens_in(path) if job.begun and path.exists() else None
        if ids is None or ids.shape != (n, seqlen):
            with memory.gpu_limited(limits, output.gpu_memory):
                ids = generation.write_tokens(model, tokenizer, n, seqlen, inputs.seed, batch, job.say, name)
            memory.trim_memory()
        return replace(windows.windows_of(ids, source), own=generation.records_of(tokenizer, ids))

    return generate, batch


def stream_of(job: Job, tokenizer: Tokenizer | None, seqlen: int, generate: Generate) -> WindowStream:
    """Make the stream of a job's calibration windows.

    Args:
        job: the job.
        tokenizer: the model's tokenizer; None: the calibration data are token ids.
        seqlen: tokens in a window.
        generate: lets the model generate calibration text; None: the run does not use such text.

    Raises:
        InputError: the token ids are no windows of the model's length.
    """
    inputs, dataset = job.inputs, job.dataset
    texts: Any = inputs.shares if dataset is None else dataset
    if isinstance(dataset, Tensor):
        texts = given = windows.windows_of(dataset, inputs.dataset[0])
        if given.seqlen > seqlen:
            raise InputError(f"{given.source}: windows of {given.seqlen} tokens, but the model takes at most {seqlen}")
    return WindowStream(tokenizer, texts, inputs.nsamples, seqlen, inputs.seed, generate, job.say)


def tokenizer_of(job: Job) -> Tokenizer | None:
    """Return the tokenizer that a job's texts need; None: there is no text, only token ids."""
    if isinstance(job.dataset, Tensor) and not job.inputs.evaluate:
        return None
    if job.tokenizer is not None:
        return job.tokenizer
    assert job.folder is not None
    return load_tokenizer(job.folder)


def _read(job: Job, seqlen: int, generate: Generate) -> tuple[Windows, list[Windows], WindowStream | None]:
    """Read and tokenize the texts of a run: the calibration windows, those of each evaluation text, and the stream."""
    inputs, tokenizer = job.inputs, tokenizer_of(job)
    stream = stream_of(job, tokenizer, seqlen, generate)
    # Evaluation texts are read first: an error in them should not come after a model has generated text, which is slow.
    evaluation = [
        windows.evaluation_windows(tokenizer, name, seqlen=seqlen, limit=inputs.eval_windows)
        for name in dict.fromkeys(inputs.evaluate)
        if tokenizer
    ]
    calibration = stream.take(stream.nsamples)
    # Other ranks get what this function returns, and a stream cannot be sent.
    return calibration, evaluation, stream if job.ranks.alone else None
