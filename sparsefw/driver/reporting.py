"""The report of a run, from what was measured on all ranks."""

import socket
from dataclasses import asdict

from sparsefw import memory
from sparsefw.driver.job import Job, Prepared
from sparsefw.driver.loop import Outcome
from sparsefw.estimate import MemoryNeeds
from sparsefw.model import Placement
from sparsefw.ranks import Ranks
from sparsefw.report.content import CalibrationText, EvaluationText, MemoryRecord, RankRecord, Report
from sparsefw.report.environment import device_name, versions
from sparsefw.timeline import of_rank


def report_of(
    job: Job, prepared: Prepared, outcome: Outcome, placement: Placement, needs: MemoryNeeds, ranks: Ranks
) -> Report:
    """The report, on all ranks."""
    calibration, device, seqlen = prepared.calibration, device_name(prepared.device), prepared.seqlen
    seconds = outcome.timeline.seconds()
    windows = calibration.part(ranks.share(calibration.n)).n
    mine = RankRecord(
        socket.gethostname(), device, windows, seconds, ranks.waited, dict(ranks.sent), memory.peak_memory()
    )
    records = ranks.gather(mine)
    timelines = ranks.gather(outcome.timeline.spans)
    arguments = asdict(job.inputs) | {"seqlen": seqlen} | asdict(job.config) | asdict(job.output)
    arguments["output"] = str(arguments.pop("folder"))
    peak = {what: max(record.peak_memory[what] for record in records) for what in mine.peak_memory}
    return Report(
        arguments=arguments,
        versions=versions(),
        device=device,
        data=CalibrationText(calibration.source, calibration.hash, calibration.n, seqlen, job.inputs.seed),
        evaluation=[
            EvaluationText(samples.source, samples.hash, samples.n, seqlen, outcome.perplexity[samples.source])
            for samples in prepared.evaluation
        ],
        layers=outcome.layers,
        kept_dense=outcome.kept_dense,
        seconds=seconds,
        blocks=outcome.blocks,
        timeline=timelines[0]
        + [span for number, spans in enumerate(timelines[1:], 1) for span in of_rank(spans, number)],
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
        ranks=[] if ranks.alone else records,
        in_memory=job.folder is None,
    )
