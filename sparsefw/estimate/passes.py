"""How often the windows run through a block, and how far, in the order of the driver."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sparsefw.estimate.workload import Workload
from sparsefw.model import Placement
from sparsefw.model.shapes import BlockShape, LayerShape


@dataclass(frozen=True)
class Pass:
    """Windows that run through a block.

    Attributes:
        phase: "calibrate", "forward" or "evaluate".
        windows: number of windows.
        layers: number of `BlockShape.all_layers` that they run through, counted from the first.
        advances: whether the output is the next block's input.
    """

    phase: str
    windows: int
    layers: int
    advances: bool = False


def stages(layers: Iterable[LayerShape]) -> list[list[LayerShape]]:
    """The layers by stage, in the order of use: layers that read one input, whatever is used between them."""
    by_gram: dict[str, list[LayerShape]] = {}
    for layer in layers:
        by_gram.setdefault(layer.gram, []).append(layer)
    return list(by_gram.values())


def passes(block: BlockShape, workload: Workload, placement: Placement) -> Iterator[Pass]:
    """All passes through a block."""
    config, whole = workload.config, len(block.all_layers)
    for windows in workload.evaluation:
        yield Pass("evaluate", windows, whole, advances=True)
    for method in config.methods:
        dense = config.uses_dense_target and method == "sparsefw"
        if not block.layers:
            # Nothing is measured. Only the dense windows move on.
            yield from [Pass("calibrate", workload.windows, whole, advances=True)] * dense
        elif dense:
            yield from _passes_by_stage(block, workload.windows, placement.batch)
        else:
            yield Pass("calibrate", workload.windows, whole)
        yield Pass("forward", workload.windows, whole, advances=True)
        for windows in workload.evaluation:
            yield Pass("evaluate", windows, whole, advances=True)


def _passes_by_stage(block: BlockShape, windows: int, batch: int) -> Iterator[Pass]:
    """Calibration passes where layers approximate the dense model's outputs: pruned and dense block in turn."""
    pruned, whole = stages(block.layers), len(block.all_layers)
    # One micro-batch shows the stages.
    yield Pass("calibrate", min(batch, windows), whole)
    if not pruned:
        # No stage moves the dense windows on.
        yield Pass("calibrate", windows, whole)
        yield Pass("calibrate", windows, whole, advances=True)
        return
    final = len(pruned) - 1
    moving = final - block.ahead
    for n, stage in enumerate(pruned):
        # Experts may be used anywhere in the block, and are not compared with the dense model.
        through = n == final or bool(stage[0].experts)
        reached = whole if through else _end(block, stage)
        yield Pass("calibrate", windows, reached)
        if n == moving:
            yield Pass("calibrate", windows, whole, advances=True)
        elif n < moving and not through:
            yield Pass("calibrate", windows, reached)


def _end(block: BlockShape, stage: list[LayerShape]) -> int:
    """How many layers of a block are used before a stage is over, which is when a layer reads another input."""
    grams = {layer.name: layer.gram for layer in block.all_layers}
    names = list(grams)
    end = names.index(stage[-1].name) + 1
    while end < len(names) and grams[names[end]] == stage[0].gram:
        end += 1
    return end
