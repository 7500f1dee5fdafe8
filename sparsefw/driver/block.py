"""Prune one block: accumulate the Gram matrices of its layers' inputs, choose masks and weights, write them in place.

Where layers approximate the dense model's outputs, the same windows also go through the dense block, and the block is
pruned in stages: the inputs of later layers are measured after earlier ones are pruned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor, nn

from sparsefw.checkpoint.source import check_finite
from sparsefw.errors import InputError
from sparsefw.model.layers import DenseOutputs, Layer, Stage, capture, dense_outputs, not_pruned, stages
from sparsefw.model.streamed import Stream, StreamedModel
from sparsefw.solver.layer import LayerResult, prune_layers
from sparsefw.solver.methods import Settings


@dataclass
class Dense:
    """The dense model before a block, for a method whose layers approximate its outputs.

    Attributes:
        block: the block as it was.
        stream: the calibration windows in the dense model. A stage, see `layers.Stage`, moves them on to the next one.
    """

    block: nn.Module
    stream: Stream


def prune_block(
    model: StreamedModel,
    i: int,
    stream: Stream,
    follows: Dense | None,
    method: str,
    settings: Settings,
    ops: ModuleType,
) -> Iterator[LayerResult]:
    """Prune block i, which is open, layer by layer.

    Args:
        model: the streamed model.
        i: the block.
        stream: the calibration windows before it.
        follows: with it, layers approximate the dense model's outputs.
        method: one of METHODS.
        settings: the run's settings.
        ops: the kernels, `sparsefw.kernels.cpu` or `sparsefw.kernels.triton_ops`.

    Yields:
        A row for each layer.

    Raises:
        InputError: activations hold NaN or Inf, a layer does not fit the pattern, or the block has no layers.
    """
    prefix, block, timeline = model.names[i], model.blocks[i], model.timeline
    with timeline.span("calibrate", i):
        order = stages(block, lambda: model.output(i, stream, 0)) if follows else []
    for stage in order or [None]:
        with timeline.span("calibrate", i):
            layers, grams, crosses = _capture(model, i, stream, settings, ops, stage, follows)
        for gram in dict.fromkeys(layer.gram for layer in layers):
            alike = [layer for layer in layers if layer.gram == gram]
            with timeline.span("solve", i):
                rows = list(
                    prune_layers(
                        [(f"{prefix}.{layer.name}", layer.weight) for layer in alike],
                        grams.pop(gram),
                        method,
                        settings,
                        ops,
                        crosses=[crosses.pop(layer.name, None) for layer in alike],
                    )
                )
            yield from rows


def kept_dense(model: StreamedModel, i: int, pruned: list[LayerResult]) -> list[str]:
    """Names of the matrices of block i that are not among the rows."""
    prefix = f"{model.names[i]}."
    names = [row.name.removeprefix(prefix) for row in pruned]
    return [prefix + name for name in not_pruned(model.blocks[i], names)]


def _capture(
    model: StreamedModel,
    i: int,
    stream: Stream,
    settings: Settings,
    ops: ModuleType,
    stage: Stage | None,
    follows: Dense | None,
) -> tuple[list[Layer], dict[str, Tensor], dict[str, Tensor]]:
    """`layers.capture` of block i, its Gram matrices checked."""
    prefix = model.names[i]
    layers, grams, crosses = capture(
        model.blocks[i],
        lambda j: model.output(i, stream, j),
        range(len(stream.hidden)),
        ops=ops,
        precision="ieee" if settings.precision in ("ieee", "tf32x3") else "tf32",
        stage=stage,
        dense=_dense_outputs(model, i, stage, follows) if follows and stage else None,
    )
    if follows:
        model.settle(follows.stream)
    if not layers:
        raise InputError(f"{prefix}: unsupported model: no matrix of this block was seen in a product")
    for gram, G in grams.items():
        # Off the diagonal G is bounded by it.
        check_finite(f"inputs of {prefix}.{gram} (their squares, summed)", G.diagonal())
    return layers, grams, crosses


def _dense_outputs(model: StreamedModel, i: int, stage: Stage, follows: Dense) -> DenseOutputs | None:
    """What the layers of a stage put out in the dense model; None where nothing is compared with it."""

    def moved_on(j: int) -> Callable[[str], Tensor]:
        hidden = follows.stream.hidden[j]
        return lambda name: hidden.reshape(-1, hidden.shape[-1])

    def run(j: int) -> None:
        if stage.moves:
            model.move(i, follows.stream, j, follows.block)
        else:
            model.output(i, follows.stream, j, follows.block)

    if stage.final and not stage.moves:
        # The block has been run: what it has put out is what these layers should.
        return moved_on
    # Experts have no use for what the dense model puts out: for them it is run only to move on.
    return dense_outputs(follows.block, run, stage) if stage.last or stage.moves else None
