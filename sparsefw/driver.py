"""The block loop: read, calibrate, prune, evaluate and write a model one block at a time.

For every block: evaluate it dense; for every method run the calibration windows through the dense block (their input
is what the blocks pruned by that method gave) and accumulate Gram matrices, prune its layers, run the windows again
through the pruned block; write what the last method gave.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from sparsefw.checkpoint import check_finite
from sparsefw.data import Windows
from sparsefw.errors import InputError
from sparsefw.layers import capture
from sparsefw.prune import LayerResult, Settings, prune_layer
from sparsefw.stream import Stream, StreamedModel
from sparsefw.writer import Writer

# Tokens in one micro-batch: enough to fill a GPU, little beside a block's weights.
BATCH_TOKENS = 4096


@dataclass
class Outcome:
    """What a run measured.

    Attributes:
        layers: a row per layer and method.
        perplexity: of the held-out windows, by "dense" and by method; empty without evaluation.
        dense: names of the matrices inside the blocks that were not pruned.
        seconds: per phase.
    """

    layers: list[LayerResult] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to a phase."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started


def prune_model(
    model: StreamedModel,
    calibration: Windows,
    evaluation: Windows | None,
    methods: list[str],
    settings: Settings,
    ops: ModuleType,
    writer: Writer,
    *,
    on_layer: Callable[[LayerResult], None] = lambda row: None,
    on_block: Callable[[], None] = lambda: None,
) -> Outcome:
    """Prune every block of a model.

    Args:
        model: the streamed model; its blocks are used up.
        calibration: windows whose activations define the layer problems.
        evaluation: held-out windows for perplexity, or None.
        methods: pruned apart from each other, each on its own activations; what the last one gives is written.
        settings: how masks are chosen.
        ops: the kernels, `sparsefw.kernels.reference` or `sparsefw.kernels.fused`.
        writer: takes one shard per block and one for the rest.
        on_layer, on_block: called after every layer and every block.

    Raises:
        InputError: weights or activations hold NaN or Inf, or a layer does not fit the pattern.
    """
    outcome = Outcome()
    with outcome.clock("embed"):
        calibrating = _start(model, calibration, methods)
        held_out = {} if evaluation is None else _start(model, evaluation, ["dense", *methods])
    for i in range(len(model.blocks)):
        with outcome.clock("read"):
            block = model.open(i)
        if held_out:
            with outcome.clock("evaluate"):
                model.forward(i, held_out["dense"], advance=True)
        # Only where several methods start from the same block.
        weights = {n: p.clone() for n, p in block.named_parameters()} if len(methods) > 1 else {}
        for method in methods:
            if method != methods[0]:
                _restore(block, weights)
            stream = calibrating[method]
            _prune_block(model, i, stream, method, settings, ops, outcome, on_layer)
            with outcome.clock("forward"):
                model.forward(i, stream, advance=True)
            if held_out:
                with outcome.clock("evaluate"):
                    model.forward(i, held_out[method], advance=True)
        with outcome.clock("write"):
            writer.write(model.block_tensors(i))
            model.close(i)
        on_block()
    with outcome.clock("write"):
        writer.write(model.other_tensors())
    if evaluation is not None:
        with outcome.clock("evaluate"):
            outcome.perplexity = {n: perplexity(model, evaluation.ids, s) for n, s in held_out.items()}
    return outcome


def _prune_block(
    model: StreamedModel,
    i: int,
    stream: Stream,
    method: str,
    settings: Settings,
    ops: ModuleType,
    outcome: Outcome,
    on_layer: Callable[[LayerResult], None],
) -> None:
    prefix = model.names[i]
    precision = "ieee" if settings.precision == "ieee" else "tf32"
    with outcome.clock("calibrate"):
        layers, grams, dense = capture(
            model.blocks[i], lambda: model.forward(i, stream, advance=False), ops=ops, precision=precision
        )
    if not layers:
        raise InputError(f"{prefix}: unsupported model: no matrix of this block was seen in a product")
    for gram, G in grams.items():
        # Off the diagonal G is bounded by it.
        check_finite(f"inputs of {prefix}.{gram} (their squares, summed)", G.diagonal())
    outcome.dense += [n for n in (f"{prefix}.{name}" for name in dense) if n not in outcome.dense]
    last_use = {layer.gram: layer.name for layer in layers}
    with outcome.clock("solve"):
        for layer in layers:
            G = grams.pop(layer.gram) if last_use[layer.gram] == layer.name else grams[layer.gram]
            row = prune_layer(f"{prefix}.{layer.name}", layer.weight, G, method, settings, ops)
            outcome.layers.append(row)
            on_layer(row)


def perplexity(model: StreamedModel, ids: Tensor, stream: Stream) -> float:
    """exp of the mean negative log-likelihood over all windows.

    Args:
        model: its final norm and head are used.
        ids: (windows, seqlen) tokens.
        stream: the same windows after the last block.
    """
    losses, count = 0.0, 0
    for hidden in stream.hidden:
        batch = ids[count : count + len(hidden)]
        # One window at a time: logits over a large vocabulary are the largest tensor of a run.
        losses += sum(model.loss(batch[j : j + 1], hidden[j : j + 1]) for j in range(len(hidden)))
        count += len(hidden)
    return math.exp(losses / count)


def _start(model: StreamedModel, windows: Windows, names: list[str]) -> dict[str, Stream]:
    """A stream of the same windows for each name, before the first block."""
    stream = model.start(windows.ids, max(1, BATCH_TOKENS // windows.seqlen))
    return {name: stream.fork() for name in names}


@torch.no_grad()
def _restore(block: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in block.named_parameters():
        parameter.copy_(weights[name])
