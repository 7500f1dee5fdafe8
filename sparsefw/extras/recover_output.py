"""Recover an output that is there: `python -m sparsefw.recover PRUNED OUTPUT`.

The pruned blocks are copied into the output's folder, as if a run had just finished them. Then follows the recovery at
the end of a run (`driver.recovery`), with other windows than the run's.
"""

import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparsefw import memory
from sparsefw.checkpoint.files import SUMS, check_output, durably, file_digest
from sparsefw.checkpoint.source import Checkpoint, fingerprint, inspect, stamps
from sparsefw.checkpoint.tensors import dequantized, read_tensors
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.text import OWN_TEXT
from sparsefw.data.windows import Windows, window_length
from sparsefw.driver.block import share_of_zeros
from sparsefw.driver.job import Job, Run, limits_of, workload_of
from sparsefw.driver.recovery import pruned_report, recover, settle_recovery
from sparsefw.driver.resume import IN_FP32, ROUNDED, computes_in_fp32, resumed, rounds_products
from sparsefw.driver.texts import own_text, stream_of, tokenizer_of
from sparsefw.errors import InputError, Say, flag_of, option
from sparsefw.estimate.profile import shape_of
from sparsefw.estimate.workload import pruned_shape
from sparsefw.extras.page import write_pages
from sparsefw.extras.page.command import VARIABLES
from sparsefw.extras.verification import find_source
from sparsefw.inputs import Inputs, Output
from sparsefw.model.streamed import StreamedModel
from sparsefw.probe import say_kernel
from sparsefw.report.content import SPARSE, Recovery, Report, commit, device_and_versions, report_of
from sparsefw.solver.config import PruneConfig, default_recovery


def recover_output(pruned: Path, output: Output, given: dict[str, Any], say: Say) -> Recovery | None:
    """Fit all kept weights of a pruned checkpoint together, and write it with its report.

    Args:
        pruned: folder of a pruned checkpoint.
        output: where to write, and the memory limits.
        given: fields of Inputs that the user set, and "recover", the number of tokens. "model" names the dense model.
            Other fields are those of the run, except the seed, which is 1 above that of the run or of its last
            recovery.
        say: called with every line of the log.

    Returns:
        The recovery. None if the loss on held-out windows does not fall; then nothing is written.

    Raises:
        InputError: `pruned` has no report of a run, the two checkpoints are of different models, or a memory limit is
            too low.
    """
    report, source, job = _job(pruned, output, given, say)
    say_kernel(job.config, say)
    assert job.folder is not None
    dense, device = inspect(job.folder), memory.this_device()
    in_fp32 = computes_in_fp32(job, dense.dtype, device)
    with StreamedModel(dense, device, in_fp32=in_fp32) as model:
        _check_models(job.folder, model, source)
        run = _run(job, model, dense)
        model.open_alone(run.first)
        if share_of_zeros(run, run.first) > max(SPARSE, report.zeros):
            raise InputError(f"{job.folder}: is pruned, too; give the dense model with {option('model')}")
        model.close(run.first)
        values = {flag_of(name): value for name, value in asdict(job.inputs).items() if name != "model"}
        values |= {
            "the dense model": run.fingerprint,
            "the dense model's files": stamps(dense),
            "what was pruned": stamps(source),
            IN_FP32: in_fp32,
            ROUNDED: run.rounded,
            **device_and_versions(device),
        }
        shards = [*map(model.tensors_of, model.unique_blocks), *model.pieces]
        with Writer(
            output.folder, len(shards), values, source=pruned, overwrite=output.overwrite, restart=output.restart
        ) as writer:
            writer.check_space(2 * sum(x.stored_nbytes for x in source.tensors.values()) - writer.written)
            for n, names in enumerate(shards):
                if n not in writer.records:
                    read = read_tensors({name: source.tensors[name] for name in names})
                    writer.write(n, {name: dequantized(x) for name, x in read.items()})
            # The perplexities in the report were measured before the weights changed.
            named = [text for text in report.argument("evaluate", tuple) if text not in VARIABLES] or ["TEXT"]
            texts = "".join(f" --eval {shlex.quote(text)}" for text in named)
            report = replace(report, evaluation=[])
            own = recover(run, writer, pruned_report(run, writer) or report).recovery
            if own is None or own == report.recovery:
                writer.discard()
                return None
            assert run.stream
            data = replace(own.data, source=run.stream.source or " + ".join(job.inputs.shares), seed=job.inputs.seed)
            own = replace(own, data=data, versions=device_and_versions(device) | commit())
            report = replace(report, recoveries=[*report.recoveries, own])
            durably(writer.folder / "report.json", report.to_json())
            if run.stream.own:
                durably(writer.folder / OWN_TEXT, run.stream.own)
            writer.finish(partial(write_pages, report, writer.output, pruned, say))
    say(f"checkpoint: {output.folder}")
    folders = f"{shlex.quote(str(output.folder))} --against {shlex.quote(str(pruned))}"
    say(f"perplexity: python -m sparsefw.evaluate {folders}{texts}")
    say(f"SHA-256 of {output.folder / SUMS}: {file_digest(output.folder / SUMS)}")
    return own


def _run(job: Job, model: StreamedModel, dense: Checkpoint) -> Run:
    """Make the run whose recovery follows, with its windows and its memory limits."""
    seqlen = window_length(job.inputs.model, job.inputs.seqlen, model.max_seqlen)
    shape = pruned_shape(shape_of(dense, model.in_fp32), job.config)
    generate, _ = own_text(job, model, shape, seqlen)
    stream = stream_of(job, tokenizer_of(job), seqlen, generate)
    rounded = rounds_products(job, model, dense.dtype, shape.hidden)
    run = Run(
        job,
        model,
        job.inputs.model,
        dense.dtype,
        shape,
        # The recovery takes all windows from the stream.
        Windows(torch.empty(0, seqlen, dtype=torch.int64), "", ""),
        [],
        seqlen,
        [],
        fingerprint(dense),
        stream,
        limits=limits_of(job, model),
        rounded=rounded,
    )
    return settle_recovery(run, workload_of(job, [job.inputs.nsamples], seqlen, model))


def _job(pruned: Path, output: Output, given: dict[str, Any], say: Say) -> tuple[Report, Checkpoint, Job]:
    """Read a pruned checkpoint and its report, and make the job of its recovery."""
    report, source = report_of(pruned), inspect(pruned)
    if source.quantization:
        raise InputError(f"{pruned}: packed; python -m sparsefw.unpack makes it dense again")
    model = given.get("model", None if report.in_memory else report.argument("model", str))
    try:
        folder, missing = find_source(report, pruned, model, "model")
    except InputError as error:
        if "model" not in given and option("model") not in str(error):
            error.add_note(f"give the dense model with {option('model')}")
        raise
    if folder is None:
        raise InputError(missing)
    of_run: dict[str, Any] = {
        name: report.argument(name, kind)
        for name, kind in dict(model=str, dataset=tuple, nsamples=int, seqlen=int).items()
    }
    # A new seed draws new windows: the weights are already fitted to the windows of earlier seeds.
    seed = (report.recoveries[-1].data.seed if report.recoveries else report.argument("seed", int)) + 1
    named = of_run | {"seed": seed, "evaluate": (), "recover": None} | given
    tokens = named.pop("recover")
    inputs = Inputs(**named)
    if any(text in VARIABLES for text in inputs.shares):
        raise InputError(f"{pruned}: calibrated on data without a name; give a text with {option('dataset')}")
    if tokens is None and output.hours is None:
        tokens = default_recovery(of_run["nsamples"], of_run["seqlen"])
    elif tokens == 0:
        raise InputError(f"{option('recover', 0)}: there is nothing to do")
    # What is read may not be replaced, so nothing advises that first.
    check_output(output.folder, pruned, True, inputs.paths)
    check_output(output.folder, folder, output.overwrite, inputs.paths)
    config = PruneConfig(
        report.argument("sparsity", str),
        include=report.argument("include", tuple),
        ignore=report.argument("ignore", tuple),
        recover=tokens,
    ).on(memory.this_device())
    return report, source, resumed(Job(inputs, config, output, folder=folder, say=say, given=given))


def _check_models(folder: Path, model: StreamedModel, source: Checkpoint) -> None:
    """Refuse checkpoints of two different models, and models that do not predict tokens."""
    if model.runs is not model.model or not model.logits_itemsize:
        raise InputError(f"{folder}: unsupported model: {model.class_name} predicts no tokens of a text")
    dense, pruned = ({name: x.shape for name, x in infos.items()} for infos in (model.infos, source.tensors))
    alike = dense == pruned
    for piece in model.pieces if alike else ():
        # Tensors outside of the blocks are never pruned, so they must be equal.
        written = read_tensors({name: source.tensors[name] for name in piece})
        alike &= all(torch.equal(x, dequantized(written[name])) for name, x in model.other_tensors(piece).items())
    if not alike:
        raise InputError(f"{folder}: not the model that was pruned; give the dense model with {option('model')}")
