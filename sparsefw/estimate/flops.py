"""Flops and bytes that a block takes at least, from the shapes alone.

Matrix products and the package's kernels are counted, as the code calls them. Other work of torch is not, such as norms
and activation functions inside a block. So every sum here is a lower bound.
"""

from collections.abc import Iterable, Iterator
from functools import partial

from sparsefw.estimate.operation import Operation, split, times
from sparsefw.estimate.passes import (
    HeadCalls,
    Pass,
    cross_rows,
    held_out,
    passes,
    predicted_tokens,
    reconstructed_parameters,
    stages,
    steps_of_block,
)
from sparsefw.estimate.sharing import Group, grams_of_rank, groups, solves_of_rank
from sparsefw.estimate.solve_flops import solve_operations
from sparsefw.estimate.workload import PlannedRun
from sparsefw.kernels import cost
from sparsefw.kernels.cost import Cost
from sparsefw.model.shapes import BlockShape, LayerShape
from sparsefw.solver.kept_weights import adam_step


def operations(run: PlannedRun, block: BlockShape) -> list[Operation]:
    """All operations of one of the run's blocks, of a rank that has the most to do."""
    config, ranks = run.workload.config, run.workload.ranks
    total: list[Operation] = []
    for windows_pass in passes(block, run.workload, run.placement):
        total += _forward(run, block, windows_pass)
    total += _steps(run, block)
    for method in config.methods:
        total += _grams(run, block, method)
    if config.uses_dense_target:
        total += _crosses(run, block, "sparsefw")
    for method in config.methods:
        for group in groups(block, config, method):
            if ranks > 1:
                total += _mirrors(run, group)
            for solve, count in solves_of_rank(group, method, config, ranks).items():
                total += solve_operations(run, solve, count, method)
    return total


def head(run: PlannedRun) -> list[Operation]:
    """The logits of a rank's windows: those of every evaluation text, and those that the last block is fitted by."""
    workload = run.workload
    windows = sum(workload.evaluation_of_rank) * (1 + len(workload.config.methods))
    forth, back = predicted_tokens(run.shape, workload, run.placement)
    calls = (
        ("reconstruct", "head", forth),
        ("reconstruct", "head gradient", back),
        ("evaluate", "head", HeadCalls(windows, windows * workload.seqlen)),
    )
    return [_head(run, phase, name, of_head) for phase, name, of_head in calls if of_head.calls]


def _head(run: PlannedRun, phase: str, name: str, of_head: HeadCalls) -> Operation:
    """The product with the head."""
    shape = run.shape
    cost_of = partial(_weight_product, rows=shape.vocabulary, d=shape.hidden, itemsize=shape.itemsize)
    least = split(cost_of, of_head.tokens, of_head.calls)
    return Operation(phase, name, run.weight_unit, of_head.calls, least)


def _weight_product(tokens: int, rows: int, d: int, itemsize: int) -> Cost:
    """The cost of the product of activations (tokens, d) with a weight (rows, d), each entry of `itemsize` bytes."""
    return Cost(2 * tokens * rows * d, (tokens * (rows + d) + rows * d) * itemsize)


def _forward(run: PlannedRun, block: BlockShape, windows_pass: Pass) -> Iterator[Operation]:
    phase, seqlen, itemsize = windows_pass.phase, run.workload.seqlen, run.shape.itemsize
    batches, tokens = -(-windows_pass.windows // run.placement.batch), windows_pass.windows * seqlen
    for n in range(windows_pass.first, windows_pass.end):
        layer, products = block.all_layers[n], _products(block, n) if windows_pass.differentiated else 1
        reached = products * tokens * _inputs_per_token(run, block, layer)
        # A micro-batch of few tokens reaches few experts.
        calls = min(products * batches * max(1, layer.experts), reached)
        cost_of = partial(_weight_product, rows=layer.rows, d=layer.d, itemsize=itemsize)
        yield Operation(phase, layer.name, run.weight_unit, calls, split(cost_of, reached, calls))
    attention = run.traits.attention
    if attention and windows_pass.first < block.attention <= windows_pass.end:
        # Causal: on average a token sees half of the window. Queries are read, and values written. Each of the two
        # products has two gradients.
        products = 3 if windows_pass.differentiated and _pruned(block, block.all_layers[: block.attention]) else 1
        least = Cost(2 * tokens * (seqlen + 1) * attention, 2 * tokens * attention * itemsize)
        yield Operation(phase, "attention", run.weight_unit, products * batches, times(least, products))


def _products(block: BlockShape, n: int) -> int:
    """The products of a layer where gradients are computed: its own, and those for its weight and for its input.

    Weights that are not fitted have no gradient, and neither has what no fitted weight lies before.
    """
    layer = block.all_layers[n]
    # Parallel branches read the block's input, as far as is known; the layer behind attention reads what that gives.
    reads_block_input = layer.role.way == "reads" and not layer.role.segment and n != block.attention
    before = [other for other in block.all_layers[:n] if other.gram != layer.gram]
    return 1 + _pruned(block, [layer]) + (not reads_block_input and _pruned(block, before))


def _pruned(block: BlockShape, layers: Iterable[LayerShape]) -> bool:
    """Whether one of these layers is pruned."""
    pruned = {layer.name for layer in block.layers}
    return any(layer.name in pruned for layer in layers)


def _steps(run: PlannedRun, block: BlockShape) -> Iterator[Operation]:
    """The steps of a block's reconstruction: what is beside the products that make gradients."""
    steps = steps_of_block(block, run.workload, run.placement)
    if not (steps and block.layers):
        return
    parameters = reconstructed_parameters(block, run.workload.config.pattern)
    weights, kept = (sum(counts) for counts in zip(*parameters, strict=True))
    cost = adam_step(weights, kept, run.shape.itemsize)
    yield Operation("reconstruct", "adam", run.weight_unit, steps, times(cost, steps))


def _grams(run: PlannedRun, block: BlockShape, method: str) -> Iterator[Operation]:
    tokens, batches = _calibration(run, method)
    for stage in stages(block.layers):
        experts = stage[0].experts
        reached = tokens * _inputs_per_token(run, block, stage[0])
        if experts:
            reached = reached * experts // _experts(block, stage[0])
        calls = min(batches * max(1, experts), reached)
        cost_of = partial(cost.gram_accumulate, d=stage[0].d, X=run.shape.itemsize)
        yield Operation("calibrate", "gram_accumulate", run.gram_unit, calls, split(cost_of, reached, calls))
        matrices = max(1, experts)
        least = times(cost.mirror_lower(stage[0].d), matrices)
        yield Operation("calibrate", "mirror_lower", run.gram_unit, matrices, least)


def _mirrors(run: PlannedRun, group: Group) -> Iterator[Operation]:
    """Summed matrices are mirrored once more."""
    for stage, matrices in zip(group, grams_of_rank(group, run.workload.config, run.workload.ranks), strict=True):
        least = times(cost.mirror_lower(stage[0].d), matrices)
        yield Operation("exchange", "mirror_lower", run.gram_unit, matrices, least)


def _crosses(run: PlannedRun, block: BlockShape, method: str) -> Iterator[Operation]:
    tokens, batches = _calibration(run, method)
    for stage in stages(block.layers):
        for rows in cross_rows(stage):
            cost_of = partial(cost.cross_accumulate, rows=rows, d=stage[0].d, X=run.shape.itemsize)
            yield Operation("calibrate", "cross_accumulate", run.gram_unit, batches, split(cost_of, tokens, batches))


def _calibration(run: PlannedRun, method: str) -> tuple[int, int]:
    """Calibration tokens of a rank that a method measures, and the micro-batches that they come in."""
    windows, batch = run.workload.windows_of_rank, run.placement.batch
    measured = windows - held_out(run.workload, run.placement, method)
    # The last micro-batch, which may be smaller, may be one of those that are held out.
    return measured * run.workload.seqlen, -(-measured // batch)


def _inputs_per_token(run: PlannedRun, block: BlockShape, layer: LayerShape) -> int:
    """The inputs that a layer has for a token; an expert's layer: those of all experts, pruned or not."""
    experts = _experts(block, layer)
    # Every token goes through both of two parts that are alike.
    return min(experts, run.traits.experts_per_token) if experts and layer.parts == 1 else layer.parts


def _experts(block: BlockShape, layer: LayerShape) -> int:
    """The number of a layer's experts, pruned or not: all of them share the tokens."""
    return next(other.experts for other in block.all_layers if other.name == layer.name)
