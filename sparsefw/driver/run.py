"""One run: a checkpoint in, a pruned checkpoint with its report out."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sparsefw import checkpoint, data, process
from sparsefw.checkpoint import Checkpoint, Evidence, Progress, Writer, durably
from sparsefw.data import Batches, Windows
from sparsefw.driver.block import Run
from sparsefw.driver.loop import Outcome, Samples, prune_model
from sparsefw.errors import InputError
from sparsefw.estimate import MemoryNeeds, Workload, disk_space, place
from sparsefw.flags import checked_bool, checked_number, flag_of, set_field
from sparsefw.inputs import Inputs
from sparsefw.model import BlockModel, ModelShape, Placement, StreamedModel, shape_of
from sparsefw.process import MARGIN, MOST_MEMORY
from sparsefw.report import (
    CalibrationText,
    EvaluationText,
    MemoryRecord,
    Report,
    device_name,
    html,
    log,
    machine,
    versions,
)
from sparsefw.solver import PruneConfig
from sparsefw.solver.selection import check_used

# Inputs that are compared by their content, not by name, when a run goes on with what another has finished.
BY_CONTENT = {"model", "dataset", "evaluate"}


@dataclass(frozen=True)
class Output:
    """The output folder of a run, and its memory limits.

    Attributes:
        folder: folder of the pruned checkpoint.
        overwrite: whether an older checkpoint may be replaced.
        restart: whether to discard what an unfinished run left.
        gpu_memory, host_memory: memory limits in GiB; None: what is free, less a margin.
    """

    folder: Path
    overwrite: bool = False
    restart: bool = False
    gpu_memory: float | None = None
    host_memory: float | None = None

    def __post_init__(self) -> None:
        for name in ("overwrite", "restart"):
            set_field(self, name, checked_bool(name, getattr(self, name)))
        for name in ("gpu_memory", "host_memory"):
            if getattr(self, name) is not None:
                set_field(self, name, checked_number(name, getattr(self, name), 0, MOST_MEMORY))

    def limits(self, device: torch.device) -> dict[str, int]:
        """Memory limits in bytes: "host", and with a GPU "gpu".

        Raises:
            InputError: there is a limit for a GPU, and no GPU.
        """
        free = process.free_memory(device)
        if self.gpu_memory is not None and "gpu" not in free:
            raise InputError("--gpu-memory: no CUDA device")
        given = {"gpu": self.gpu_memory, "host": self.host_memory}
        return {
            what: int(size * (1 - MARGIN) if (gib := given[what]) is None else gib * 2**30)
            for what, size in free.items()
        }


@dataclass(frozen=True)
class Job:
    """A run that is asked for.

    Attributes:
        inputs: names of what is read.
        config: how the model is pruned.
        output: where the run writes.
    """

    inputs: Inputs
    config: PruneConfig
    output: Output


@dataclass(frozen=True)
class CheckpointJob(Job):
    """A run on a checkpoint.

    Attributes:
        folder: folder of the source, the checkpoint that is read.
        dataset: calibration data without a name: documents, or token ids (windows, seqlen); None: `inputs` names it.
        tokenizer: the model's tokenizer; None: the source's.
    """

    folder: Path
    dataset: Sequence[str] | Tensor | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


@dataclass(frozen=True)
class Prepared:
    """A run before its first block.

    Attributes:
        device: device that the model runs on.
        calibration, evaluation: the windows, or the batches of a caller.
        shape: shape of the model, with the layers that are to be pruned.
        workload: the work to do.
        limits: memory limits in bytes: "host", and with a GPU "gpu".
        notes: what the user should know of the model, one line each.
        fingerprint: tells the model from another one.
        evidence: reads the checkpoint; None: the model is in memory, and the fingerprint is of all its tensors.
        fixed: values of `Placement` that are settled, by field.
        saved: bytes that the end of the run writes while the finished blocks are still on the disk.
    """

    device: torch.device
    calibration: Samples
    evaluation: Sequence[Samples]
    shape: ModelShape
    workload: Workload
    limits: dict[str, int]
    notes: list[str]
    fingerprint: str
    evidence: Evidence | None = None
    fixed: dict[str, int] = field(default_factory=dict)
    saved: int = 0


def run_job(job: CheckpointJob, say: Callable[[str], None], progress: bool) -> Report:
    """Prune a checkpoint, evaluate it, write it and its report.

    Args:
        job: the run.
        say: called with every line of the log.
        progress: whether to show a progress bar.

    Raises:
        InputError: something that the user gave is wrong; the message names it.
        FloatingPointError: a layer's error is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(kernel_line(job.config))
    checkpoint.check_output(job.output.folder, job.folder, job.output.overwrite, _files_read(job))
    source = checkpoint.inspect(job.folder)
    evidence = Evidence(source)
    with StreamedModel(source, device, evidence.read) as model:
        prepared = _prepare(job, model, source, evidence, say)
        return carry_out(job, model, prepared, lambda writer: writer.finish(job.folder), say, progress)


def carry_out(
    job: Job,
    model: BlockModel,
    prepared: Prepared,
    finish: Callable[[Writer], None],
    say: Callable[[str], None],
    progress: bool,
) -> Report:
    """Prune a model that is ready for it, evaluate it, and write its report.

    Args:
        job: the run.
        model: the model.
        prepared: the run before its first block.
        finish: ends the writing: called when all blocks and the report are written.
        say, progress: as for `run_job`.

    Raises:
        InputError, FloatingPointError: as `run_job`.
    """
    placement, _ = _place(job, prepared)
    chosen = {"batch": placement.batch, "solver": placement.solver}
    with _writer(job, model, prepared, chosen, Progress(say, progress)) as writer:
        if writer.finished:
            say(f"going on with an unfinished run: {len(writer.finished)} of {writer.shards} parts are there")
        placement, needs = _place(job, prepared, writer.chosen)
        # The disk has a finished block as each method pruned it.
        written = len(job.config.methods) * writer.written
        needed = sum(disk_space(prepared.shape, prepared.workload, placement).values()) + prepared.saved
        writer.check_space(needed - written)
        of_batches = isinstance(prepared.calibration, Batches)
        say(log.placement_line(placement, needs, prepared.limits, of_batches))
        say(log.layer_header())
        with (
            tqdm(total=len(model.blocks), unit="block", disable=None if progress else True) as bar,
            process.gpu_limited(prepared.limits.get("gpu")),
        ):
            outcome = prune_model(
                Run(
                    model,
                    job.config,
                    job.config.backend,
                    placement.solver,
                    frozenset(prepared.shape.layer_names),
                    placement.kept_width,
                    tuple(block.seen for block in prepared.shape.blocks),
                ),
                prepared.calibration,
                prepared.evaluation,
                writer,
                placement,
                on_layer=lambda result: say(log.layer_row(result)),
                on_block=bar.update,
            )
        report = _report(job, prepared, outcome, placement, needs)
        texts = {"report.json": report.to_json(), "report.html": html.page(report)}
        for name, text in texts.items():
            durably(writer.folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
        finish(writer)
    return report


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


def _files_read(job: CheckpointJob) -> list[Path]:
    """Files and folders here that the run reads beside the source: texts, the Hub's caches, and temporary files."""
    names = [*job.inputs.evaluate, *([job.inputs.dataset] if job.dataset is None else [])]
    texts = [Path(path) for path in map(os.path.expanduser, names) if os.path.lexists(path)]
    return [*texts, Path(constants.HF_HOME), Path(constants.HF_HUB_CACHE), Path(tempfile.gettempdir())]


def _prepare(
    job: CheckpointJob, model: StreamedModel, source: Checkpoint, evidence: Evidence, say: Callable[[str], None]
) -> Prepared:
    inputs, config = job.inputs, job.config
    seqlen = min(inputs.seqlen, model.max_seqlen or inputs.seqlen)
    if seqlen < inputs.seqlen:
        say(f"seqlen: {seqlen} tokens, the model's maximum (asked for {inputs.seqlen})")
    limits, before = job.output.limits(model.device), process.peak_memory()["host_bytes"]
    calibration, evaluation, tokenizer = _read_texts(job, seqlen, limits["host"])
    process.give_back()
    # From Python, the process may have had more at some time before: that is not this run's.
    peak = process.peak_memory()["host_bytes"]
    notes = model.notes + checkpoint.note_of_others(job.folder)
    for note in notes:
        say(f"note: {note}")
    say(f"model: {inputs.model}, {len(model.firsts)} blocks, {source.dtype}")
    say(f"calibration: {calibration.n} windows of {calibration.seqlen} tokens of {calibration.source}")
    whole = shape_of(source)
    check_used(whole.layer_names, config.include, config.ignore)
    shape = whole.selected(config.selects)
    say(log.sparsity_line(config, shape, whole))
    return Prepared(
        model.device,
        calibration,
        evaluation,
        shape,
        workload_of(
            config,
            calibration.n,
            [windows.n for windows in evaluation],
            seqlen,
            model.device,
            peak=peak if peak > before else 0,
            tokenizer=tokenizer,
        ),
        limits,
        notes,
        checkpoint.fingerprint(source),
        evidence,
    )


def workload_of(
    config: PruneConfig,
    windows: int,
    evaluation: Sequence[int],
    seqlen: int,
    device: torch.device,
    peak: int = 0,
    tokenizer: int = 0,
) -> Workload:
    """The work of a run in this process, see `Workload`."""
    return Workload(
        windows=windows,
        evaluation=tuple(evaluation),
        seqlen=seqlen,
        config=config,
        gpu=device.type == "cuda",
        threads=torch.get_num_threads() if config.kernel == "torch" else 1,
        process=process.resident(),
        peak=peak,
        tokenizer=tokenizer,
    )


def _read_texts(job: CheckpointJob, seqlen: int, limit: int) -> tuple[Windows, list[Windows], int]:
    """The calibration windows, and the windows of each evaluation text, read in `limit` bytes of host memory.

    The last value is how many of these bytes the tokenizer's own process has taken.
    """
    inputs = job.inputs
    tokens = data.windows_of(job.dataset, inputs.dataset) if isinstance(job.dataset, Tensor) else None
    if tokens is not None and tokens.seqlen > seqlen:
        raise InputError(f"{tokens.source}: windows of {tokens.seqlen} tokens, and the model takes {seqlen} at most")
    if tokens is not None and not inputs.evaluate:
        # Nothing has to be tokenized.
        return tokens, [], 0
    if job.tokenizer:
        return *_tokenize(job, seqlen, tokens, job.tokenizer, limit), 0
    with data.TokenizerProcess(job.folder, limit - process.resident()) as tokenizer:
        windows = _tokenize(job, seqlen, tokens, tokenizer, limit - tokenizer.nbytes())
        return *windows, tokenizer.nbytes()


def _tokenize(
    job: CheckpointJob, seqlen: int, tokens: Windows | None, tokenizer: data.Tokenizer, limit: int
) -> tuple[Windows, list[Windows]]:
    inputs = job.inputs
    if tokens is None:
        documents = inputs.dataset if job.dataset is None or isinstance(job.dataset, Tensor) else job.dataset
        tokens = data.calibration_windows(
            tokenizer,
            documents,
            nsamples=inputs.nsamples,
            seqlen=seqlen,
            seed=inputs.seed,
            room=limit - process.resident(),
        )
    return tokens, [
        data.evaluation_windows(
            tokenizer, name, seqlen=seqlen, limit=inputs.eval_windows, room=limit - process.resident()
        )
        for name in dict.fromkeys(inputs.evaluate)
    ]


def _place(job: Job, prepared: Prepared, fixed: dict[str, int] | None = None) -> tuple[Placement, MemoryNeeds]:
    folder = job.output.folder.resolve().parent
    return place(prepared.shape, prepared.workload, prepared.limits, folder, fixed=prepared.fixed | (fixed or {}))


def _writer(
    job: Job,
    model: BlockModel,
    prepared: Prepared,
    chosen: dict[str, int],
    progress: Progress,
) -> Writer:
    return Writer(
        job.output.folder,
        len(model.firsts) + len(model.pieces),
        _identity(job, prepared),
        chosen,
        evidence=prepared.evidence,
        overwrite=job.output.overwrite,
        restart=job.output.restart,
        progress=progress,
    )


def _identity(job: Job, prepared: Prepared) -> dict[str, Any]:
    """Values that must be the same for a run to go on with what another has finished, by their names in messages."""
    values = asdict(job.inputs) | asdict(job.config)
    for name in ("include", "ignore"):
        # Their order makes no difference.
        values[name] = sorted(values[name])
    flags = {flag_of(name): value for name, value in values.items() if name not in BY_CONTENT}
    texts = {f"the text of --eval {samples.source}": samples.hash for samples in prepared.evaluation}
    model = {"the model": prepared.fingerprint}
    return flags | model | {"the calibration text": prepared.calibration.hash} | texts | machine(prepared.device)


def _report(job: Job, prepared: Prepared, outcome: Outcome, placement: Placement, needs: MemoryNeeds) -> Report:
    calibration, device = prepared.calibration, prepared.device
    seqlen = prepared.workload.seqlen
    arguments = asdict(job.inputs) | {"seqlen": seqlen} | asdict(job.config) | asdict(job.output)
    arguments["output"] = str(arguments.pop("folder"))
    peak = process.peak_memory()
    # Two processes read the texts.
    peak["host_bytes"] = max(peak["host_bytes"], prepared.workload.peak + prepared.workload.tokenizer)
    return Report(
        arguments=arguments,
        versions=versions(),
        device=device_name(device),
        data=CalibrationText(calibration.source, calibration.hash, calibration.n, seqlen, job.inputs.seed),
        evaluation=[
            EvaluationText(samples.source, samples.hash, samples.n, seqlen, outcome.perplexity[samples.source])
            for samples in prepared.evaluation
        ],
        layers=outcome.layers,
        kept_dense=outcome.kept_dense,
        seconds=outcome.timeline.seconds(),
        blocks=outcome.blocks,
        timeline=outcome.timeline.spans,
        peak_memory={what: max(n, *(getattr(b, what) for b in outcome.blocks)) for what, n in peak.items()},
        memory=MemoryRecord(
            limits=prepared.limits,
            expected={what: getattr(needs, what) for what in prepared.limits},
            activations=placement.place,
            batch_windows=placement.batch,
            solver_bytes=placement.solver,
            read_ahead=placement.ahead,
            kept_width=placement.kept_width,
        ),
        notes=prepared.notes,
    )
