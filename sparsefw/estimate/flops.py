"""What a run has to do at least, from the shapes alone: matrix products and kernels, as the code calls them.

What torch does entry by entry between them is not counted, nor are norms and activation functions inside a block: so
every sum here is a floor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from sparsefw.estimate.memory import Work, stages
from sparsefw.kernels import cost
from sparsefw.kernels.cost import Cost
from sparsefw.model.placement import Placement
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.solver.frank_wolfe import CERTIFIED, exact
from sparsefw.solver.layer import BYTES_PER_ENTRY, ROW_UNIT, TARGET_STEPS, cpu_rows
from sparsefw.solver.methods import METHODS, Settings
from sparsefw.solver.reselect import RESTART


@dataclass(frozen=True)
class Traits:
    """What the shapes of the layers do not tell.

    Attributes:
        attention: entries of a query, over all heads; 0 without attention.
        chosen: experts that a token is sent to.
    """

    attention: int
    chosen: int


@dataclass(frozen=True)
class Operation:
    """An operation of a block, all its calls.

    Attributes:
        phase: "calibrate", "solve", "forward" or "evaluate".
        name: of the operation.
        unit: what multiplies: "bf16", "tf32" or "ieee" (fp32).
        calls: how often.
        cost: of all calls.
    """

    phase: str
    name: str
    unit: str
    calls: int
    cost: Cost


@dataclass(frozen=True)
class Pass:
    """Windows that run through a block.

    Attributes:
        phase: as in `Operation`.
        windows: how many.
        stages: of the block, counted from its first, that they run through.
        advances: whether the output is the next block's input.
    """

    phase: str
    windows: int
    stages: int
    advances: bool = False


@dataclass(frozen=True)
class Calls:
    """What one solve calls: products by what they are for, and the other kernels.

    Attributes:
        target: products from the weights to their target.
        starts: those that give a Frank-Wolfe its first R.
        steps: those of Frank-Wolfe steps.
        refits: those of refits and rounds.
        fits: refits.
        errors: those of errors and swaps, as good as fp32's whatever the precision.
        row_steps, lmos, row_swaps: calls of these kernels.
    """

    target: int = 0
    starts: int = 0
    steps: int = 0
    refits: int = 0
    fits: int = 0
    errors: int = 0
    row_steps: int = 0
    lmos: int = 0
    row_swaps: int = 0

    @property
    def products(self) -> int:
        """In all."""
        return self.target + self.starts + self.steps + self.refits + self.errors

    @property
    def descents(self) -> list[tuple[int, int, bool]]:
        """Conjugate gradients: how often, in how many steps, and whether under a mask."""
        targets, fits = (1, self.target, False), (self.fits, self.refits // max(1, self.fits) - 1, True)
        return [one for one in (targets, fits) if one[0] and one[1] > 0]


def calls(method: str, settings: Settings, follows: bool) -> Calls:
    """What a solve calls for rows that read the same input.

    Args:
        method: one of METHODS.
        settings: the run's.
        follows: whether the rows approximate the dense model's outputs.
    """
    if method != "sparsefw":
        # One-shot masks have their own error only; weights, the mask's and the warm start's too.
        return Calls(errors=1 if METHODS[method].saliency == method else 3, lmos=1)
    steps, refit = settings.steps, settings.refit
    restarts = bool(refit and settings.rounds)
    again = round(RESTART * steps) if restarts else 0
    certified = {max(1, round(share * steps)) for share in CERTIFIED}
    fits = 1 + (1 + settings.rounds if restarts else 0)
    return Calls(
        target=TARGET_STEPS if follows else 0,
        starts=bool(steps) + restarts,
        steps=steps + again,
        refits=fits * (1 + refit) if refit else 0,
        fits=fits if refit else 0,
        errors=2 + bool(settings.swaps) + bool(refit),
        row_steps=steps + again,
        lmos=1 + bool(settings.alpha) + (len(certified) + 3 if steps else 0) + (4 + settings.rounds) * restarts,
        row_swaps=int(bool(settings.swaps)),
    )


def passes(block: BlockShape, work: Work, placement: Placement) -> Iterator[Pass]:
    """The windows that run through a block, in the order of the driver."""
    of_block = stages(block)
    everything = len(of_block)
    for windows in work.held_out:
        yield Pass("evaluate", windows, everything, advances=True)
    for method in work.methods:
        if work.followed and method == "sparsefw":
            yield Pass("calibrate", min(placement.batch, work.windows), everything)
            for n, stage in enumerate(of_block, 1):
                # Experts are seen anywhere, and have no use for what the dense model puts out.
                whole = n == everything or bool(stage[0].experts)
                yield Pass("calibrate", work.windows, everything if whole else n)
                moving = everything - block.ahead
                if n == moving or (n < moving and not whole):
                    yield Pass("calibrate", work.windows, everything if n == moving else n, advances=n == moving)
        else:
            yield Pass("calibrate", work.windows, everything)
        yield Pass("forward", work.windows, everything, advances=True)
        for windows in work.held_out:
            yield Pass("evaluate", windows, everything, advances=True)


def operations(
    block: BlockShape,
    shape: ModelShape,
    work: Work,
    placement: Placement,
    traits: Traits,
    *,
    by_changes: bool = False,
) -> list[Operation]:
    """All that is done to a block.

    Args:
        block: one of the shape's.
        shape: of the model.
        work: to be done.
        placement: what is held at once.
        traits: of the model.
        by_changes: products of vertices come from what changed since, see `kernels.changes`: how much that is, the
            shapes do not tell, and nothing is counted.
    """
    found = []
    for one in passes(block, work, placement):
        found += _forward(block, shape, work, placement, traits, one)
    for _ in work.methods:
        found += _grams(block, shape, work, placement, traits)
    if work.followed:
        found += _crosses(block, shape, work, placement)
    for stage in stages(block):
        for method in work.methods:
            found += _solve(stage, shape, work, placement, method, by_changes)
    return found


def head(shape: ModelShape, work: Work) -> list[Operation]:
    """The logits of all held-out windows, dense and by each method."""
    windows = sum(work.held_out) * (1 + len(work.methods))
    rows, d, item = shape.vocabulary, shape.hidden, shape.itemsize
    least = _split(lambda t: Cost(2 * t * rows * d, (t * (rows + d) + rows * d) * item), windows * work.seqlen, windows)
    return [Operation("evaluate", "head", _unit(shape), windows, least)] if windows else []


def _split(of: Callable[[int], Cost], amount: int, calls: int) -> Cost:
    """The cost of an amount of rows or tokens in so many calls: what does not grow with it is moved in each."""
    whole, again = of(amount), of(0)
    return Cost(whole.flops, whole.bytes + (calls - 1) * again.bytes)


def _times(each: Cost, calls: int) -> Cost:
    return Cost(calls * each.flops, calls * each.bytes)


def _unit(shape: ModelShape) -> str:
    # bf16 and fp16 run at the same rate; torch multiplies fp32 in fp32.
    return "bf16" if shape.itemsize == 2 else "ieee"


def _forward(
    block: BlockShape, shape: ModelShape, work: Work, placement: Placement, traits: Traits, one: Pass
) -> Iterator[Operation]:
    batches, tokens, item = -(-one.windows // placement.batch), one.windows * work.seqlen, shape.itemsize
    for layer in chain.from_iterable(stages(block)[: one.stages]):
        rows, d, count = layer.rows, layer.d, max(1, layer.experts)

        def of(t: int, rows: int = rows, d: int = d) -> Cost:
            return Cost(2 * t * rows * d, (t * (rows + d) + rows * d) * item)

        reached = tokens * (traits.chosen if layer.experts else 1)
        # A micro-batch of few tokens reaches few experts.
        calls = min(batches * count, reached)
        yield Operation(one.phase, layer.name, _unit(shape), calls, _split(of, reached, calls))
    if traits.attention:
        # Causal: a token sees half of the window. Queries in, values out.
        flops = 2 * tokens * (work.seqlen + 1) * traits.attention
        least = Cost(flops, 2 * tokens * traits.attention * item)
        yield Operation(one.phase, "attention", _unit(shape), batches, least)


def _products_of_inputs(shape: ModelShape, work: Work) -> str:
    """The unit of Gram and cross matrices."""
    if not work.gpu or (shape.itemsize > 2 and work.settings.precision in ("ieee", "tf32x3")):
        return "ieee"
    return "bf16" if shape.itemsize == 2 else "tf32"


def _grams(
    block: BlockShape, shape: ModelShape, work: Work, placement: Placement, traits: Traits
) -> Iterator[Operation]:
    tokens, batches = work.windows * work.seqlen, -(-work.windows // placement.batch)
    for stage in stages(block):
        d, experts = stage[0].d, stage[0].experts
        reached = tokens * (traits.chosen if experts else 1)
        calls = min(batches * max(1, experts), reached)
        least = _split(lambda t, d=d: cost.gram_accumulate(t, d, X=shape.itemsize), reached, calls)
        yield Operation("calibrate", "gram_accumulate", _products_of_inputs(shape, work), calls, least)


def _crosses(block: BlockShape, shape: ModelShape, work: Work, placement: Placement) -> Iterator[Operation]:
    tokens, batches = work.windows * work.seqlen, -(-work.windows // placement.batch)
    for layer in block.layers:
        if not layer.experts:
            rows, d = layer.rows, layer.d
            least = _split(
                lambda t, rows=rows, d=d: cost.cross_accumulate(t, rows, d, X=shape.itemsize), tokens, batches
            )
            yield Operation("calibrate", "cross_accumulate", _products_of_inputs(shape, work), batches, least)


def _solve(
    stage: list[LayerShape], shape: ModelShape, work: Work, placement: Placement, method: str, by_changes: bool
) -> Iterator[Operation]:
    d, experts, settings = stage[0].d, stage[0].experts, work.settings
    together = METHODS[method].by_rows and not settings.whole
    follows = work.followed and method == "sparsefw" and not experts
    rows = [sum(layer.rows for layer in stage)] if together else [layer.rows for layer in stage]
    for height in rows:
        padded = -(-height // ROW_UNIT) * ROW_UNIT if together else height
        chunks = -(-padded // _chunk(d, work, placement)) if together else 1
        each = calls(method, settings, follows)
        found = list(_of_solve(each, padded, d, chunks, shape, work, by_changes))
        if method == "sparsegpt":
            # Decomposition and inverse of G, then every row's removals carried on to the columns behind them.
            sweep = Cost(2 * d**3 // 3 + height * d * d, 4 * (2 * height * d + 3 * d * d))
            found.append(Operation("solve", "sweep", "ieee", 1, sweep))
        for one in found:
            yield replace(one, calls=one.calls * max(1, experts), cost=_times(one.cost, max(1, experts)))


def _chunk(d: int, work: Work, placement: Placement) -> int:
    """Rows of a chunk."""
    units = max(1, placement.solver // (BYTES_PER_ENTRY * d * ROW_UNIT))
    return ROW_UNIT * (units if work.gpu else min(units, cpu_rows(d) // ROW_UNIT))


def _of_solve(
    each: Calls, rows: int, d: int, chunks: int, shape: ModelShape, work: Work, by_changes: bool
) -> Iterator[Operation]:
    """The operations of one stack of rows, solved in chunks."""
    half = work.settings.precision == "bf16"
    unit = work.settings.precision if work.gpu else "ieee"
    # "tf32x3" is three products in tf32.
    times, errors = (3, "tf32") if work.gpu and exact(unit) == "tf32x3" else (1, "ieee")
    unit, steps = ("tf32", 3) if unit == "tf32x3" else (unit, 1)
    weight = shape.itemsize if work.gpu else 4
    E, G, P = (2, 2, 2) if half else (weight, 4, 4)

    def some(name: str, unit: str, count: int, of: Callable[[int], Cost]) -> Iterator[Operation]:
        if count:
            yield Operation("solve", name, unit, count * chunks, _times(_split(of, rows, chunks), count))

    def product(E: int, G: int, times: int) -> Callable[[int], Cost]:
        def of(n: int) -> Cost:
            one = cost.product(n, d, E=E, G=G)
            return Cost(times * one.flops, one.bytes)

        return of

    yield from some("target", unit, each.target, product(P, G, steps))
    yield from some("start", unit, each.starts, product(E, G, steps))
    if not by_changes:
        yield from some("step", unit, each.steps, product(E, G, steps))
    yield from some("refit", unit, each.refits, product(P, G, steps))
    yield from some("error", errors, each.errors, product(weight, 4, times))
    yield from some("row_step", "ieee", each.row_steps, lambda n: cost.row_step(n, d, W=weight, E=E))
    for count, steps, mask in each.descents:
        for parts, place in ((1, {"first": True}), (steps - 1, {}), (1, {"last": True})):
            yield from some(
                "conjugate_step", "ieee", count * parts, partial(cost.conjugate_step, d=d, P=P, mask=mask, **place)
            )
    yield from some("lmo", "ieee", each.lmos, lambda n: cost.lmo(n, d))
    # How many swaps lower the error, only the weights tell.
    yield from some("row_swaps", "ieee", each.row_swaps, lambda n: cost.row_swaps(n, d, 0, W=weight))
