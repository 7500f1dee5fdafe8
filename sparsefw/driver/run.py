"""One run: a checkpoint in, a pruned checkpoint with its report out."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from tqdm import tqdm

from sparsefw import checkpoint, memory
from sparsefw.checkpoint import Writer
from sparsefw.checkpoint.files import durably
from sparsefw.data import Batches, Windows
from sparsefw.driver.block import Run
from sparsefw.driver.job import Job, Prepared
from sparsefw.driver.loop import Outcome, Samples, prune_model
from sparsefw.driver.reporting import report_of
from sparsefw.driver.texts import windows_of_texts
from sparsefw.errors import InputError, counted
from sparsefw.estimate import Workload, disk_space, memory_limits, place, pruned_shape
from sparsefw.flags import flag_of
from sparsefw.model import BlockModel, ModelShape, Placement, StreamedModel, shape_of
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report import Report, amount, html, log, machine
from sparsefw.solver import PruneConfig

# Inputs that are compared by their content, not by name, when a run goes on with what another has finished.
BY_CONTENT = {"model", "dataset", "evaluate"}


def run_job(job: Job, say: Callable[[str], None], progress: bool, ranks: Ranks = ALONE) -> Report:
    """Prune a checkpoint, evaluate it, write it and its report.

    Args:
        job: the run.
        say: called with every line of the log.
        progress: whether to show a progress bar.
        ranks: the processes that share the work; all of them have the same job.

    Raises:
        InputError: something that the user gave is wrong; the message names it.
        FloatingPointError: a layer's error is not finite.
    """
    assert job.folder is not None
    device = memory.this_device()
    say(kernel_line(job.config))
    checkpoint.check_output(job.output.folder, job.folder, job.output.overwrite, _files_read(job))
    source = checkpoint.inspect(job.folder)
    with StreamedModel(source, device) as model:
        samples, seqlen = windows_of_texts(job, model.max_seqlen, say, ranks)
        prepared = prepare(
            job, model, job.inputs.model, source.dtype, shape_of(source), samples, seqlen, say, ranks,
            notes=model.notes + checkpoint.note_of_others(source.folder),
            fingerprint=checkpoint.fingerprint(source),
            files=checkpoint.stamps(source) if ranks.first else {},
        )  # fmt: skip
        return carry_out(job, model, prepared, Writer.finish, say, progress, ranks)


def carry_out(
    job: Job,
    model: BlockModel,
    prepared: Prepared,
    finish: Callable[[Writer], None],
    say: Callable[[str], None],
    progress: bool,
    ranks: Ranks = ALONE,
) -> Report:
    """Prune a model that is ready for it, evaluate it, and write its report.

    Args:
        job: the run.
        model: the model.
        prepared: the run before its first block.
        finish: ends the writing: called when all blocks and the report are written.
        say, progress, ranks: as for `run_job`.

    Raises:
        InputError, FloatingPointError: as `run_job`.
    """
    limits, calibration = prepared.limits, prepared.calibration
    if calibration.n < ranks.count:
        raise InputError(f"--nsamples {calibration.n}: {ranks.count} ranks, and each needs a window")
    config = job.config.for_calibration(calibration.n, prepared.seqlen, ranks.count)
    if job.config.reconstruct and not config.reconstruct:
        say("note: no block is reconstructed: that takes two calibration windows on every rank, one to hold out")
    job, workload = replace(job, config=config), _workload(config, prepared, ranks)
    ranks.agree(_identity(job, prepared, ranks) | {"--output": str(job.output.folder.resolve())})
    find_place = partial(place, prepared.shape, workload, limits, job.output.folder.resolve().parent)
    placement, _ = find_place(fixed=prepared.fixed)
    chosen = {"batch": placement.batch, "solver": placement.solver}
    with _writer(job, model, prepared, chosen, ranks) as writer:
        if writer.finished:
            say(f"going on with an unfinished run: {len(writer.finished)} of {writer.shards} parts are there")
        placement, needs = find_place(fixed=prepared.fixed | writer.chosen)
        # The disk has a finished block as each method pruned it.
        written = len(config.methods) * writer.written
        needed = sum(disk_space(prepared.shape, workload, placement).values()) + prepared.saved
        writer.check_space(needed - written)
        of_batches = isinstance(calibration, Batches)
        say(log.placement_line(placement, needs, limits, of_batches))
        say(log.layer_header())
        outcome, placement = _prune(job, model, prepared, placement, writer, say, progress, ranks)
        # Times differ; all ranks return those of rank 0.
        report = ranks.broadcast_object(report_of(job, prepared, outcome, placement, needs, ranks))
        if ranks.first:
            texts = {"report.json": report.to_json(), "report.html": html.page(report)}
            for name, text in texts.items():
                durably(writer.folder / name, text)
        finish(writer)
    return report


def _prune(
    job: Job,
    model: BlockModel,
    prepared: Prepared,
    placement: Placement,
    writer: Writer,
    say: Callable[[str], None],
    progress: bool,
    ranks: Ranks,
) -> tuple[Outcome, Placement]:
    """Prune all blocks; on a GPU that is full, go on from the last finished block with half the windows at a time."""
    while True:
        run = Run(model, prepared.shape, job.config, job.config.backend, placement, say, ranks)
        bar = tqdm(total=len(model.blocks), unit="block", disable=None if progress else True)
        with bar, memory.gpu_limited(prepared.limits.get("gpu")):
            try:
                outcome = prune_model(run, prepared.calibration, prepared.evaluation, writer, bar.update)
                return outcome, placement
            except torch.OutOfMemoryError:
                # Other ranks would wait for this one; batches of a caller are not cut.
                if placement.batch == 1 or not ranks.alone:
                    raise
        # Outside of the handler, whose traceback holds the tensors of the block.
        for i in range(len(model.blocks)):
            model.close(i)
        placement = replace(placement, batch=placement.batch // 2)
        say(f"out of memory on the GPU: going on with {counted(placement.batch, 'window')} at a time")
        writer.choose({"batch": placement.batch, "solver": placement.solver})
        memory.give_back()


def kernel_line(config: PruneConfig) -> str:
    """The line of the log that says which kernel runs, and why."""
    return f"kernel: {config.kernel} ({_why(config)}), precision {config.precision}"


def _why(config: PruneConfig) -> str:
    cuda = torch.cuda.is_available()
    if config.kernel == "triton" and not cuda:
        return "as asked; no CUDA device, so Triton's interpreter: exact and slow"
    if "kernel" in config.given:
        return "as asked"
    return "CUDA is available" if cuda else "no CUDA device"


def _files_read(job: Job) -> list[Path]:
    """Files and folders here that the run reads beside the source: texts, the Hub's caches, temporary files."""
    inputs = job.inputs
    names = [*inputs.evaluate, *(inputs.shares if job.dataset is None else [])]
    texts = [Path(path) for path in map(os.path.expanduser, names) if os.path.lexists(path)]
    return [*texts, Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE), Path(tempfile.gettempdir())]


def prepare(
    job: Job,
    model: BlockModel,
    name: str,
    dtype: torch.dtype,
    whole: ModelShape,
    samples: tuple[Samples, Sequence[Samples]],
    seqlen: int,
    say: Callable[[str], None],
    ranks: Ranks,
    **others: Any,
) -> Prepared:
    """A run before its first block; the log says what it is.

    Args:
        job, say, ranks: as for `run_job`.
        model: the model.
        name, dtype: name and dtype of the model, for the log.
        whole: shape of the model with all prunable layers.
        samples: those that it is calibrated on, and of each evaluation text.
        seqlen: tokens in a window; of batches, the most vectors of one between two blocks.
        others: further fields of `Prepared`.
    """
    calibration, evaluation = samples
    for note in others["notes"]:
        say(f"note: {note}")
    say(f"model: {name}, {counted(len(model.unique_blocks), 'block')}, {dtype}")
    length, text = seqlen, ""
    if isinstance(calibration, Windows):
        length, text = calibration.seqlen, f" of {calibration.source}"
    say(f"calibration: {amount(calibration.source, calibration.n, length)}{text}")
    shape = pruned_shape(whole, job.config)
    say(log.sparsity_line(job.config, shape, whole))
    limits = memory_limits(job.output.gpu_memory, job.output.host_memory, model.device, ranks)
    return Prepared(model.device, calibration, evaluation, shape, seqlen, limits, **others)


def _workload(config: PruneConfig, prepared: Prepared, ranks: Ranks) -> Workload:
    """The work of a run with this config; of several ranks, with the memory of the one that has most."""
    # Memory that texts and shapes have freed can be taken again: it is no part of what the process keeps.
    memory.give_back()
    mine = memory.resident(), memory.held_on_gpu(prepared.device)
    has, held = (max(sizes) for sizes in zip(*ranks.gather(mine), strict=True))
    return Workload(
        windows=prepared.calibration.n,
        evaluation=tuple(samples.n for samples in prepared.evaluation),
        seqlen=prepared.seqlen,
        config=config,
        gpu=prepared.device.type == "cuda",
        threads=torch.get_num_threads() if config.kernel == "torch" else 1,
        process=has,
        held=held,
        ranks=ranks.count,
        ranks_here=ranks.here,
    )


def _writer(
    job: Job,
    model: BlockModel,
    prepared: Prepared,
    chosen: dict[str, int],
    ranks: Ranks,
) -> Writer:
    return Writer(
        job.output.folder,
        len(model.unique_blocks) + len(model.pieces),
        _identity(job, prepared, ranks) | {"the model's files": prepared.files},
        chosen,
        source=job.folder,
        overwrite=job.output.overwrite,
        restart=job.output.restart,
        ranks=ranks,
    )


def _identity(job: Job, prepared: Prepared, ranks: Ranks) -> dict[str, Any]:
    """Values that must be the same for a run to go on with what another has finished, by their names in messages."""
    values = asdict(job.inputs) | asdict(job.config)
    for name in ("include", "ignore"):
        # Their order makes no difference.
        values[name] = sorted(values[name])
    flags = {flag_of(name): value for name, value in values.items() if name not in BY_CONTENT}
    texts = {f"the text of --eval {samples.source}": samples.hash for samples in prepared.evaluation}
    model = {"the model": prepared.fingerprint, "the number of ranks": ranks.count}
    return flags | model | {"the calibration text": prepared.calibration.hash} | texts | machine(prepared.device)
