"""One run: a checkpoint in, a pruned checkpoint with its report out."""

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsefw import arithmetic, memory
from sparsefw.checkpoint.files import check_output, durably
from sparsefw.checkpoint.source import fingerprint, inspect, note_of_others, stamps
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.batches import Batches
from sparsefw.data.text import OWN_TEXT, SELF
from sparsefw.data.tokens import Tokenizer
from sparsefw.data.windows import Windows, Write, window_length, windows_of
from sparsefw.driver import generation
from sparsefw.driver.block import Run
from sparsefw.driver.finished import Outcome
from sparsefw.driver.job import Job, Prepared, windows_of_texts
from sparsefw.driver.prune import prune_model
from sparsefw.errors import InputError, counted, fitted, flag_of, option
from sparsefw.estimate.memory import MemoryNeeds, Workload, disk_space, memory_needs, process_bytes, pruned_shape
from sparsefw.estimate.placement import memory_limits, place, reconstruction_line, reconstruction_steps, written_at_once
from sparsefw.model import ModelShape, Placement, StreamedModel, shape_of
from sparsefw.model.block_model import BlockModel
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report import card, content, html, log
from sparsefw.solver.config import PruneConfig
from sparsefw.timeline import of_rank

# Whether a progress bar is shown, None: in a terminal alone; or what is called with every finished block.
Shown = bool | Callable[[log.Progress], None] | None

# Inputs that are compared by their content, not by name, when a run goes on with what another has finished.
BY_CONTENT = {"model", "dataset", "evaluate"}

# The names of the run's arithmetic among these.
IN_FP32 = "whether it computes in fp32"
ROUNDED = "whether steps of a reconstruction round the operands of their products"


def run_job(job: Job, say: Callable[[str], None], progress: Shown, ranks: Ranks = ALONE) -> content.Report:
    """Prune a checkpoint, evaluate it, write it and its report.

    Args:
        job: the run.
        say: called with every line of the log.
        progress: how progress is shown, see `log.progress_of`.
        ranks: the processes that share the work; all of them have the same job.

    Raises:
        InputError: something that the user gave is wrong; the message names it.
        FloatingPointError: a layer's error is not finite.
    """
    assert job.folder is not None
    device = memory.this_device()
    check_output(job.output.folder, job.folder, job.output.overwrite, job.inputs.paths)
    source = inspect(job.folder)
    in_fp32 = ranks.on_first(lambda: computes_in_fp32(job, say, source.dtype, device))
    with StreamedModel(source, device, in_fp32=in_fp32) as model:
        shape = shape_of(source, in_fp32)
        _check_memory(job, shape, model, ranks)
        write, written = own_text(job, model, shape, say, ranks)
        calibration, evaluation, seqlen = windows_of_texts(job, model.max_seqlen, write, say, ranks)
        prepared = Prepared(
            model,
            name=job.inputs.model,
            dtype=source.dtype,
            shape=shape,
            calibration=calibration,
            evaluation=evaluation,
            seqlen=seqlen,
            notes=model.notes + note_of_others(source.folder),
            fingerprint=fingerprint(source),
            files=stamps(source) if ranks.first else {},
            source=job.folder,
            written=written,
        )
        return carry_out(job, prepared, lambda writer, card: writer.finish(None, card), say, progress, ranks)


def _check_memory(job: Job, shape: ModelShape, model: StreamedModel, ranks: Ranks) -> None:
    """Refuse what the plan of the run refuses, in the same words, before texts are read: that may take long.

    Of several ranks it is found out later: they may have been given different flags.

    Raises:
        InputError: memory is too little.
    """
    inputs, texts = job.inputs, len(dict.fromkeys(job.inputs.evaluate))
    if ranks.alone and job.dataset is None and (inputs.eval_windows or not texts):
        seqlen = window_length(inputs.model, inputs.seqlen, model.max_seqlen)
        config = job.config.for_calibration(inputs.nsamples, seqlen)
        windows = [inputs.nsamples, *texts * [inputs.eval_windows or 0]]
        workload = workload_of(job, config, windows, seqlen, model.device, ranks)
        place(pruned_shape(shape, config), workload, limits_of(job, model.device, ranks))


def own_text(
    job: Job, model: BlockModel, shape: ModelShape, say: Callable[[str], None], ranks: Ranks
) -> tuple[Write, int]:
    """A function that has the dense model write its calibration text, and the number of windows that it writes at once.

    A run that goes on with an unfinished one takes the text from there. None: no text of the run is the model's own.

    Raises:
        InputError: it does not fit into memory.
    """
    inputs, output = job.inputs, job.output
    if job.dataset is not None or SELF not in inputs.shares:
        return None, 0
    seqlen = window_length(inputs.model, inputs.seqlen, model.max_seqlen)
    limits = limits_of(job, model.device, ranks)
    config = job.config.for_calibration(inputs.nsamples, seqlen, ranks.count)
    workload = workload_of(job, config, [inputs.nsamples], seqlen, model.device, ranks)
    batch = written_at_once(shape, workload, limits, inputs)

    def write(tokenizer: Tokenizer, seqlen: int, n: int) -> Windows:
        begun = Writer(output.folder, 0, restart=output.restart)
        path, source = begun.folder / OWN_TEXT, generation.own_source(inputs.seed)
        ids = generation.tokens_in(path) if begun.begun() and path.exists() else None
        if ids is None or ids.shape != (n, seqlen):
            with memory.gpu_limited(limits.get("gpu"), output.gpu_memory is not None):
                ids = generation.write_tokens(model, tokenizer, n, seqlen, inputs.seed, batch, say)
            memory.give_back()
        return replace(windows_of(ids, source), own=generation.records_of(tokenizer, ids))

    return write, batch


def limits_of(job: Job, device: torch.device, ranks: Ranks) -> dict[str, int]:
    free = memory.free_memory(device, ranks.here)
    return memory_limits(job.output.gpu_memory, job.output.host_memory, free, ranks)


def computes_in_fp32(job: Job, say: Callable[[str], None], dtype: torch.dtype, device: torch.device) -> bool:
    """As of `arithmetic`; but a run that goes on with an unfinished one computes as that does, and says so."""
    found = arithmetic.computes_in_fp32(dtype, device)
    begun = _begun(job, IN_FP32, found)
    if begun == found or dtype not in arithmetic.HALF:
        return found
    own = str(dtype).removeprefix("torch.")
    say(f"computed in {'fp32' if begun else own}, as in the unfinished run that this one goes on with")
    return begun


def _rounds_products(job: Job, prepared: Prepared) -> bool:
    """As of `arithmetic`, unless exact products are asked for; a run that goes on with another one does as that."""
    if not job.config.reconstruct or job.config.given.get("precision") in ("ieee", "tf32x3"):
        return False
    model = prepared.model
    dtype = torch.float32 if model.in_fp32 else prepared.dtype
    return _begun(job, ROUNDED, arithmetic.rounds_products(dtype, model.device, prepared.shape.hidden))


def _begun(job: Job, name: str, found: bool) -> bool:
    """The value that an unfinished run has settled under this name; without one, the value that was found."""
    return Writer(job.output.folder, 0, restart=job.output.restart).begun().get("identity", {}).get(name, found)


def carry_out(
    job: Job,
    prepared: Prepared,
    finish: Callable[[Writer, Callable[[Path], None]], None],
    say: Callable[[str], None],
    progress: Shown,
    ranks: Ranks,
) -> content.Report:
    """Prune a model that is ready for it, evaluate it, and write its report.

    Args:
        job: the run.
        prepared: the model.
        finish: ends the writing: called when all blocks and the report are written, with the writer and with what
            writes the model card into a folder.
        say, progress, ranks: as for `run_job`.

    Raises:
        InputError, FloatingPointError: as `run_job`.
    """
    model, calibration = prepared.model, prepared.calibration
    rounded = ranks.on_first(lambda: _rounds_products(job, prepared))
    if rounded:
        prepared = replace(prepared, notes=[*prepared.notes, arithmetic.note_of_rounding(model.device)])
    shape = pruned_shape(prepared.shape, job.config)
    _say_what_is_pruned(job, prepared, shape, say)
    limits = limits_of(job, model.device, ranks)
    config = _config_of(job, prepared, say, ranks)
    windows = [samples.n for samples in (calibration, *prepared.evaluation)]
    workload = workload_of(job, config, windows, prepared.seqlen, model.device, ranks)
    job = replace(job, config=config)
    identity = _identity(job, prepared, ranks) | {ROUNDED: rounded}
    ranks.agree(identity | {"--output": str(job.output.folder.resolve())})
    find_place = partial(place, shape, workload, limits, job.output.folder.resolve().parent)
    placement, _ = find_place(fixed=prepared.fixed)
    with Writer(
        job.output.folder,
        len(model.unique_blocks) + len(model.pieces),
        identity | {"the model's files": prepared.files},
        {"batch": placement.batch, "solver": placement.solver},
        source=job.folder,
        overwrite=job.output.overwrite,
        restart=job.output.restart,
        ranks=ranks,
    ) as writer:
        if writer.finished:
            say(f"going on with an unfinished run: {len(writer.finished)} of {writer.shards} shards are finished")
        if ranks.first and isinstance(calibration, Windows) and calibration.own:
            # For a run that goes on with this one, too.
            durably(writer.folder / OWN_TEXT, calibration.own)
        placement, _ = find_place(fixed=prepared.fixed | writer.chosen)
        needs = memory_needs(shape, replace(workload, written=prepared.written), placement)
        # The disk has a finished block as each method pruned it.
        written = len(config.methods) * writer.written
        needed = sum(disk_space(shape, workload, placement).values()) + prepared.saved
        writer.check_space(needed - written)
        for line in fitted(log.placement_line(placement, needs, limits, isinstance(calibration, Batches))):
            say(line)
        if config.reconstruct:
            say(reconstruction_line(reconstruction_steps(shape, workload, placement)))
        say(log.layer_header())
        run = Run(model, shape, config, placement, say, ranks, rounded)
        limited = partial(memory.gpu_limited, limits.get("gpu"), job.output.gpu_memory is not None)
        outcome, placement = _prune(run, prepared, writer, limited, progress)
        # Times differ; all ranks return those of rank 0.
        report = ranks.broadcast_object(_report(job, prepared, outcome, limits, placement, needs, ranks))
        if ranks.first:
            texts = {"report.json": report.to_json(), "report.html": html.page(report)}
            for name, text in texts.items():
                durably(writer.folder / name, text)
        finish(writer, partial(card.write_card, writer.output, report, prepared.source, say=say))
    return report


def _config_of(job: Job, prepared: Prepared, say: Callable[[str], None], ranks: Ranks) -> PruneConfig:
    """The config of a run, with the defaults that depend on its calibration."""
    n = prepared.calibration.n
    if n < ranks.count:
        raise InputError(f"{option('nsamples', n)}: {ranks.count} ranks, and each needs a window")
    # In the mean over batches, since they may have different sizes.
    config = job.config.for_calibration(n, prepared.tokens // n or prepared.seqlen, ranks.count)
    if job.config.reconstruct and not config.reconstruct:
        say("note: no block is reconstructed: that takes two calibration windows on every rank, one to hold out")
    return config


def _say_what_is_pruned(job: Job, prepared: Prepared, shape: ModelShape, say: Callable[[str], None]) -> None:
    for note in prepared.notes:
        say(f"note: {note}")
    say(f"model: {prepared.name}, {counted(len(prepared.model.unique_blocks), 'block')}, {prepared.dtype}")
    calibration, length, text = prepared.calibration, prepared.seqlen, ""
    if isinstance(calibration, Windows):
        length, text = calibration.seqlen, f" of {calibration.source}"
    say(f"calibration: {content.amount(calibration.source, calibration.n, length)}{text}")
    for line in fitted(log.sparsity_line(job.config, shape, prepared.shape)):
        say(line)


def workload_of(
    job: Job, config: PruneConfig, windows: Sequence[int], seqlen: int, device: torch.device, ranks: Ranks
) -> Workload:
    """The work of a run with this config on so many windows of each text, the first of which calibrates.

    Of several ranks, with the memory of the one that has most.
    """
    # Memory that texts and shapes have freed can be taken again: it is no part of what the process keeps.
    memory.give_back()
    mine = memory.resident(), memory.held_on_gpu(device)
    has, held = (max(sizes) for sizes in zip(*ranks.gather(mine), strict=True))
    if job.folder is not None and job.dataset is None:
        # The plan's figure for a process, which has less now.
        has = max(has, process_bytes(job.inputs, windows[1:], seqlen, 0))
    return Workload(
        windows=-(-windows[0] // ranks.count),
        evaluation=tuple(-(-n // ranks.count) for n in windows[1:]),
        seqlen=seqlen,
        config=config,
        gpu=device.type == "cuda",
        process=has,
        held=held,
        ranks=ranks.count,
        ranks_here=ranks.here,
    )


def _identity(job: Job, prepared: Prepared, ranks: Ranks) -> dict[str, Any]:
    """Values that must be the same for a run to go on with what another has finished, by their names in messages."""
    values = asdict(job.inputs) | asdict(job.config)
    for name in ("include", "ignore"):
        # Their order makes no difference.
        values[name] = sorted(values[name])
    flags = {flag_of(name): value for name, value in values.items() if name not in BY_CONTENT}
    texts = {f"the evaluation text {samples.source}": samples.hash for samples in prepared.evaluation}
    read = {"the model": prepared.fingerprint, "the calibration text": prepared.calibration.hash} | texts
    work = {IN_FP32: prepared.model.in_fp32, "the number of ranks": ranks.count}
    return flags | read | work | content.machine(prepared.model.device)


def _prune(
    run: Run, prepared: Prepared, writer: Writer, limited: Callable[[], AbstractContextManager[None]], progress: Shown
) -> tuple[Outcome, Placement]:
    """Prune all blocks; on a GPU that is full, go on from the last finished block with half the windows at a time."""
    model = run.model
    while True:
        with log.progress_of(len(model.blocks), progress) as on_block, limited():
            try:
                return prune_model(run, prepared.calibration, prepared.evaluation, writer, on_block), run.placement
            except RuntimeError as error:
                # CUDA and Triton have errors of their own for it. Other ranks would wait for this one; batches of a
                # caller are not cut.
                full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
                if not full or run.placement.batch == 1 or not run.ranks.alone:
                    raise
        # Outside of the handler, whose traceback holds the tensors of the block.
        for i in range(len(model.blocks)):
            model.close(i)
        batch = run.placement.batch // 2
        placement = replace(run.placement, batch=batch, step=run.placement.step if run.placement.step < batch else 0)
        run = replace(run, placement=placement, confirmed={})
        run.say(f"out of memory on the GPU: going on with {counted(placement.batch, 'window')} at a time")
        writer.choose({"batch": placement.batch, "solver": placement.solver})
        memory.give_back()


def _report(
    job: Job,
    prepared: Prepared,
    outcome: Outcome,
    limits: dict[str, int],
    placement: Placement,
    needs: MemoryNeeds,
    ranks: Ranks,
) -> content.Report:
    """The report, on all ranks, from what was measured on all of them."""
    calibration, timeline, seqlen = prepared.calibration, prepared.model.timeline, prepared.seqlen
    device, seconds = content.device_name(prepared.model.device), timeline.seconds()
    windows = calibration.part(ranks.share(calibration.n)).n
    mine = content.RankRecord(socket.gethostname(), device, windows, seconds, ranks.waited, memory.peak_memory())
    records, timelines = ranks.gather(mine), ranks.gather(timeline.spans)
    arguments = asdict(job.inputs) | {"seqlen": seqlen} | asdict(job.config) | asdict(job.output)
    arguments |= {"output": str(arguments.pop("folder")), "packed": job.output.packed and str(job.output.packed)}
    blocks = [finished.block for finished in outcome.finished]
    peak = {what: max(record.peak_memory[what] for record in records) for what in mine.peak_memory}
    return content.Report(
        arguments=arguments,
        versions=content.versions(),
        device=device,
        data=content.CalibrationText(calibration.source, calibration.hash, calibration.n, seqlen, job.inputs.seed),
        evaluation=[
            content.EvaluationText(samples.source, samples.hash, samples.n, seqlen, outcome.perplexity[samples.source])
            for samples in prepared.evaluation
        ],
        layers=[layer for finished in outcome.finished for layer in finished.layers],
        kept_dense=[name for finished in outcome.finished for name in finished.kept_dense] + outcome.unused,
        seconds=seconds,
        blocks=blocks,
        timeline=timelines[0]
        + [span for number, spans in enumerate(timelines[1:], 1) for span in of_rank(spans, number)],
        peak_memory={what: max(n, *(getattr(block, what) for block in blocks)) for what, n in peak.items()},
        memory=content.MemoryRecord(
            limits=limits,
            expected={what: getattr(needs, what) for what in limits},
            activations=placement.place,
            batch_windows=placement.batch,
            solver_bytes=placement.solver,
            read_ahead=placement.ahead,
            kept_width=placement.kept_width,
            step_windows=placement.step,
        ),
        notes=prepared.notes,
        ranks=[] if ranks.alone else records,
        in_memory=job.folder is None,
    )
