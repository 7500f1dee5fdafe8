"""The block loop: read, calibrate, prune, evaluate and write a model one block at a time.

For every block: evaluate it dense; for every method run the calibration windows through the dense block (their input
is what the blocks pruned by that method gave) and accumulate Gram matrices, prune its layers, run the windows again
through the pruned block; write what the last method gave.

Where layers approximate the dense model's outputs, the same windows also go through the dense model, and a block is
pruned in stages: the inputs of later layers are measured after earlier ones are pruned.
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from sparsefw import allocation
from sparsefw.checkpoint import check_finite
from sparsefw.errors import InputError
from sparsefw.layers import Layer, Stage, capture, not_pruned, stages
from sparsefw.methods import Settings
from sparsefw.prune import LayerResult, prune_layers
from sparsefw.stream import Stream, StreamedModel
from sparsefw.windows import Windows
from sparsefw.writer import Writer

# Tokens in one micro-batch: enough to fill a GPU, little beside a block's weights.
BATCH_TOKENS = 4096

# Share of the micro-batches on which `--alpha auto` compares.
HELD_OUT = 0.125

# Name of the streams through the model as it was.
DENSE = "dense"

# Per block, what each layer keeps by name: of every row, or in all; see `allocation.whole_budgets`.
Budgets = list[dict[str, int | Tensor]]


@dataclass
class Outcome:
    """What a run measured.

    Attributes:
        layers: a row per layer and method.
        perplexity: by held-out text, then by "dense" and by method; empty without evaluation.
        dense: names of the matrices inside the blocks that were not pruned.
        seconds: per phase.
    """

    layers: list[LayerResult] = field(default_factory=list)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
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


@dataclass
class _Dense:
    """The dense model before a block, for a method whose layers approximate its outputs.

    Attributes:
        block: the block as it was.
        stream: the calibration windows in the dense model. The final stage, which runs all of the block, moves them
            on to the next one.
    """

    block: nn.Module
    stream: Stream


def prune_model(
    model: StreamedModel,
    calibration: Windows,
    evaluation: list[Windows],
    methods: list[str],
    settings: Settings,
    ops: ModuleType,
    writer: Writer,
    *,
    budgets: Budgets | None = None,
    on_layer: Callable[[LayerResult], None] = lambda row: None,
    on_block: Callable[[], None] = lambda: None,
) -> Outcome:
    """Prune every block of a model.

    Args:
        model: the streamed model; its blocks are used up.
        calibration: windows whose activations define the layer problems.
        evaluation: held-out windows for perplexity, of each text.
        methods: pruned apart from each other, each on its own activations; what the last one gives is written.
        settings: how masks are chosen.
        ops: the kernels, `sparsefw.kernels.reference` or `sparsefw.kernels.fused`.
        writer: takes one shard per block and one for the rest.
        budgets: what every layer keeps, from `allocate`; None is uniform.
        on_layer, on_block: called after every layer and every block.

    Raises:
        InputError: weights or activations hold NaN or Inf, or a layer does not fit the pattern.
    """
    outcome = Outcome()
    followed = settings.target == "dense" and "sparsefw" in methods
    with outcome.clock("embed"):
        calibrating = _start(model, calibration, [DENSE, *methods] if followed else methods)
        # By text and method.
        held_out = [_start(model, windows, [DENSE, *methods]) for windows in evaluation]
    for i in range(len(model.blocks)):
        with outcome.clock("read"):
            block = model.open(i)
            # Only where it is needed after the block has been pruned.
            dense = copy.deepcopy(block) if followed or len(methods) > 1 else None
        if held_out:
            with outcome.clock("evaluate"):
                _advance(model, i, held_out, DENSE)
        for method in methods:
            if method != methods[0]:
                _restore(block, dense)
            stream = calibrating[method]
            follows = _Dense(dense, calibrating[DENSE]) if followed and method == "sparsefw" else None
            kept = budgets[i] if budgets else {}
            _prune_block(model, i, stream, follows, method, settings, ops, kept, outcome, on_layer)
            with outcome.clock("forward"):
                model.advance(i, stream)
            if held_out:
                with outcome.clock("evaluate"):
                    _advance(model, i, held_out, method)
        with outcome.clock("write"):
            writer.write(model.block_tensors(i))
            model.close(i)
        on_block()
    with outcome.clock("write"):
        writer.write(model.other_tensors())
    for windows, streams in zip(evaluation, held_out, strict=True):
        with outcome.clock("evaluate"):
            outcome.perplexity[windows.source] = {n: perplexity(model, windows.ids, s) for n, s in streams.items()}
    return outcome


def _prune_block(
    model: StreamedModel,
    i: int,
    stream: Stream,
    follows: _Dense | None,
    method: str,
    settings: Settings,
    ops: ModuleType,
    budgets: dict[str, int | Tensor],
    outcome: Outcome,
    on_layer: Callable[[LayerResult], None],
) -> None:
    """Prune block i; with `follows` its layers approximate the dense model's outputs."""
    prefix, block = model.names[i], model.blocks[i]
    batches, kept_out = _parts(stream, method, settings)
    with outcome.clock("calibrate"):
        order = stages(block, lambda: model.output(i, stream, 0)) if follows else []
    pruned = []
    for stage in order or [None]:
        with outcome.clock("calibrate"):
            layers, grams, crosses = _capture(model, i, stream, batches, settings, ops, stage, follows)
            held_out = {}
            if kept_out:
                layers_too, held_out, more = _capture(model, i, stream, kept_out, settings, ops, stage, follows)
                layers = list({layer.name: layer for layer in [*layers, *layers_too]}.values())
                # An expert may have seen tokens in one part only: the other part's Gram matrix is zero.
                for name in grams.keys() | held_out.keys():
                    present = grams.get(name, held_out.get(name))
                    grams.setdefault(name, torch.zeros_like(present))
                    held_out.setdefault(name, torch.zeros_like(present))
                for name, cross in more.items():
                    crosses[name] += cross
        with outcome.clock("solve"):
            for gram in dict.fromkeys(layer.gram for layer in layers):
                alike = [layer for layer in layers if layer.gram == gram]
                for row in prune_layers(
                    [(f"{prefix}.{layer.name}", layer.weight) for layer in alike],
                    grams.pop(gram),
                    method,
                    settings,
                    ops,
                    # An expert that no token reached when budgets were measured has the pattern's share.
                    budgets=[budgets.get(layer.name) for layer in alike],
                    crosses=[crosses.pop(layer.name, None) for layer in alike],
                    held_out=held_out.pop(gram, None),
                ):
                    outcome.layers.append(row)
                    on_layer(row)
        pruned += [layer.name for layer in layers]
    dense = [f"{prefix}.{name}" for name in not_pruned(block, pruned)]
    outcome.dense += [name for name in dense if name not in outcome.dense]


def _parts(stream: Stream, method: str, settings: Settings) -> tuple[range, range]:
    """The micro-batches that masks are chosen on, and those held out for the choice of alpha."""
    batches = range(len(stream.hidden))
    if method != "sparsefw" or settings.alpha is not None:
        return batches, batches[:0]
    if len(batches) < 2:
        raise InputError("--alpha auto: needs windows to hold out, and all calibration windows fill 1 micro-batch only")
    first = len(batches) - max(1, round(HELD_OUT * len(batches)))
    return batches[:first], batches[first:]


def _capture(
    model: StreamedModel,
    i: int,
    stream: Stream,
    batches: range,
    settings: Settings,
    ops: ModuleType,
    stage: Stage | None = None,
    follows: _Dense | None = None,
) -> tuple[list[Layer], dict[str, Tensor], dict[str, Tensor]]:
    """`layers.capture` of block i, its Gram matrices checked."""
    prefix = model.names[i]
    # Experts have no use for what the dense model puts out: for them it is run only to move on.
    needed = follows and stage and (stage.last or stage.final)

    def run_dense(j: int) -> None:
        if stage.final:
            model.advance(i, follows.stream, [j], follows.block)
        else:
            model.output(i, follows.stream, j, follows.block)

    layers, grams, crosses = capture(
        model.blocks[i],
        lambda j: model.output(i, stream, j),
        batches,
        ops=ops,
        precision="ieee" if settings.precision == "ieee" else "tf32",
        stage=stage,
        dense=(follows.block, run_dense) if needed else None,
    )
    if not layers:
        raise InputError(f"{prefix}: unsupported model: no matrix of this block was seen in a product")
    for gram, G in grams.items():
        # Off the diagonal G is bounded by it.
        check_finite(f"inputs of {prefix}.{gram} (their squares, summed)", G.diagonal())
    return layers, grams, crosses


def allocate(
    model: StreamedModel, calibration: Windows, how: str, settings: Settings, ops: ModuleType
) -> tuple[list[float], Budgets]:
    """Run the dense model once, and share out the sparsity between its blocks.

    Args:
        model: the streamed model; its blocks are used up.
        calibration: the windows that blocks are measured on.
        how: "owl" or "error", see `allocation`.
        settings: the run's settings; the pattern has a budget per row or per layer.
        ops: the kernels.

    Returns:
        The sparsity of every block, and what its layers keep.
    """
    pattern = settings.pattern
    stream = _start(model, calibration, [DENSE])[DENSE]
    names, shapes, found = [], [], []
    for i in range(len(model.blocks)):
        model.open(i)
        layers, grams, _ = _capture(model, i, stream, range(len(stream.hidden)), settings, ops)
        names.append([layer.name for layer in layers])
        shapes.append([tuple(layer.weight.shape) for layer in layers])
        matrices = [(layer.weight, grams[layer.gram]) for layer in layers]
        found.append(allocation.measure(how, matrices, pattern.sparsity, ops))
        model.advance(i, stream)
        model.close(i)
    sizes = [sum(rows * d for rows, d in block) for block in shapes]
    sparsities = allocation.share_out(how, found, sizes, pattern.sparsity)
    kept = allocation.whole_budgets(sparsities, shapes, pattern.sparsity, pattern.scope)
    return [float(s) for s in sparsities], [dict(zip(n, k, strict=True)) for n, k in zip(names, kept, strict=True)]


def _advance(model: StreamedModel, i: int, held_out: list[dict[str, Stream]], name: str) -> None:
    for streams in held_out:
        model.advance(i, streams[name])


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
def _restore(block: nn.Module, dense: nn.Module) -> None:
    for parameter, before in zip(block.parameters(), dense.parameters(), strict=True):
        parameter.copy_(before)
