"""Which layers of a block are measured and fitted together."""

from collections.abc import Iterable, Sequence

from sparsefw.model import Placement
from sparsefw.model.layers import is_watched
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.solver import PruneConfig, patterns
from sparsefw.solver.patterns import Pattern


def stages(layers: Iterable[LayerShape]) -> list[list[LayerShape]]:
    """The layers by stage, in the order of use: layers that read one input, whatever is used between them."""
    by_gram: dict[str, list[LayerShape]] = {}
    for layer in layers:
        by_gram.setdefault(layer.gram, []).append(layer)
    return list(by_gram.values())


def is_forked(config: PruneConfig) -> bool:
    """Whether the input of a block is kept while stages move the windows on inside it."""
    return config.reconstruct > 0 and config.uses_dense_target and config.method == "sparsefw"


def fits_predictions(shape: ModelShape, config: PruneConfig) -> bool:
    """Whether the last block is fitted to what the dense model predicts."""
    return bool(config.reconstruct and shape.blocks[-1].predicts and shape.blocks[-1].layers)


def reconstructed_parameters(block: BlockShape, pattern: Pattern) -> list[tuple[int, int]]:
    """How many weights each parameter with layers to prune has, and how many of them are kept.

    Experts that stay dense lie in the parameter of the others. None of their weights counts as kept: they do not move.
    """
    experts = {layer.name: layer.experts for layer in block.all_layers}
    return [
        (
            layer.rows * layer.d * max(1, experts[layer.name]),
            layer.rows * patterns.kept_in_row(pattern, layer.d) * max(1, layer.experts),
        )
        for layer in block.layers
    ]


def cross_rows(stage: Sequence[LayerShape]) -> list[int]:
    """The rows of each cross matrix of a stage."""
    if stage[0].experts:
        return []
    watched = is_watched([layer.role for layer in stage])
    rows = [layer.rows for layer in stage if watched or layer.role.way == "writes"]
    # Those that do not write to the stream share a square matrix.
    return rows if len(rows) == len(stage) else [*rows, stage[0].d]


def is_kept(stage: list[LayerShape], segment: int, placement: Placement) -> bool:
    """Whether a stage's inputs are kept, so that the next run of the windows begins there."""
    role, watched = stage[0].role, is_watched([layer.role for layer in stage])
    return role.keepable and not watched and role.segment == segment and stage[0].d <= placement.kept_width
