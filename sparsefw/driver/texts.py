"""The texts of a run: calibration and evaluation windows. One rank reads them, or the dense model generates them."""

from dataclasses import replace

from torch import Tensor

from sparsefw import memory
from sparsefw.checkpoint.writer import Writer
from sparsefw.data import windows
from sparsefw.data.text import OWN_TEXT, SELF
from sparsefw.data.tokens import Tokenizer, load_tokenizer
from sparsefw.data.windows import Generate, Windows
from sparsefw.driver import generation
from sparsefw.driver.job import Job, limits_of, workload_of
from sparsefw.errors import InputError, option
from sparsefw.estimate.placement import generation_batch, place
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import pruned_shape
from sparsefw.model.block_model import BlockModel


def read_texts(job: Job, model: BlockModel, whole: ModelShape) -> tuple[Job, Windows, list[Windows], int, int]:
    """Read the texts of a run.

    Args:
        job: the run.
        model: the dense model, which may generate the calibration text.
        whole: the shape of the model, with all prunable layers.

    Returns:
        The job with the defaults that depend on the calibration; the calibration windows; the windows of each
        evaluation text; the tokens in a window; and the number of windows that the model generates in one batch, or 0
        if it generates no text.

    Raises:
        InputError: a text cannot be read or is too short, or memory is too little.
    """
    seqlen = windows.window_length(job.inputs.model, job.inputs.seqlen, model.max_seqlen)
    count = len(job.dataset) if isinstance(job.dataset, Tensor) else job.inputs.nsamples
    job = with_defaults(job, count, seqlen)
    shape = pruned_shape(whole, job.config)
    _check_memory(job, shape, seqlen, model)
    generate, batch = own_text(job, model, whole, seqlen)
    return job, *windows_of_texts(job, seqlen, generate), seqlen, batch


def with_defaults(job: Job, count: int, tokens: int) -> Job:
    """Set the defaults of a job's config that depend on the calibration: `count` windows of `tokens` tokens each."""
    ranks = job.ranks.count
    if count < ranks:
        raise InputError(f"{option('nsamples', count)}: expected at least {ranks}, a window for each rank")
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
        place(shape, workload_of(job, counts, seqlen, model.device), limits_of(job, model.device))


def own_text(job: Job, model: BlockModel, shape: ModelShape, seqlen: int) -> tuple[Generate, int]:
    """Make a function with which the dense model generates calibration text, and choose how many windows a batch has.

    In a resumed run the function returns the text of the unfinished run. Without `--dataset self` the result is
    (None, 0).

    Raises:
        InputError: the model does not fit into memory with a single window.
    """
    inputs, output = job.inputs, job.output
    if job.dataset is not None or SELF not in inputs.shares:
        return None, 0
    limits = limits_of(job, model.device)
    batch = generation_batch(shape, workload_of(job, [inputs.nsamples], seqlen, model.device), limits, inputs)

    def generate(tokenizer: Tokenizer, seqlen: int, n: int) -> Windows:
        path, source = Writer(output.folder, 0).folder / OWN_TEXT, generation.own_source(inputs.seed)
        ids = generation.tokens_in(path) if job.begun and path.exists() else None
        if ids is None or ids.shape != (n, seqlen):
            with memory.gpu_limited(limits.get("gpu"), output.gpu_memory is not None):
                ids = generation.write_tokens(model, tokenizer, n, seqlen, inputs.seed, batch, job.say)
            memory.trim_memory()
        return replace(windows.windows_of(ids, source), own=generation.records_of(tokenizer, ids))

    return generate, batch


def windows_of_texts(job: Job, seqlen: int, generate: Generate) -> tuple[Windows, list[Windows]]:
    """Read and tokenize the texts of a run on one rank, and send the tokens to all ranks.

    Args:
        job: the run.
        seqlen: tokens in a window.
        generate: lets the model generate calibration text; None: the run does not use such text.

    Returns:
        The calibration windows, and the windows of each evaluation text.

    Raises:
        InputError: a text cannot be read or tokenized, or is too short.
    """
    if seqlen < job.inputs.seqlen:
        job.say(f"seqlen: {seqlen} tokens, the model's maximum (asked for {job.inputs.seqlen})")
    return job.ranks.on_first(lambda: _read(job, seqlen, generate))


def _read(job: Job, seqlen: int, generate: Generate) -> tuple[Windows, list[Windows]]:
    inputs, dataset = job.inputs, job.dataset
    if isinstance(dataset, Tensor):
        calibration = windows.windows_of(dataset, inputs.dataset[0])
        if calibration.seqlen > seqlen:
            raise InputError(
                f"{calibration.source}: windows of {calibration.seqlen} tokens, but the model takes at most {seqlen}"
            )
        if not inputs.evaluate:
            # There is no text to tokenize.
            return calibration, []
    tokenizer = job.tokenizer
    if tokenizer is None:
        assert job.folder is not None
        tokenizer = load_tokenizer(job.folder)
    # Evaluation texts are read first: an error in them should not come after a model has generated text, which is slow.
    evaluation = [
        windows.evaluation_windows(tokenizer, name, seqlen=seqlen, limit=inputs.eval_windows)
        for name in dict.fromkeys(inputs.evaluate)
    ]
    drawn = dict(nsamples=inputs.nsamples, seqlen=seqlen, seed=inputs.seed)
    if dataset is None:
        calibration = windows.mixed_windows(tokenizer, inputs.shares, generate, **drawn)
    elif not isinstance(dataset, Tensor):
        calibration = windows.calibration_windows(tokenizer, dataset, **drawn)
    return calibration, evaluation
