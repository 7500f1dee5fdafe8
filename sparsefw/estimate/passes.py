"""How often the windows run through a block, and how far, in the order of the driver."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sparsefw.estimate.workload import Workload
from sparsefw.model import Placement
from sparsefw.model.layers import first_segments, is_watched
from sparsefw.model.placement import held_out_batches
from sparsefw.model.predictions import times_the_passes, tokens_of_pass
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.solver import PruneConfig, patterns
from sparsefw.solver.patterns import Pattern


@dataclass(frozen=True)
class Pass:
    """Windows that run through a part of a block.

    Attributes:
        phase: "calibrate", "reconstruct", "forward" or "evaluate".
        windows: number of windows.
        first, end: the `BlockShape.all_layers` that they run through, from the first up to but not including the end.
        moves: whether the windows are written back, at a later point of the block or behind it.
        compared: whether what comes out is compared with the same windows of the dense model, which are read, too.
        differentiated: whether gradients are computed: two further products of every weight.
    """

    phase: str
    windows: int
    first: int
    end: int
    moves: bool = False
    compared: bool = False
    differentiated: bool = False


def stages(layers: Iterable[LayerShape]) -> list[list[LayerShape]]:
    """The layers by stage, in the order of use: layers that read one input, whatever is used between them."""
    by_gram: dict[str, list[LayerShape]] = {}
    for layer in layers:
        by_gram.setdefault(layer.gram, []).append(layer)
    return list(by_gram.values())


def passes(block: BlockShape, workload: Workload, placement: Placement) -> Iterator[Pass]:
    """All passes through a block, of a rank that has the most windows."""
    config, whole = workload.config, len(block.all_layers)
    calibration, evaluation = workload.windows_of_rank, workload.evaluation_of_rank
    for windows in evaluation:
        yield Pass("evaluate", windows, 0, whole, moves=True)
    for method in config.methods:
        begin = 0
        if config.uses_dense_target and method == "sparsefw":
            begin = yield from _passes_by_stage(block, calibration, placement)
        elif block.layers:
            yield Pass("calibrate", calibration - held_out(workload, placement, method), 0, whole)
        if method == config.method and config.reconstruct:
            begin = 0
            yield from _passes_of_reconstruction(block, workload, placement)
        yield Pass("forward", calibration, begin, whole, moves=True)
        for windows in evaluation:
            yield Pass("evaluate", windows, 0, whole, moves=True)


def _passes_of_reconstruction(block: BlockShape, workload: Workload, placement: Placement) -> Iterator[Pass]:
    """The passes that fit the weights of a block together, and those that measure what came of it."""
    config, windows, whole = workload.config, workload.windows_of_rank, len(block.all_layers)
    if not config.uses_dense_target:
        # The dense block moves its windows on.
        yield Pass("reconstruct", windows, 0, whole, moves=True)
    if block.layers:
        held = held_out(workload, placement, config.method)
        for _ in range(config.reconstruct * _times(block, workload)):
            yield Pass("reconstruct", windows - held, 0, whole, compared=True, differentiated=True)
        for _ in ("before", "after"):
            yield Pass("reconstruct", held, 0, whole, compared=True)


def is_forked(config: PruneConfig) -> bool:
    """Whether the input of a block is kept while stages move the windows on inside it."""
    return config.reconstruct > 0 and config.uses_dense_target and config.method == "sparsefw"


def _times(block: BlockShape, workload: Workload) -> int:
    """How often a block has the passes of the others."""
    return times_the_passes(workload.seqlen) if block.predicts else 1


def steps_of_block(block: BlockShape, workload: Workload, placement: Placement) -> int:
    """The steps that all ranks make in a block with layers."""
    return _times(block, workload) * steps_of_reconstruction(workload, placement)


def steps_of_reconstruction(workload: Workload, placement: Placement) -> int:
    """As `steps_of_block`, of a block before the last one."""
    batches = -(-workload.windows_of_rank // placement.batch)
    return workload.config.reconstruct * (batches - len(held_out_batches(batches)))


def fits_predictions(shape: ModelShape, config: PruneConfig) -> bool:
    """Whether the last block is fitted to what the dense model predicts."""
    return bool(config.reconstruct and shape.blocks[-1].predicts and shape.blocks[-1].layers)


@dataclass(frozen=True)
class HeadCalls:
    """Calls of the head.

    Attributes:
        calls: number of calls.
        tokens: tokens of all calls together.
    """

    calls: int = 0
    tokens: int = 0


def predicted_tokens(shape: ModelShape, workload: Workload, placement: Placement) -> tuple[HeadCalls, HeadCalls]:
    """The calls of the head by which a rank fits the last block, and the ways back through it."""
    if not fits_predictions(shape, workload.config):
        return HeadCalls(), HeadCalls()
    seqlen, held = workload.seqlen, held_out(workload, placement, workload.config.method)
    passes_of_last = times_the_passes(seqlen) * workload.config.reconstruct
    of_pass = [len(range(seqlen)[tokens_of_pass(n, seqlen)]) for n in range(passes_of_last)]
    windows = workload.windows_of_rank - held
    back = HeadCalls(windows * passes_of_last, windows * sum(of_pass))
    # One window and a part of it show that there are predictions. What is held out is measured before and after a
    # round. Both models predict.
    measured = 4 * held
    forth = HeadCalls(2 + measured + 2 * back.calls, seqlen * (1 + measured) + of_pass[0] + 2 * back.tokens)
    return forth, back


def held_out(workload: Workload, placement: Placement, method: str) -> int:
    """The windows of a rank that a method fits nothing to."""
    if method != workload.config.method or not workload.config.reconstruct:
        return 0
    windows, batch = workload.windows_of_rank, placement.batch
    batches = -(-windows // batch)
    held = held_out_batches(batches)
    # The last micro-batch may be smaller.
    missing = (batches * batch - windows) * (batches - 1 in held)
    return len(held) * batch - missing


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


def _passes_by_stage(block: BlockShape, windows: int, placement: Placement) -> Generator[Pass, None, int]:
    """Calibration passes where layers approximate the dense model's outputs: pruned and dense block in turn.

    Returns:
        The layer at which the windows of the pruned model go on.
    """
    order, whole = stages(block.layers), len(block.all_layers)
    if not order:
        # There is no stage to move the dense windows on.
        yield Pass("calibrate", windows, 0, whole, moves=True)
        return 0
    # One micro-batch shows the stages.
    yield Pass("calibrate", min(placement.batch, windows), 0, whole)
    segments = first_segments([[layer.role for layer in stage] for stage in order])
    pruned = dense = at = 0
    for n, stage in enumerate(order):
        final = n == len(order) - 1
        start, watched = _begin(block, segments[n]), is_watched([layer.role for layer in stage])
        # Experts may be used anywhere behind the start.
        through = whole if final or stage[0].experts else _end(block, stage)
        input_at = _position(block, stage[0])
        yield Pass("calibrate", windows, pruned, through if watched else input_at, moves=segments[n] > at)
        moves = not final and segments[n + 1] > segments[n]
        if final or moves or not stage[0].experts:
            # Experts are not compared with the dense model.
            next_start = _begin(block, segments[n + 1]) if moves else input_at
            end = whole if final else next_start if moves or not watched else through
            yield Pass("calibrate", windows, dense, end, moves=final or moves)
            dense = next_start if moves else dense
        pruned = input_at if is_kept(stage, segments[n], placement) else start
        at = segments[n]
    return pruned


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


def _begin(block: BlockShape, segment: int) -> int:
    """The first layer of a segment."""
    return next((n for n, layer in enumerate(block.all_layers) if layer.role.segment >= segment), len(block.all_layers))


def _position(block: BlockShape, layer: LayerShape) -> int:
    return [other.name for other in block.all_layers].index(layer.name)


def _end(block: BlockShape, stage: list[LayerShape]) -> int:
    """How many layers of a block are used before a stage is over, which is when a layer reads another input."""
    grams = {layer.name: layer.gram for layer in block.all_layers}
    names = list(grams)
    end = names.index(stage[-1].name) + 1
    while end < len(names) and grams[names[end]] == stage[0].gram:
        end += 1
    return end
