"""One run: a checkpoint in, a pruned checkpoint with its report out."""

import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial

import torch

from sparsefw import arithmetic, memory
from sparsefw.checkpoint.files import check_output, durably
from sparsefw.checkpoint.source import fingerprint, inspect, note_of_others, sample, stamps
from sparsefw.checkpoint.writer import Describe, Writer
from sparsefw.data.batches import Batches
from sparsefw.data.text import OWN_TEXT
from sparsefw.data.windows import Windows
from sparsefw.driver.finished import Outcome
from sparsefw.driver.job import Job, Run, limits_of, workload_of
from sparsefw.driver.prune import prune_model
from sparsefw.driver.recovery import pruned_report, recover, settle_recovery
from sparsefw.driver.resume import computes_in_fp32, identity, resumed, rounds_products
from sparsefw.driver.texts import read_texts
from sparsefw.errors import counted, fitted
from sparsefw.estimate.memory import disk_space, memory_needs
from sparsefw.estimate.placement import place
from sparsefw.estimate.profile import shape_of
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.steps import reconstruction_line, reconstruction_steps
from sparsefw.estimate.workload import pruned_shape
from sparsefw.model.streamed import StreamedModel
from sparsefw.report import content, log
from sparsefw.timeline import MAIN


def run_job(job: Job) -> content.Report:
    """Prune a checkpoint, evaluate the result, and write it with its report.

    Raises:
        InputError: an input is wrong; the message names it.
        FloatingPointError: a layer's error is not finite.
    """
    assert job.folder is not None
    check_output(job.output.folder, job.folder, job.output.overwrite, job.inputs.paths)
    source, device, job = inspect(job.folder), memory.this_device(), resumed(job)
    if not job.ranks.alone:
        # Each machine may have a folder of its own.
        job.ranks.agree({"the digest of the model's weights": sample(source)})
    in_fp32 = job.ranks.on_first(lambda: computes_in_fp32(job, source.dtype, device))
    with StreamedModel(source, device, in_fp32=in_fp32) as model:
        whole = shape_of(source, in_fp32)
        job, texts = read_texts(job, model, whole)
        run = Run(
            job,
            model,
            job.inputs.model,
            source.dtype,
            whole,
            **vars(texts),
            notes=model.notes + note_of_others(source.folder),
            fingerprint=fingerprint(source),
            files=stamps(source) if job.ranks.first else {},
            source=job.folder,
        )
        return carry_out(settled(run), Writer.finish)


def settled(run: Run, saved: int = 0) -> Run:
    """Settle the arithmetic and the placement of a run, and log what it prunes.

    Args:
        run: the run; its shape has all prunable layers.
        saved: bytes that the run writes at its end, while the finished blocks are still on the disk.

    Raises:
        InputError: memory is too little.
    """
    job, model, whole = run.job, run.model, run.shape
    rounded = run.ranks.on_first(lambda: rounds_products(job, model, run.dtype, whole.hidden))
    shape, limits = pruned_shape(whole, job.config), limits_of(job, model)
    windows = [samples.n for samples in (run.calibration, *run.evaluation)]
    workload = workload_of(job, windows, run.seqlen, model)
    # Batches of a caller are not divided into micro-batches.
    batches = {"batch": 1} if isinstance(run.calibration, Batches) else {}
    chosen = batches | job.begun.get("chosen", {})
    placement = place(shape, workload, limits, job.output.folder.resolve().parent, fixed=chosen)
    needs = memory_needs(shape, replace(workload, generated=run.generated), placement)
    run = replace(run, shape=shape, limits=limits, placement=placement, needs=needs, rounded=rounded)
    run = settle_recovery(run, workload)
    if run.stream and run.config.recover == 0:
        run.stream.close()
    disk = sum(disk_space(shape, replace(workload, config=run.config), placement).values()) + saved
    makes_steps = run.config.reconstruct or run.config.recover != 0
    notes = [*run.notes, arithmetic.note_of_rounding(model.device)] if rounded and makes_steps else run.notes
    run = replace(run, disk=disk, notes=notes)
    _say_what_is_pruned(run, whole)
    if job.config.reconstruct:
        run.say(reconstruction_line(reconstruction_steps(workload, placement)))
    return run


def carry_out(run: Run, finish: Callable[[Writer, Describe], None]) -> content.Report:
    """Prune the model of a run, evaluate it, and write its report.

    Args:
        run: the run.
        finish: called after all blocks and the report are written. Its arguments are the writer, and a function that
            writes report.html and the model card into a folder.

    Raises:
        InputError, FloatingPointError: as `run_job`.
    """
    job, model, ranks, calibration = run.job, run.model, run.ranks, run.calibration
    values = identity(run)
    ranks.agree(values | {"--output": str(job.output.folder.resolve())})
    with Writer(
        job.output.folder,
        len(model.unique_blocks) + len(model.pieces),
        values | {"the model's files": run.files},
        source=job.folder,
        overwrite=job.output.overwrite,
        restart=job.output.restart,
        ranks=ranks,
    ) as writer:
        writer.choose({"batch": run.placement.batch, "solver": run.placement.solver})
        if writer.finished:
            finished = min(len(writer.finished), writer.shards)
            run.say(f"resuming an unfinished run: {finished} of {writer.shards} shards are finished")
        if ranks.first and isinstance(calibration, Windows) and calibration.own:
            # Written now, so that a resumed run has the same text.
            durably(writer.folder / OWN_TEXT, calibration.own)
        # The disk already has the finished blocks, as pruned by every method.
        writer.check_space(run.disk - writer.written)
        report = pruned_report(run, writer)
        if report is None:
            run, outcome = _prune(run, writer)
            # Times differ among ranks, so all of them return the report of rank 0.
            report = ranks.broadcast_object(_report(run, outcome))
        if run.config.recover != 0:
            report = recover(run, writer, report)
        if ranks.first:
            durably(writer.folder / "report.json", report.to_json())
        pages = job.write_pages
        finish(writer, partial(pages, report, writer.output, run.source, run.say) if pages else None)
    return report


def _prune(run: Run, writer: Writer) -> tuple[Run, Outcome]:
    """Prune all blocks, with smaller micro-batches if the GPU's memory turns out to be too small.

    Returns:
        The run with the micro-batches that fit, and its measurements.
    """
    run.say(log.layer_header())
    while True:
        limited = memory.gpu_limited(run.limits, run.job.output.gpu_memory)
        with log.progress_of(len(run.model.blocks), run.job.progress) as on_block, limited:
            try:
                return run, prune_model(run, writer, on_block)
            except RuntimeError as error:
                # It cannot go on if a micro-batch has a single window, or if other ranks would wait for this one.
                if not (memory.is_full(error) and run.placement.batch > 1 and run.ranks.alone):
                    raise
        # Not inside the `except` clause, where the error's traceback keeps the block's tensors in memory.
        run = _with_half_the_windows(run, writer)


def _with_half_the_windows(run: Run, writer: Writer) -> Run:
    """Close all blocks, and halve the number of windows in a micro-batch, also for a run that resumes this one."""
    for i in range(len(run.model.blocks)):
        run.model.close(i)
    batch = run.placement.batch // 2
    placement = replace(run.placement, batch=batch, step=run.placement.step if run.placement.step < batch else 0)
    run.say(f"out of memory on the GPU: continuing with {counted(placement.batch, 'window')} at a time")
    writer.choose({"batch": placement.batch, "solver": placement.solver})
    memory.trim_memory()
    # CUDA and Triton allocate besides torch, which would keep what it has freed.
    torch.cuda.empty_cache()
    return replace(run, placement=placement, split_failures={})


def _say_what_is_pruned(run: Run, whole: ModelShape) -> None:
    for note in run.notes:
        run.say(f"note: {note}")
    run.say(f"model: {run.name}, {counted(len(run.model.unique_blocks), 'block')}, {run.dtype}")
    calibration, of_batches = run.calibration, isinstance(run.calibration, Batches)
    text = "" if of_batches else f" of {calibration.source}"
    run.say(f"calibration: {content.amount(calibration.source, calibration.n, run.seqlen)}{text}")
    for line in (
        log.sparsity_line(run.config, run.shape, whole),
        log.placement_line(run.placement, run.needs, run.limits, of_batches),
    ):
        for part in fitted(line):
            run.say(part)


def _report(run: Run, outcome: Outcome) -> content.Report:
    """Make the report from the measurements of all ranks."""
    job, calibration, timeline, ranks = run.job, run.calibration, run.model.timeline, run.ranks
    placement, device, seconds = run.placement, content.device_name(run.model.device), timeline.seconds()
    windows = calibration.shard(ranks.share(calibration.n)).n
    own_record = content.RankRecord(socket.gethostname(), device, windows, seconds, ranks.waited, memory.peak_memory())
    records, timelines = ranks.gather(own_record), ranks.gather(timeline.spans)
    arguments = asdict(job.inputs) | {"seqlen": run.seqlen} | asdict(job.config) | asdict(job.output)
    arguments["output"] = str(arguments.pop("folder"))
    blocks = [finished.block for finished in outcome.finished]
    peak = memory.highest(*(record.peak_memory for record in records))
    return content.Report(
        arguments=arguments,
        given=job.given,
        versions=content.versions() | content.commit(),
        device=device,
        data=content.CalibrationText(calibration.source, calibration.hash, calibration.n, run.seqlen, job.inputs.seed),
        evaluation=[
            content.EvaluationText(
                samples.source, samples.hash, samples.n, run.seqlen, outcome.perplexity[samples.source]
            )
            for samples in run.evaluation
        ],
        layers=[layer for finished in outcome.finished for layer in finished.layers],
        kept_dense=[name for finished in outcome.finished for name in finished.kept_dense] + outcome.unused,
        seconds=seconds,
        blocks=blocks,
        # The main lanes of other ranks are named after the ranks.
        timeline=timelines[0]
        + [
            replace(span, lane=f"rank {number}")
            for number, spans in enumerate(timelines[1:], 1)
            for span in spans
            if span.lane == MAIN
        ],
        peak_memory=memory.highest(peak, *map(vars, blocks)),
        memory=content.MemoryRecord(
            limits=run.limits,
            expected={what: getattr(run.needs, what) for what in run.limits},
            activations=placement.place,
            batch_windows=placement.batch,
            solver_bytes=placement.solver,
            read_ahead=placement.ahead,
            kept_width=placement.kept_width,
            step_windows=placement.step,
        ),
        notes=run.notes,
        ranks=[] if ranks.alone else records,
        in_memory=job.folder is None,
    )
