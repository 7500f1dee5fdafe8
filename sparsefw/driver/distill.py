"""Recover a pruned model: fit all kept weights together, so that it predicts what the dense model does.

The whole pruned model is in memory. A chunk of windows goes through the dense model, block by block, and steps are made
on the windows of this chunk; then the next chunk follows. So memory does not grow with the number of windows.

The loss is the divergence of the two models' predictions (`model.head`). The backward goes through the whole pruned
model, and weights move as in a reconstruction (`solver.kept_weights`), in steps of several windows. Some windows are
held out. If the loss on them does not fall, the pruned model stays as it was.

Memory holds one model, the optimizer's state, the gradient of one matrix, the activations of one window, one dense
block, and the hidden states of a chunk (`estimate.memory.recovery_needs`). A window takes 6 flops per weight and token;
the forward of the dense model takes 2.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparsefw import arithmetic
from sparsefw.data.batches import Batch, bytes_of
from sparsefw.driver.job import Run
from sparsefw.driver.reconstruct import pruned_matrices
from sparsefw.driver.saves import Plan, Progress, begun
from sparsefw.errors import InputError, counted
from sparsefw.estimate.memory import MOST_HELD_OUT, chunk_windows
from sparsefw.memory import trim_memory
from sparsefw.model.activations import Store
from sparsefw.model.block_model import BlockModel
from sparsefw.model.forward import embed_batches
from sparsefw.model.gradients import SliceGradients, deterministic, with_same_bits
from sparsefw.model.head import add_divergence, logits_of_batch
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.solver.kept_weights import KeptWeights
from sparsefw.solver.layer import LayerResult

# The rate of the first step is that of a reconstruction, over the square root of the number of blocks, since all blocks
# move. Steps of k windows take sqrt(k) times this rate. It stays until the share FALL of the steps is left, and then
# falls to 0 in a line.
RATE, FALL = 0.16, 1 / 3

# A step has up to MOST_TOKENS tokens, but no more than leave LEAST_STEPS steps.
MOST_TOKENS, LEAST_STEPS = 32768, 1024

# One window in HELD_OUT is held out. More than MOST_REPEATED windows in a row are never like those that are held out.
HELD_OUT, MOST_REPEATED = 16, 1000

# Number of log lines about the steps.
LINES = 10

# Returns the tensors of a pruned block by its number.
Pruned = Callable[[int], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Recovered:
    """The outcome of a recovery: divergence of predictions on held-out windows, mean over tokens, and the work.

    Attributes:
        before, after: the divergence before and after. If `after` is not below `before`, nothing is gained.
        windows, steps: number of windows, with the held-out ones, and of steps.
        hash: SHA-256 of the held-out windows, in hex.
    """

    before: float
    after: float
    windows: int
    steps: int
    hash: str


@contextmanager
def recovering(
    run: Run, pruned: Pruned, layers: Sequence[LayerResult], windows: Iterator[Batch], folder: Path
) -> Iterator[Recovered]:
    """Recover a model. Inside the `with` block its blocks are open and have the new weights, rounded.

    Args:
        run: the run, with the plan of its recovery. Its model is the dense one.
        pruned: returns the tensors of a pruned block by its number, see `BlockModel.block_tensors`.
        layers: the results of the pruned layers.
        windows: windows without end, each as a batch of its own; they may repeat.
        folder: folder for the states from which the recovery goes on after a kill.

    Raises:
        InputError: predictions are NaN or Inf, or a step fails.
    """
    model, number = run.model, _number(run)
    # Windows may repeat, and most of them must be left to learn from.
    most = min(MOST_HELD_OUT, run.job.inputs.nsamples // 4, number // HELD_OUT)
    held_out = [*itertools.islice(windows, max(1, most))]
    rounded = arithmetic.rounded_products() if run.rounded else nullcontext()
    with ExitStack() as opened:
        with rounded, deterministic(refuse=False):
            states = _dense_outputs(run, held_out)
            opened.callback(states.close)
            opened.enter_context(model.outside_loaded(checked=False))
            for i in model.unique_blocks:
                opened.callback(model.close, i)
                model.open_alone(i, pruned(i))
            found = _fit(run, layers, folder, held_out, states, windows)
        yield found


def _number(run: Run) -> int:
    """Return the number of windows that the recovery takes; a large number if hours limit it."""
    tokens = run.config.recover
    return 10**9 if tokens is None else max(2, -(-tokens // run.recovery.seqlen))


def _learned(windows: Iterator[Batch], held_out: Sequence[Batch]) -> Iterator[Batch]:
    """Yield the windows to learn from: where windows repeat, those that are held out are left out.

    Raises:
        InputError: there are no other windows.
    """
    known, left_out = {*map(_content, held_out)}, 0
    for batch in windows:
        left_out = left_out + 1 if _content(batch) in known else 0
        if not left_out:
            yield batch
        elif left_out == MOST_REPEATED:
            raise InputError("recovery: all windows are like those that are held out; give more text")


@torch.no_grad()
def _dense_outputs(run: Run, batches: Sequence[Batch]) -> HiddenStates:
    """Run windows through the blocks of the dense model, and return their hidden states on the host.

    The head is the same in both models, so it is applied later.
    """
    model = run.model
    states = embed_batches(model, batches, Store(model.device, "host"))
    for i, name in enumerate(model.names):
        with model.set_aside(model.names.index(name)):
            model.open(i, run.placement.ahead)
            states.advance(i)
            model.close(i)
    return states


def _fit(
    run: Run,
    layers: Sequence[LayerResult],
    folder: Path,
    held_out: Sequence[Batch],
    states: HiddenStates,
    windows: Iterator[Batch],
) -> Recovered:
    """Make the steps, and leave the best weights in the model.

    Args:
        run, layers, folder: as for `recovering`.
        held_out: the windows that are held out.
        states: their hidden states after the last block of the dense model.
        windows: the windows that follow.
    """
    model = run.model
    matrices = [
        pruned_matrices(model, i, (x for x in layers if x.name.startswith(f"{model.names[i]}.")))
        for i in model.unique_blocks
    ]
    weights = KeptWeights([x for of_block in matrices for x in of_block], run.config.backend, undo=False)

    @torch.no_grad()
    def loss() -> float:
        each = [_step(model, states, j, batch) for j, batch in enumerate(held_out)]
        return torch.stack(each).mean().item()

    trial = partial(_step, model, states, 0, held_out[0], weights, rate=0.0, trial=True)
    # A trial, because a real step that fails cannot be repeated: it moves weights during the backward.
    varies = list[str]()
    with_same_bits(trial, varies)
    if varies:
        run.say(f"another run may give other bits: {varies[0]}")
    with deterministic(refuse=not varies):
        # The first trial also loads what all steps use. A number on the host waits for all that the GPU has to do.
        began = time.perf_counter()
        trial().item()
        of_trial = time.perf_counter() - began
        before = loss()
        if not math.isfinite(before):
            raise InputError("the pruned model: its predictions are NaN or Inf; prune again")
        of_loss = time.perf_counter() - began - of_trial
        digest = hashlib.sha256(b"".join(map(_content, held_out))).hexdigest()
        plan = _plan(run, folder, len(held_out), digest, of_trial + of_loss / len(held_out))
        progress = Progress(folder, plan, weights, [len(of_block) for of_block in matrices], of_loss, run.say)
        made = f"; {progress.done} are made already" if progress.done else ""
        run.say(
            f"recovery: {counted(plan.steps, 'step')} of {plan.of_step * run.recovery.seqlen} tokens{made}; divergence "
            f"on {counted(len(held_out), 'held-out window')}: {before:.4g}"
        )
        try:
            if before:
                _make_steps(run, plan, progress, weights, loss, _learned(windows, held_out))
        except KeyboardInterrupt:
            run.say("interrupted: the recovery ends here; interrupt again to stop without its result")
        if progress.done < plan.steps:
            progress.take_best(loss())
        weights.close()
        for i in model.unique_blocks:
            model.round(i)
        after = loss()
    return Recovered(before, after, len(held_out) + progress.done * plan.of_step, progress.done, digest)


def _plan(run: Run, folder: Path, held_out: int, digest: str, seconds: float) -> Plan:
    """Plan the steps: as many as the tokens make, or as many as fit into the hours if a window takes `seconds`.

    `held_out` is the number of the held-out windows, and `digest` their hash.
    """
    known, hours, number, seqlen = begun(folder), run.job.output.hours, _number(run), run.recovery.seqlen
    if run.config.recover is None and hours is not None:
        if known and (known.plan.hours, known.plan.seqlen, known.plan.hash) == (hours, seqlen, digest):
            return known.plan
        number = int(3600 * hours / seconds)
    of_step = windows_of_step(number, seqlen)
    return Plan(max(1, (number - held_out) // of_step), of_step, seqlen, digest, hours)


def windows_of_step(windows: int, seqlen: int) -> int:
    """Choose the number of windows in a step."""
    return max(1, min(MOST_TOKENS // seqlen, windows // LEAST_STEPS))


def _make_steps(
    run: Run,
    plan: Plan,
    progress: Progress,
    weights: KeptWeights,
    loss: Callable[[], float],
    learned: Iterator[Batch],
) -> None:
    """Make the steps that are left, until the hours are over."""
    model, losses, limit = run.model, list[Tensor](), math.inf if plan.hours is None else 3600 * plan.hours
    of_steps = itertools.islice(learned, progress.done * plan.of_step, plan.steps * plan.of_step)
    for n, (states, j, batch) in enumerate(_with_dense(run, of_steps), 1):
        last = n % plan.of_step == 0
        # The rate falls with the steps or with the time, whichever is further.
        left = 1 - max(progress.done / plan.steps, progress.seconds / (limit or 1.0))
        rate = RATE * math.sqrt(plan.of_step / len(model.blocks)) * min(1.0, max(0.0, left / FALL))
        losses.append(_step(model, states, j, batch, weights, rate=rate, more=not last))
        if not last:
            continue
        progress.done += 1
        if progress.done % -(-plan.steps // LINES) == 0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            seconds = progress.seconds / progress.done * (plan.steps - progress.done)
            time_left = f", {tqdm.format_interval(seconds)} left" if progress.done < plan.steps else ""
            run.say(f"step {progress.done} of {plan.steps}{time_left}: divergence {mean:.4g}")
        if progress.seconds > limit:
            run.say(f"{plan.hours:g} hours are over: the recovery ends after {counted(progress.done, 'step')}")
            return
        if progress.is_due and progress.done < plan.steps:
            progress.save(loss)


def _content(batch: Batch) -> bytes:
    """Return the bytes of a batch's tensors."""
    return b"".join(map(bytes_of, batch.tensors))


def _with_dense(run: Run, batches: Iterator[Batch]) -> Iterator[tuple[HiddenStates, int, Batch]]:
    """Yield windows chunk by chunk: the dense hidden states of the chunk, the number in it, and the window."""
    size = chunk_windows(run.shape, run.recovery.seqlen)
    while chunk := [*itertools.islice(batches, size)]:
        states = _dense_outputs(run, chunk)
        for j, batch in enumerate(chunk):
            yield states, j, batch
        states.close()
        trim_memory()


def _step(
    model: BlockModel, states: HiddenStates, j: int, batch: Batch, weights: KeptWeights | None = None, **of_step: Any
) -> Tensor:
    """Compute the divergence of predictions in a window, mean over tokens, () fp32, and move weights to lower it.

    Args:
        model: the model, whose blocks have the pruned weights.
        states, j: the window's hidden states after the last block of the dense model.
        batch: the window.
        weights: optimizer of the weights to move; None: no weight moves.
        of_step: arguments of `KeptWeights.step`.
    """
    total, batch = torch.zeros((), device=model.device), batch.to(model.device, model.in_fp32)
    explained = partial(model.explained, "a step through the whole model")
    seen = states.unpadded(len(model.blocks) - 1, j)

    def of_tokens(predictions: Tensor) -> Tensor:
        """Reshape predictions to (1, tokens, vocabulary), without those of padding."""
        if seen is not None and seen.shape == predictions.shape[:-1]:
            predictions = predictions[seen]
        return predictions.reshape(1, -1, predictions.shape[-1])

    with torch.no_grad():
        p = of_tokens(logits_of_batch(model, batch, states.hidden[j], states.after_last(j)))
    slices = SliceGradients(weights.parameters if weights else ())
    with explained(), torch.set_grad_enabled(weights is not None), slices:
        q = of_tokens(model.model(*batch.args, **batch.kwargs).logits)
    add_divergence(total, p, q.detach(), replace=weights is not None)
    if weights:
        with explained():
            weights.step(backward=partial(torch.autograd.backward, q, p, inputs=slices.leaves), **of_step)
    return total / q.shape[1]
