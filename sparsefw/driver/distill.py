"""Recover a pruned model: fit all kept weights together, so that it predicts what the dense model does.

The whole pruned model is in memory. A chunk of windows goes through the dense model, block by block, and steps are made
on the windows of this chunk; then the next chunk follows. So memory does not grow with the number of windows.

The loss is the divergence of the two models' predictions (`model.head`). Gradients go back through the pruned model
block by block (`model.trail`), and the weights of a block move as in a reconstruction (`solver.kept_weights`), in steps
of several windows. Some windows are held out. If the loss on them does not fall, the pruned model stays as it was.

Memory holds one model, the optimizer's state, the gradients of one block, the activations of one window in all blocks
or in one, one dense block, and the hidden states of a chunk (`estimate.memory.recovery_needs`). A window takes 6 flops
per weight and token, or 8 if blocks run again; the forward of the dense model takes 2.
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
from sparsefw.model.gradients import deterministic, with_same_bits
from sparsefw.model.head import add_divergence, logits_of_batch
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.trail import Gradients, Trail
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


@dataclass(frozen=True)
class Chunk:
    """A chunk of windows, before the first block, and after the last block of the dense model."""

    batches: Sequence[Batch]
    start: HiddenStates
    dense: HiddenStates

    def close(self) -> None:
        """Release all tensors."""
        self.start.close()
        self.dense.close()


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
            first = _chunk(run, held_out)
            opened.callback(first.close)
            opened.enter_context(model.outside_loaded(checked=False))
            for i in model.unique_blocks:
                opened.callback(model.close, i)
                model.open_alone(i, pruned(i))
            found = _fit(run, layers, folder, first, windows)
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
def _chunk(run: Run, batches: Sequence[Batch]) -> Chunk:
    """Embed windows, and run them through the blocks of the dense model. The head is applied later."""
    model = run.model
    start = embed_batches(model, batches, Store(model.device, "host"))
    states = start.fork()
    for i, name in enumerate(model.names):
        with model.set_aside(model.names.index(name)):
            model.open(i, run.placement.ahead)
            states.advance(i)
            model.close(i)
    return Chunk(batches, start, states)


def _fit(
    run: Run,
    layers: Sequence[LayerResult],
    folder: Path,
    held_out: Chunk,
    windows: Iterator[Batch],
) -> Recovered:
    """Make the steps, and leave the best weights in the model.

    Args:
        run, layers, folder: as for `recovering`.
        held_out: the windows that are held out.
        windows: the windows that follow.
    """
    model = run.model
    weights = {
        i: KeptWeights(pruned_matrices(model, i, layers), run.config.backend, undo=False) for i in model.unique_blocks
    }
    step = partial(_step, model, weights, run.recovery.reruns)

    @torch.no_grad()
    def loss() -> float:
        each = [_step(model, {}, True, held_out, j) for j in range(len(held_out.batches))]
        return torch.stack(each).mean().item()

    def trial() -> Tensor:
        divergence = step(held_out, 0)
        for of_block in weights.values():
            of_block.forget()
        return divergence

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
        count = len(held_out.batches)
        digest = hashlib.sha256(b"".join(map(_content, held_out.batches))).hexdigest()
        plan = _plan(run, folder, count, digest, of_trial + of_loss / count)
        progress = Progress(folder, plan, [*weights.values()], of_loss, run.say)
        again = ", blocks run again in the backward" if run.recovery.reruns else ""
        made = f"; {progress.done} are made already" if progress.done else ""
        run.say(
            f"recovery: {counted(plan.steps, 'step')} of {plan.of_step * run.recovery.seqlen} tokens{again}{made}; "
            f"divergence on {counted(count, 'held-out window')}: {before:.4g}"
        )
        try:
            if before:
                _make_steps(run, plan, progress, step, loss, _learned(windows, held_out.batches))
        except KeyboardInterrupt:
            run.say("interrupted: the recovery ends here; interrupt again to stop without its result")
        if progress.done < plan.steps:
            progress.take_best(loss())
        for i, of_block in weights.items():
            of_block.close()
            model.round(i)
        after = loss()
    return Recovered(before, after, count + progress.done * plan.of_step, progress.done, digest)


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
    step: Callable[..., Tensor],
    loss: Callable[[], float],
    learned: Iterator[Batch],
) -> None:
    """Make the steps that are left, until the hours are over. `step` is `_step` of this model."""
    model, losses, limit = run.model, list[Tensor](), math.inf if plan.hours is None else 3600 * plan.hours
    of_steps = itertools.islice(learned, progress.done * plan.of_step, plan.steps * plan.of_step)
    for n, (chunk, j) in enumerate(_in_chunks(run, of_steps), 1):
        last = n % plan.of_step == 0
        # The rate falls with the steps or with the time, whichever is further.
        left = 1 - max(progress.done / plan.steps, progress.seconds / (limit or 1.0))
        rate = RATE * math.sqrt(plan.of_step / len(model.blocks)) * min(1.0, max(0.0, left / FALL))
        losses.append(step(chunk, j, rate=rate, more=not last))
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


def _in_chunks(run: Run, batches: Iterator[Batch]) -> Iterator[tuple[Chunk, int]]:
    """Yield windows chunk by chunk: the chunk, and the number of the window in it."""
    size = chunk_windows(run.shape, run.recovery.seqlen)
    while of_chunk := [*itertools.islice(batches, size)]:
        chunk = _chunk(run, of_chunk)
        yield from ((chunk, j) for j in range(len(of_chunk)))
        chunk.close()
        trim_memory()


def _step(
    model: BlockModel,
    weights: Mapping[int, KeptWeights],
    reruns: bool,
    chunk: Chunk,
    j: int,
    rate: float | None = None,
    more: bool = False,
) -> Tensor:
    """Compute the divergence of predictions in a window, mean over tokens, () fp32, and move weights to lower it.

    Args:
        model: the model, whose blocks have the pruned weights.
        weights: the optimizers of blocks by number; empty: only the divergence is wanted.
        reruns: see `Trail`.
        chunk, j: the chunk of the window, and its number in it.
        rate: rate of the step; None: gradients are computed, and no weight moves.
        more: as for `KeptWeights.step`.
    """
    total, batch = torch.zeros((), device=model.device), chunk.batches[j].to(model.device, model.in_fp32)
    dense, explained = chunk.dense, partial(model.explained, "a step through the whole model")
    seen = dense.unpadded(len(model.blocks) - 1, j)

    def of_tokens(predictions: Tensor) -> Tensor:
        """Reshape predictions to (1, tokens, vocabulary), without those of padding."""
        if seen is not None and seen.shape == predictions.shape[:-1]:
            predictions = predictions[seen]
        return predictions.reshape(1, -1, predictions.shape[-1])

    with torch.no_grad():
        p = of_tokens(logits_of_batch(model, batch, dense.hidden[j], dense.after_last(j)))
    trail = Trail(chunk.start, j, [x for of_block in weights.values() for x in of_block.parameters], reruns)
    with explained(), torch.set_grad_enabled(bool(weights)):
        graph, hidden, others = trail.end()
        q = of_tokens(logits_of_batch(model, batch, hidden, others))
    add_divergence(total, p, q.detach(), replace=bool(weights))
    if weights:
        gradients: Gradients = {}
        with explained():
            graph.pull_back([(q, p)], gradients)
            for i in reversed(range(len(model.blocks))):
                trail.pull_back(i, gradients)
                # A block that is used several times comes last where it is used first.
                if rate is not None and i in weights:
                    weights[i].step(rate, more)
    return total / q.shape[1]
