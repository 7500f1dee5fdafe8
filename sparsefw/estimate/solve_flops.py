"""Flops and bytes of the solves of a stage, from the calls of each solve, its rows and its chunks."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

from sparsefw.estimate.operation import Operation, split, times
from sparsefw.estimate.sharing import ShapeOfSolve
from sparsefw.estimate.workload import PlannedRun, largest_share
from sparsefw.kernels import cost
from sparsefw.kernels.cost import Cost
from sparsefw.model.shapes import LayerShape
from sparsefw.solver import METHODS
from sparsefw.solver.calls import Calls, calls
from sparsefw.solver.chunks import BYTES_PER_ENTRY, ROW_UNIT, cpu_rows, wave_rows

# Multiprocessors of a GPU, for the height of chunks: those of an H100 or H200.
MULTIPROCESSORS = 132


def solve_operations(run: PlannedRun, solve: ShapeOfSolve, count: int, method: str) -> Iterator[Operation]:
    """All operations of so many solves of a shape by one method, on a rank that has the most rows of them."""
    config, layers = run.workload.config, solve.layers
    d, experts = layers[0].d, layers[0].experts
    sharing = run.workload.ranks if solve.owner is None else 1
    stacked = METHODS[method].rows_independent and not config.whole_matrix
    counts = calls(method, config, config.uses_dense_target and method == "sparsefw" and not experts)
    for rows in [sum(layer.rows for layer in layers)] if stacked else [layer.rows for layer in layers]:
        padded = largest_share(-(-rows // ROW_UNIT) * ROW_UNIT, sharing, ROW_UNIT) if stacked else rows
        chunks = -(-padded // _chunk_rows(run, padded, d)) if stacked else 1
        stack_operations = [*_products(run, counts, padded, d, chunks), *_kernels(run, counts, padded, d, chunks)]
        if counts.target:
            stack_operations += _cross_products(run, layers, padded, d, chunks)
        if method == "sparsegpt":
            # Decomposition and inverse of G, then every row's removals carried on to the columns behind them.
            sweep = Cost(2 * d**3 // 3 + rows * d * d, 4 * (2 * rows * d + 3 * d * d))
            stack_operations.append(Operation("solve", "sweep", "ieee", 1, sweep))
        for operation in stack_operations:
            yield replace(operation, calls=operation.calls * count, cost=times(operation.cost, count))


def _chunk_rows(run: PlannedRun, rows: int, d: int) -> int:
    """Rows of a chunk of a stack of `rows` rows."""
    units = max(1, run.placement.solver // (BYTES_PER_ENTRY * d * ROW_UNIT))
    if run.workload.gpu:
        return wave_rows(rows, d, ROW_UNIT * units, MULTIPROCESSORS)
    return ROW_UNIT * min(units, cpu_rows(d) // ROW_UNIT)


def _operation(
    name: str, unit: str, count: int, cost_of: Callable[[int], Cost], rows: int, chunks: int
) -> Iterator[Operation]:
    """An operation that is called `count` times in each chunk; `cost_of` gives the cost of one call by its rows."""
    if count:
        yield Operation("solve", name, unit, count * chunks, times(split(cost_of, rows, chunks), count))


def _product(unit: str, d: int, E: int, G: int, *, terms: int = 1) -> tuple[str, Callable[[int], Cost]]:
    """The unit of a product of rows with G, and the cost of the product by the number of rows.

    Args:
        unit: precision of the product; "tf32x3" is three products in tf32.
        d: width of the rows.
        E, G: bytes of an entry of each operand.
        terms: products of terms that make this one.
    """
    products = 3 if unit == "tf32x3" else terms

    def cost_of(rows: int) -> Cost:
        once = cost.product(rows, d, E=E, G=G)
        return Cost(products * once.flops, once.bytes)

    return ("tf32" if unit == "tf32x3" else unit), cost_of


def _exact_product(run: PlannedRun, d: int, terms: int) -> tuple[str, Callable[[int], Cost]]:
    """As `_product`, for a product that is as good as in fp32.

    `terms` are the products of bf16 terms that make it where weights have 16 bits: two with masked weights, three with
    differences of weights.
    """
    precision = run.workload.precisions.precision
    if precision in ("tf32", "bf16") and run.shape.itemsize == 2:
        return _product("bf16", d, 2, 4, terms=terms)
    return _product(run.workload.precisions.exact_precision, d, _weight_bytes(run), 4)


def _weight_bytes(run: PlannedRun) -> int:
    """Bytes of an entry of W in a solve."""
    return run.shape.itemsize if run.workload.gpu else 4


def _products(run: PlannedRun, counts: Calls, rows: int, d: int, chunks: int) -> Iterator[Operation]:
    """The products of one stack of rows, solved in chunks."""
    precisions, weight = run.workload.precisions, _weight_bytes(run)
    rounded = run.workload.config.precision == "bf16"
    G, of_mask, of_direction = (2, 2, 2) if rounded else (4, weight, 4)
    masked, direction = (_product(precisions.precision, d, E, G) for E in (of_mask, of_direction))
    of_weights = counts.errors_of_weights
    steps = 0 if run.vertex_products else counts.steps
    for name, count, (unit, cost_of) in (
        ("target", counts.target, direction),
        ("start", counts.starts, masked),
        ("step", steps, masked),
        ("refit", counts.refits, direction),
        ("error", counts.errors - of_weights, _exact_product(run, d, terms=2)),
        ("error", of_weights, _exact_product(run, d, terms=3)),
    ):
        yield from _operation(name, unit, count, cost_of, rows, chunks)


def _cross_products(
    run: PlannedRun, layers: Iterable[LayerShape], rows: int, d: int, chunks: int
) -> Iterator[Operation]:
    """The products that make a stack's cross matrix of what was measured, see `solver.target`."""
    ways, precisions, weight = {layer.role.way for layer in layers}, run.workload.precisions, _weight_bytes(run)
    if "outputs" in ways:
        return
    operand = 2 if run.workload.config.precision == "bf16" else 4
    if "reads" in ways:
        unit, cost_of = _product(precisions.precision, d, min(weight, operand), operand)
        yield from _operation("cross", unit, 1, cost_of, rows, chunks)
    if "writes" in ways:
        unit, cost_of = _exact_product(run, d, terms=2)
        yield from _operation("cross", unit, 1, cost_of, rows, chunks)


def _kernels(run: PlannedRun, counts: Calls, rows: int, d: int, chunks: int) -> Iterator[Operation]:
    """The other operations of one stack of rows, solved in chunks."""
    weight, rounded = _weight_bytes(run), run.workload.config.precision == "bf16"
    E, P = (2, 2) if rounded else (weight, 4)
    kernel = partial(_operation, unit="ieee", rows=rows, chunks=chunks)
    yield from kernel("row_step", count=counts.row_steps, cost_of=partial(cost.row_step, d=d, W=weight, E=E))
    for descents, steps, mask in counts.descents:
        for count, end in ((1, {"first": True}), (steps - 1, {}), (1, {"last": True})):
            step = partial(cost.conjugate_step, d=d, P=P, mask=mask, **end)
            yield from kernel("conjugate_step", count=descents * count, cost_of=step)
    yield from kernel("lmo", count=counts.lmos, cost_of=partial(cost.lmo, d=d))
    yield from kernel("round_mask", count=counts.roundings, cost_of=partial(cost.round_mask, d=d))
    # Only the weights tell how many swaps lower the error.
    swaps = partial(cost.row_swaps, d=d, swaps=0, W=weight)
    yield from kernel("row_swaps", count=counts.row_swaps, cost_of=swaps)
