"""Prune one block: accumulate the Gram matrices of its layers' inputs, choose masks and weights, write them in place.

Where layers approximate the dense model's outputs, the same windows also go through the dense block, and the block is
pruned in stages: the inputs of later layers are measured after earlier ones are pruned.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.finite import check_finite
from sparsefw.kernels.backend import Backend
from sparsefw.model import HiddenStates, StreamedModel
from sparsefw.model.layers import (
    KEPT_DENSE,
    Captured,
    DenseOutputs,
    Stage,
    capture,
    dense_outputs,
    kind_of,
    not_pruned,
    slices_of,
    stages,
)
from sparsefw.solver import LayerResult, PruneConfig, prune_layers


@dataclass(frozen=True)
class Run:
    """Model, config and backend that all blocks of a run share.

    Attributes:
        model: the streamed model.
        config: how the model is pruned.
        backend: the operations.
        memory: bytes that the state of one solve may take.
    """

    model: StreamedModel
    config: PruneConfig
    backend: Backend
    memory: int


@dataclass
class DenseReference:
    """A block of the dense model and its input, for a method whose layers approximate the dense model's outputs.

    Attributes:
        block: the block before it is pruned.
        states: the calibration windows before the block in the dense model. One stage of the block moves them on to
            the next block, see `layers.Stage`.
    """

    block: nn.Module
    states: HiddenStates


def prune_block(
    run: Run, i: int, states: HiddenStates, method: str, dense: DenseReference | None = None
) -> Iterator[LayerResult]:
    """Prune block i, which is open, layer by layer.

    Args:
        run: what all blocks share.
        i: number of the block.
        states: the calibration windows before the block.
        method: one of METHODS.
        dense: the dense model's block. With it, layers approximate the dense model's outputs.

    Yields:
        A result for each layer that the config selects.

    Raises:
        InputError: activations hold NaN or Inf, a layer does not fit the pattern, or the block has no layers.
    """
    prefix, timeline = run.model.names[i], run.model.timeline
    kinds = {kind_of(layer) for layer in _selected_layers(run, i)}
    if not kinds:
        if dense:
            # There is no stage to move the dense windows on.
            with timeline.span("calibrate", i):
                dense.states.advance(i, dense.block)
        return
    order: list[Stage] = []
    if dense:
        with timeline.span("calibrate", i):
            # The first micro-batch may not reach the experts that are selected: others of their kind stand for them.
            order = stages(run.model.blocks[i], lambda: states.output(i, 0), lambda name: kind_of(name) in kinds)
    # Without stages all layers of the block are measured at once.
    to_measure: list[Stage | None] = [*order] or [None]
    for stage in to_measure:
        with timeline.span("calibrate", i):
            captured = _capture(run, i, states, stage, dense)
        for gram in dict.fromkeys(layer.gram for layer in captured.layers):
            layers = [layer for layer in captured.layers if layer.gram == gram]
            with timeline.span("solve", i):
                results = list(
                    prune_layers(
                        [(f"{prefix}.{layer.name}", layer.weight) for layer in layers],
                        captured.grams.pop(gram),
                        method,
                        run.config,
                        run.backend,
                        memory=run.memory,
                        crosses=[captured.crosses.pop(layer.name, None) for layer in layers],
                    )
                )
            yield from results
    if dense and not order:
        # The first micro-batch has reached no selected layer. So there was no stage to move the dense windows on.
        with timeline.span("calibrate", i):
            dense.states.advance(i, dense.block)


def kept_dense(model: StreamedModel, i: int, pruned: list[LayerResult]) -> list[str]:
    """Names of the matrices of block i that were not pruned."""
    prefix = f"{model.names[i]}."
    names = [result.name.removeprefix(prefix) for result in pruned]
    return [prefix + name for name in not_pruned(model.blocks[i], names)]


def _selector(run: Run, i: int) -> Callable[[str], bool]:
    """A function that says by a layer's name inside block i whether the layer is to be pruned."""
    prefix = run.model.names[i]
    return lambda name: run.config.selects(f"{prefix}.{name}")


def _selected_layers(run: Run, i: int) -> list[str]:
    """Names of the matrices of block i that are to be pruned, if they are layers."""
    selected = _selector(run, i)
    return [
        layer
        for name, parameter in run.model.blocks[i].named_parameters()
        if parameter.dim() >= 2 and not KEPT_DENSE.search(name)
        for layer in slices_of(name, parameter) or [name]
        if selected(layer)
    ]


def _capture(run: Run, i: int, states: HiddenStates, stage: Stage | None, dense: DenseReference | None) -> Captured:
    """Run `layers.capture` on block i with all calibration windows, and check the Gram matrices."""
    prefix = run.model.names[i]
    captured = capture(
        run.model.blocks[i],
        partial(states.output, i),
        range(len(states)),
        backend=run.backend,
        selected=_selector(run, i),
        stage=stage,
        dense=_dense_outputs(run, i, stage, dense) if dense and stage else None,
    )
    if dense:
        dense.states.settle()
    if not captured.layers and not captured.ignored:
        raise InputError(f"{prefix}: unsupported model: no matrix of this block was seen in a product")
    for gram, G in captured.grams.items():
        # The diagonal bounds all other entries of G.
        check_finite(f"inputs of {prefix}.{gram} (their squares, summed)", G.diagonal())
    return captured


def _dense_outputs(run: Run, i: int, stage: Stage, dense: DenseReference) -> DenseOutputs | None:
    """Outputs of a stage's layers in the dense model; None if the stage compares nothing with them."""

    def block_outputs(j: int) -> Callable[[str], Tensor]:
        hidden = dense.states.hidden[j]
        return lambda name: hidden.reshape(-1, hidden.shape[-1])

    def run_dense(j: int) -> None:
        if stage.moves:
            dense.states.move(i, j, dense.block)
        else:
            dense.states.output(i, j, dense.block)

    if stage.final and not stage.moves:
        # An earlier stage has run the dense block to its end. Its output is what these layers should put out.
        return block_outputs
    # Experts are not compared with the dense model. For them it runs only to move its windows on.
    if not stage.last and not stage.moves:
        return None
    return dense_outputs(dense.block, run_dense, stage, _selector(run, i))
