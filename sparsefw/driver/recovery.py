"""The recovery at the end of a run: settle how many tokens it takes, carry it out, and add it to the report.

The run's blocks are finished then. The recovered blocks replace them when the output is finished. What a resumed run
needs is in the writer's folder `recovery`: the report of the pruned model, and the states of `distill`.
"""

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

from sparsefw.checkpoint.files import durably
from sparsefw.checkpoint.tensors import read_shard
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.batches import Batch, Batches, token_batch
from sparsefw.driver.distill import recovering
from sparsefw.driver.job import Run
from sparsefw.driver.resume import MAY_DIFFER
from sparsefw.driver.saves import begun
from sparsefw.errors import InputError, first_line, option
from sparsefw.estimate.memory import MemoryNeeds
from sparsefw.estimate.placement import RecoveryPlan, notes_of_recovery, plan_recovery
from sparsefw.estimate.workload import Workload
from sparsefw.memory import gpu_limited, highest, is_full, peak_memory, trim_memory
from sparsefw.model.forward import embed_batches
from sparsefw.model.head import perplexity
from sparsefw.report import content

# Files in the writer's folder `recovery`: the report of the pruned model, and that of the recovered one.
PRUNED, FINISHED = "pruned.json", "report.json"


def settle_recovery(run: Run, workload: Workload) -> Run:
    """Settle the tokens of a run's recovery, 0 for none, and add its memory. A note says why there is no default one.

    Raises:
        InputError: the user asks for a recovery that is not possible.
    """
    config, hours = run.config, run.job.output.hours
    if config.recover == 0:
        notes_of_recovery(run.recovery, 0, hours)
        return run
    folder = Writer(run.job.output.folder, 0).recovery
    known = begun(folder) if run.job.begun else None
    plan = plan_recovery(run.shape, workload, run.limits)
    if why := _impossible(run):
        plan = RecoveryPlan(refused=InputError(why))
    # Steps are made already, and less memory may be free only now.
    if known and plan.refused and not (folder / FINISHED).exists():
        raise plan.refused
    notes = run.notes + notes_of_recovery(plan, config.recover, hours)
    asked = bool(config.recover) or hours is not None
    if not asked:
        run = replace(run, job=replace(run.job, config=config.replace(recover=plan.tokens)))
    needs = MemoryNeeds(run.needs.phases | plan.needs.phases)
    return replace(run, recovery=replace(plan, asked=asked), needs=needs, notes=notes)


def _impossible(run: Run) -> str:
    """Tell why a model cannot be recovered, apart from memory; empty if it can."""
    if not run.ranks.alone:
        return f"{run.ranks.count} ranks prune; python -m sparsefw.recover does it afterwards, in one process"
    if run.model.runs is not run.model.model or not run.model.logits_itemsize:
        return f"{run.model.class_name} predicts no tokens"
    if isinstance(run.calibration, Batches) and run.job.inputs.nsamples < 2:
        return "it needs two batches, one of them held out"
    return ""


def pruned_report(run: Run, writer: Writer) -> content.Report | None:
    """Read the report of a pruned model whose recovery was interrupted, or has ended; None: the run still prunes.

    After an interruption this run may ask for another recovery, or for none. So shards of the first one are dropped,
    and the report gets this run's arguments.

    Raises:
        InputError: the recovery has ended, and this run asks for other tokens or hours.
    """
    if (writer.recovery / FINISHED).exists():
        report = content.read_report(writer.recovery / FINISHED)
        for name, asked in {"recover": run.job.given.get("recover"), "hours": run.job.output.hours}.items():
            if asked not in (None, report.arguments[name]):
                again = f"give the same, or {option('restart', True)}"
                raise InputError(f"{option(name, asked)}: the recovery has ended with another value; {again}")
        return report
    writer.drop(writer.shards)
    if not (writer.recovery / PRUNED).exists():
        return None
    report = content.read_report(writer.recovery / PRUNED)
    changed = asdict(run.job.inputs) | asdict(run.config) | asdict(run.job.output)
    own = {name: changed[name] for name in (*MAY_DIFFER, "hours", "gpu_memory", "host_memory")}
    data = replace(report.data, source=run.calibration.source)
    # A new note may say why there is no recovery any more.
    notes = report.notes + [note for note in run.notes if note not in report.notes]
    return replace(report, arguments=report.arguments | own, given=run.job.given, data=data, notes=notes)


def recover(run: Run, writer: Writer, report: content.Report) -> content.Report:
    """Recover the model that a run has pruned, write its blocks, and return the report with the recovery.

    Args:
        run: the run.
        writer: has the finished blocks.
        report: the report of the pruned model.

    Raises:
        InputError: as `distill.recovering`, if the user has asked for the recovery. If not, the log says why there is
            none.
    """
    if (writer.recovery / FINISHED).exists():
        return report
    durably(writer.recovery / PRUNED, report.to_json())
    trim_memory()
    started = time.perf_counter()
    limited = gpu_limited(run.limits, run.job.output.gpu_memory)
    try:
        with limited, torch.no_grad():
            report = _recovered(run, writer, report)
    except (InputError, RuntimeError) as error:
        if run.recovery.asked or not (isinstance(error, InputError) or is_full(error)):
            raise
        # It may fail at its very end, for example in an evaluation.
        writer.drop(writer.shards)
        report = _noted(run, report, f"no recovery of the whole model: {first_line(error)}")
    peak = highest(peak_memory(), report.peak_memory)
    seconds = report.seconds | {"recover": time.perf_counter() - started}
    # The report of an output that is recovered again has the arguments of its run.
    own = {"recover": run.config.recover, "hours": run.job.output.hours}
    report = replace(report, peak_memory=peak, seconds=seconds, arguments=report.arguments | own)
    durably(writer.recovery / FINISHED, report.to_json())
    return report


def _recovered(run: Run, writer: Writer, report: content.Report) -> content.Report:
    model, seqlen = run.model, run.recovery.seqlen

    def pruned(i: int) -> Mapping[str, Tensor]:
        return read_shard(writer.path(model.unique_blocks.index(i)))

    layers = report.layers_of(report.method)
    with recovering(run, pruned, layers, _windows(run), writer.recovery) as found:
        run.say(f"divergence on held-out windows: {found.before:.4g} to {found.after:.4g}")
        if not found.after < found.before:
            return _noted(run, report, "nothing is gained, so the pruned weights stay; more tokens may help")
        for n, i in enumerate(model.unique_blocks):
            tensors = model.block_tensors(i)
            if model.device.type == "cuda":
                # Copies to the host are asynchronous.
                torch.cuda.current_stream(model.device).synchronize()
            writer.write(writer.shards + n, tensors)
        evaluation = [_evaluated(run, n, text) for n, text in enumerate(report.evaluation)]
    data = replace(report.data, hash=found.hash, windows=found.windows, seqlen=seqlen)
    outcome = found.before, found.after, found.steps, run.config.recover or 0
    own = content.Recovery(run.name, run.job.inputs.dataset, data, *outcome)
    return replace(report, recovery=own, evaluation=evaluation)


def _noted(run: Run, report: content.Report, note: str) -> content.Report:
    run.say(f"note: {note}")
    return replace(report, notes=[*report.notes, note])


def _windows(run: Run) -> Iterator[Batch]:
    """Yield windows that follow the run's windows, or a caller's batches, without end."""
    if isinstance(run.calibration, Batches):
        yield from itertools.cycle(run.calibration.batches)
    assert run.stream is not None
    while True:
        yield token_batch(run.stream.take(1).ids)


def _evaluated(run: Run, number: int, text: content.EvaluationText) -> content.EvaluationText:
    """Add the perplexity of the recovered model, whose blocks are open, to the results of an evaluation text."""
    samples, model = run.evaluation[number], run.model
    states = embed_batches(model, samples.split(run.placement.batch), run.placement.store(model.device))
    for i in range(len(model.blocks)):
        states.advance(i)
    perplexities = text.perplexity | {content.RECOVERED: perplexity(states, samples)}
    states.close()
    return replace(text, perplexity=perplexities)
