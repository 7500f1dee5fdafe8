"""Fit all kept weights of a pruned model together, so that it predicts what the dense model does.

First all windows go through the dense model, block by block. Then the whole pruned model is loaded. A step takes one
window. The loss is the divergence of the two models' predictions (`model.head`). The backward goes through the whole
pruned model, and weights move as in a reconstruction (`solver.kept_weights`). Some windows are held out. If the loss on
held-out windows does not fall, nothing is written.

Memory holds one model, the optimizer's state, the gradient of one matrix and the activations of one window
(`estimate.gradients`). A step takes 6 flops per weight and token; the forward of the dense model takes 2.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefw import arithmetic, memory
from sparsefw.checkpoint.files import SUMS, check_output, file_digest
from sparsefw.checkpoint.source import Checkpoint, inspect
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.text import OWN_TEXT
from sparsefw.data.windows import window_length
from sparsefw.driver.job import Job, limits_of, workload_of
from sparsefw.driver.reconstruct import pruned_matrices
from sparsefw.driver.texts import own_text, windows_of_texts
from sparsefw.errors import InputError, counted, option
from sparsefw.estimate.memory import recovery_needs
from sparsefw.estimate.placement import fits, too_little
from sparsefw.estimate.profile import shape_of
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import pruned_shape
from sparsefw.extras.packed.folders import REPORT, rewrite
from sparsefw.extras.page.command import VARIABLES
from sparsefw.extras.verification import find_source
from sparsefw.inputs import Inputs, Output
from sparsefw.model import HiddenStates, StreamedModel
from sparsefw.model.activations import Store, split_batches
from sparsefw.model.forward import embed
from sparsefw.model.gradients import SliceGradients, deterministic, refused
from sparsefw.model.head import add_divergence, logits
from sparsefw.model.stubs import explained
from sparsefw.probe import say_kernel
from sparsefw.report.content import CalibrationText, Recovery, Report, report_of
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.kept_weights import KeptWeights

# The rate of the first step, see `solver.kept_weights`. All blocks move, so it is lower than in a reconstruction.
RATE = 0.03

# Number of log lines about the steps.
LINES = 10


def recover(pruned: Path, output: Output, given: dict[str, Any], say: Callable[[str], None]) -> Recovery:
    """Fit all kept weights of a pruned checkpoint together, and write it with its report.

    Args:
        pruned: folder of a checkpoint that `sparsefw run` wrote.
        output: where to write, and the memory limits.
        given: fields of Inputs that the user set; "model" names the dense model. Other fields are those of the run,
            except the seed, which is 1 above that of the run or of its last recovery.
        say: called with every line of the log.

    Raises:
        InputError: `pruned` has no report of a run, the two checkpoints are of different models, a memory limit is too
            low, or the loss on held-out windows does not fall.
    """
    report, source, job = _job(pruned, output, given, say)
    say_kernel(job.config, say)
    assert job.folder is not None
    dense, device = inspect(job.folder), memory.this_device()
    in_fp32 = arithmetic.computes_in_fp32(dense.dtype, device)
    shape = pruned_shape(shape_of(dense, in_fp32), job.config)
    with (
        StreamedModel(dense, device, in_fp32=in_fp32) as teacher,
        StreamedModel(source, device, in_fp32=in_fp32) as student,
    ):
        _check_models(job.folder, teacher, student)
        seqlen = window_length(job.inputs.model, job.inputs.seqlen, teacher.max_seqlen)
        limits = _check_memory(job, shape, seqlen, device)
        write, _ = own_text(job, teacher, shape, seqlen)
        windows, _ = windows_of_texts(job, seqlen, write)
        rounded = arithmetic.rounds_products(torch.float32 if in_fp32 else dense.dtype, device, shape.hidden)
        with (
            memory.gpu_limited(limits.get("gpu"), output.gpu_memory is not None),
            deterministic(refuse=False),
            arithmetic.rounded_products() if rounded else nullcontext(),
            student.outside_loaded(),
        ):
            states = _dense_outputs(teacher, student, windows.ids)
            with student.whole():
                before, after, steps = _fit(student, states, report, job.config, windows.ids, say)
                if not after < before:
                    raise InputError(
                        f"{pruned}: nothing is gained: the divergence on held-out windows goes from {before:.4g} to "
                        f"{after:.4g}; give more windows ({option('nsamples')})"
                    )
                states.close()
                text = CalibrationText(windows.source, windows.hash, windows.n, seqlen, job.inputs.seed)
                recovery = Recovery(job.inputs.model, job.inputs.dataset, text, before, after, steps)
                # The perplexities in the report were measured before the weights changed.
                report = replace(report, recoveries=[*report.recoveries, recovery], evaluation=[])
                texts = {REPORT: report.to_json()} | ({OWN_TEXT: windows.own} if windows.own else {})
                form, overwrite = _recovered(student), output.overwrite
                rewrite(source, output.folder, source.config, form, overwrite=overwrite, restart=True, texts=texts)
    say(f"divergence on held-out windows: {before:.4g} to {after:.4g}")
    say(f"checkpoint: {output.folder}")
    say(f"SHA-256 of {output.folder / SUMS}: {file_digest(output.folder / SUMS)}")
    return recovery


def _job(
    pruned: Path, output: Output, given: dict[str, Any], say: Callable[[str], None]
) -> tuple[Report, Checkpoint, Job]:
    """Read a pruned checkpoint and its report, and make the job of its recovery."""
    report, source = report_of(pruned), inspect(pruned)
    if source.quantization:
        raise InputError(f"{pruned}: packed; sparsefw unpack makes it dense again")
    model = given.get("model", None if report.in_memory else report.argument("model", str))
    try:
        folder, missing = find_source(report, pruned, model, "model")
    except InputError as error:
        if "model" not in given and option("model") not in str(error):
            error.add_note(f"give the dense model with {option('model')}")
        raise
    if folder is None:
        raise InputError(missing)
    kinds = dict(model=str, dataset=tuple, nsamples=int, seqlen=int)
    of_run: dict[str, Any] = {name: report.argument(name, kind) for name, kind in kinds.items()}
    # A new seed draws new windows: the weights are already fitted to the windows of earlier seeds.
    seed = (report.recoveries[-1].data.seed if report.recoveries else report.argument("seed", int)) + 1
    inputs = Inputs(**of_run | {"seed": seed, "evaluate": ()} | given)
    if any(text in VARIABLES for text in inputs.shares):
        raise InputError(f"{pruned}: calibrated on data without a name; give a text with {option('dataset')}")
    if inputs.nsamples < 2:
        raise InputError(f"{option('nsamples', inputs.nsamples)}: give two windows or more, since one is held out")
    for read in (folder, pruned):
        check_output(output.folder, read, output.overwrite, inputs.paths)
    begun = Writer(output.folder, 0, restart=output.restart).begun().get("identity")
    if begun and (begun.get("source"), begun.get("form")) != (str(pruned.resolve()), source.config):
        raise InputError(
            f"{output.folder}: has an unfinished run with other input; discard it with {option('restart', True)}, or "
            "choose another folder"
        )
    # Discard the files of an interrupted recovery: this one starts over, and its weights may have other bits.
    with Writer(output.folder, 0, overwrite=output.overwrite, restart=True) as emptied:
        emptied.check_space(sum(x.stored_nbytes for x in source.tensors.values()))
    include, ignore = (report.argument(name, tuple) for name in ("include", "ignore"))
    config = PruneConfig(report.argument("sparsity", str), include=include, ignore=ignore).on(memory.this_device())
    return report, source, Job(inputs, config, output, folder=folder, say=say)


def _check_memory(job: Job, shape: ModelShape, seqlen: int, device: torch.device) -> dict[str, int]:
    """Refuse memory limits that are too low, and return the limits."""
    workload = workload_of(job, [job.inputs.nsamples], seqlen, device)
    limits, needs = limits_of(job, device), recovery_needs(shape, workload)
    if not fits(needs, limits):
        raise too_little([needs], limits, f"shorter windows ({option('seqlen', seqlen)})")
    return limits


def _check_models(folder: Path, teacher: StreamedModel, student: StreamedModel) -> None:
    """Refuse checkpoints of two different models, and models that do not predict tokens."""
    if teacher.runs is not teacher.model or not teacher.logits_itemsize:
        raise InputError(f"{folder}: unsupported model: {type(teacher.model).__name__} predicts no tokens of a text")
    with teacher.outside_loaded(), student.outside_loaded():
        dense, pruned = (dict(model.model.named_parameters()) for model in (teacher, student))
        alike = dense.keys() == pruned.keys() and all(
            # Parameters inside the blocks have no data here. The others are never pruned, so they must be equal.
            (x.shape, x.dtype) == (pruned[name].shape, pruned[name].dtype)
            and (x.is_meta or torch.equal(x, pruned[name]))
            for name, x in dense.items()
        )
    if not alike:
        raise InputError(f"{folder}: not the model that was pruned; give the dense model with {option('model')}")


def _recovered(student: StreamedModel) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """Make the argument `convert` of `rewrite`: a function that replaces a tensor by the student's."""
    block_of = {name: i for i in student.unique_blocks for name in student.tensors_of(i)}

    @lru_cache(1)
    def tensors_of(i: int) -> dict[str, Tensor]:
        tensors = student.block_tensors(i)
        if student.device.type == "cuda":
            # Copies to the host are asynchronous.
            torch.cuda.current_stream(student.device).record_event().synchronize()
        return tensors

    return lambda name, x: {name: tensors_of(block_of[name]).get(name, x) if name in block_of else x}


@torch.no_grad()
def _dense_outputs(teacher: StreamedModel, student: StreamedModel, ids: Tensor) -> HiddenStates:
    """Run all windows through the blocks of the dense model, and return their hidden states.

    The head is the same in both models, so it is applied later.
    """
    states = embed(student, ids, 1, Store(student.device, "host"))
    for i, block in enumerate(teacher.blocks):
        teacher.open(i)
        states.advance(i, block)
        teacher.close(i)
    return states


def _fit(
    student: StreamedModel,
    states: HiddenStates,
    report: Report,
    config: PruneConfig,
    ids: Tensor,
    say: Callable[[str], None],
) -> tuple[float, float, int]:
    """Make a step for each window that is not held out.

    Args:
        student: the whole pruned model, in memory.
        states: the hidden states of the windows after the last block of the dense model.
        report: the report of the run that made the pruned model.
        config: has the backend of the steps.
        ids: (windows, seqlen) tokens.
        say: called with the mean loss of every tenth of the steps.

    Returns:
        The loss on held-out windows before and after the steps, and the number of steps.
    """
    layers = report.layers_of(report.method)
    matrices = []
    for i in student.unique_blocks:
        matrices += pruned_matrices(student, i, (x for x in layers if x.name.startswith(f"{student.names[i]}.")))
    learned, held_out = split_batches(len(ids))
    windows = ids.to(student.device).split(1)
    step = partial(_step, student, states, windows)

    def loss() -> float:
        with torch.no_grad():
            return torch.stack([step(j) for j in held_out]).mean().item()

    weights = KeptWeights(matrices, len(learned), RATE, config.backend, undo=False)
    if operation := _operation_that_varies(partial(step, learned[0], weights, trial=True)):
        say(f"another run may give other bits: {operation}")
    with deterministic(refuse=not operation):
        before, losses = loss(), list[Tensor]()
        say(f"recovery: {len(learned)} steps; divergence on {counted(len(held_out), 'held-out window')}: {before:.4g}")
        if not math.isfinite(before):
            raise InputError("the pruned model: its predictions are NaN or Inf; prune again")
        if not before:
            remedy = f"give the dense model with {option('model')}"
            raise InputError(f"both models predict the same, so nothing can be recovered; {remedy}")
        for n, j in enumerate(learned, 1):
            losses.append(step(j, weights))
            if n % -(-len(learned) // LINES) == 0:
                say(f"step {n} of {len(learned)}: divergence {torch.stack(losses).mean().item():.4g}")
                losses.clear()
        weights.close()
        for i in student.unique_blocks:
            student.round(i)
        return before, loss(), len(learned)


def _operation_that_varies(trial: Callable[[], object]) -> str:
    """Name an operation of a step that may give other bits in another run; empty if there is no such operation.

    This needs a trial, because a real step that fails cannot be repeated: it moves weights during the backward.
    """
    try:
        with deterministic():
            trial()
    except (InputError, RuntimeError) as error:
        if operation := refused(error):
            return operation
        raise
    return ""


def _step(
    student: StreamedModel,
    states: HiddenStates,
    windows: Sequence[Tensor],
    j: int,
    weights: KeptWeights | None = None,
    trial: bool = False,
) -> Tensor:
    """Compute the divergence of predictions in window j, mean over tokens, () fp32, and move weights to lower it.

    Args:
        student, states: as for `_fit`.
        windows: (1, seqlen) tokens of each window, on the device.
        j: number of the window.
        weights: optimizer of the weights to move; None: no weight moves.
        trial: as for `KeptWeights.step`.
    """
    ids, total = windows[j], torch.zeros((), device=student.device)
    context = type(student.model).__name__, "a step through the whole model"
    with torch.no_grad():
        p = logits(student, ids, states.hidden[j], states.after_last(j))
    with explained(*context), SliceGradients(weights.parameters if weights else ()) as slices:
        q: Tensor = student.model(input_ids=ids, use_cache=False).logits
    add_divergence(total, p, q.detach(), replace=weights is not None)
    if weights:
        with explained(*context):
            weights.step(partial(torch.autograd.backward, q, p, inputs=slices.leaves), trial)
    return total / ids.numel()
