"""Prune one block: accumulate the Gram matrices of its layers' inputs, choose masks and weights, write them in place.

Where layers approximate the dense model's outputs, the same windows also go through the dense block, and the block is
pruned in stages: the inputs of later layers are measured after earlier ones are pruned.
"""

import math
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

from torch import nn

from sparsefw.driver.solves import Solve, add_up, combine, exchange, find_solves
from sparsefw.errors import InputError
from sparsefw.finite import check_finite
from sparsefw.kernels.backend import Backend
from sparsefw.memory import give_back
from sparsefw.model import BlockModel, HiddenStates
from sparsefw.model.layers import (
    Captured,
    Confirmed,
    Layer,
    Pair,
    Stage,
    capture,
    kind_of,
    measure,
    not_pruned,
    stages,
    survey,
)
from sparsefw.model.parts import INPUT
from sparsefw.model.slots import addresses
from sparsefw.ranks import ALONE, Ranks
from sparsefw.solver import LayerResult, PruneConfig, prune_layers


@dataclass(frozen=True)
class Run:
    """Model, config and backend that all blocks of a run share.

    Attributes:
        model: the model.
        config: how the model is pruned.
        backend: the operations.
        memory: bytes that the state of one solve may take.
        layers: full names of the layers to prune, see `ModelShape`.
        kept_width: entries of the widest input that is kept, see `Placement`.
        seen: by block, the kinds of matrices that are known to be in products, see `BlockShape`; empty: not checked.
        ranks: the processes of the run, each with its share of the windows.
        confirmed: what is known of running blocks in parts, see `layers.survey`.
        predicts: whether next tokens are predicted from what the last block puts out, see `BlockShape`.
        experts: by block, names of the modules that may be experts, see `BlockShape`.
    """

    model: BlockModel
    config: PruneConfig
    backend: Backend
    memory: int
    layers: frozenset[str]
    kept_width: int = 0
    seen: tuple[frozenset[str], ...] = ()
    ranks: Ranks = ALONE
    confirmed: Confirmed = field(default_factory=dict)
    predicts: bool = field(kw_only=True)
    experts: tuple[frozenset[str], ...] = field(kw_only=True)


@dataclass
class DenseReference:
    """A block of the dense model and its input, for a method whose layers approximate the dense model's outputs.

    Attributes:
        block: the block before it is pruned.
        states: the calibration windows before the block in the dense model. Its stages move them on to the next block.
        stages: the stages of the block; none if no layer is pruned.
    """

    block: nn.Module
    states: HiddenStates
    stages: list[Stage]


def prune_block(
    run: Run,
    i: int,
    states: HiddenStates,
    method: str,
    dense: DenseReference | None = None,
    held_out: Container[int] = (),
) -> Iterator[LayerResult]:
    """Prune block i, which is open, layer by layer.

    Args:
        run: what all blocks share.
        i: number of the block.
        states: the calibration windows before the block. With `dense` they move on inside the block, as far as it is
            pruned for good.
        method: one of METHODS.
        dense: the dense model's block. With it, layers approximate the dense model's outputs.
        held_out: numbers of the micro-batches that layers are not fitted to.

    Yields:
        A result for each layer that the config selects.

    Raises:
        InputError: activations hold NaN or Inf, a layer does not fit the pattern, or the block has no layers.
    """
    timeline = run.model.timeline
    if dense is None or not dense.stages:
        if dense:
            # There is no stage to move the dense windows on.
            with timeline.span("calibrate", i):
                dense.states.advance(i, dense.block)
        if _selected_layers(run, i):
            # All layers of the block are measured at once.
            with timeline.span("calibrate", i):
                captured = combine(run.model.blocks[i], _capture(run, i, states, held_out), run.ranks, run.experts[i])
                _check_seen(run, i, captured)
                _check_known(run, i, captured.ignored)
                _check_apart(run, i, captured.layers)
            yield from _solve(run, i, captured, method)
        return
    pair, pruned = Pair(i, states, dense.states, dense.block, run.experts[i]), list[Layer]()
    for stage in dense.stages:
        with timeline.span("calibrate", i):
            captured = measure(
                stage,
                pair,
                backend=run.backend,
                selected=_selector(run, i),
                keep=_is_kept(run, stage),
                passing=held_out,
            )
            captured = combine(run.model.blocks[i], captured, run.ranks, run.experts[i])
            _check_seen(run, i, captured)
            pruned += captured.layers
            _check_apart(run, i, pruned)
            # The solve allocates other sizes than the micro-batches have left.
            give_back()
        yield from _solve(run, i, captured, method)


def way_through(run: Run, dense: DenseReference | None) -> str:
    """How the calibration windows run through a block, in words."""
    if dense is None or not dense.stages:
        return "once through the block"
    starts = {stage.start for stage in dense.stages} - {INPUT}
    kept = [layer.name for stage in dense.stages if _is_kept(run, stage) for layer in stage.layers]
    origin = f"{len(starts)} points inside the block" if len(starts) > 1 else "a point inside the block"
    runs = f"stage by stage, from {origin if starts else 'the start'}"
    return runs + (f"; kept: the input of {', '.join(kept)}" if kept else "")


def _is_kept(run: Run, stage: Stage) -> bool:
    return stage.keepable and stage.layers[0].weight.shape[1] <= run.kept_width


def _solve(run: Run, i: int, captured: Captured, method: str) -> Iterator[LayerResult]:
    """Prune the layers that were measured, those of one input at a time. Their matrices leave memory one by one."""
    timeline, ranks = run.model.timeline, run.ranks
    results = dict[str, LayerResult]()
    solves = find_solves(captured, method, run.config, ranks, run.experts[i])
    if not ranks.alone:
        with timeline.span("exchange", i):
            add_up(captured, solves, ranks, run.backend)
    _check_sums(run, i, captured)
    last = {solve.gram: n for n, solve in enumerate(solves)}
    for n, solve in enumerate(solves):
        if solve.owner in (None, ranks.number):
            with timeline.span("solve", i):
                results |= _solve_one(run, i, captured, method, solve)
        if n == last[solve.gram]:
            captured.grams.pop(solve.gram, None)
        if ranks.alone:
            yield from (results.pop(layer.name) for layer in solve.layers)
    if not ranks.alone:
        with timeline.span("exchange", i):
            for cross in captured.crosses.values():
                # Those of other ranks' solves: nothing of theirs may be under way when their memory is used again.
                cross.arrived.wait()
            results = exchange(solves, results, ranks)
        yield from (results[layer.name] for solve in solves for layer in solve.layers)


def _solve_one(run: Run, i: int, captured: Captured, method: str, solve: Solve) -> dict[str, LayerResult]:
    """The results of a solve, by the names of its layers in block i."""
    ranks = run.ranks if solve.owner is None else ALONE
    results = prune_layers(
        [(f"{run.model.names[i]}.{layer.name}", layer.weight) for layer in solve.layers],
        captured.grams[solve.gram],
        method,
        run.config,
        run.backend,
        memory=run.memory,
        crosses=[captured.crosses.pop(layer.name, None) for layer in solve.layers],
        ranks=ranks,
    )
    return {
        layer.name: replace(result, transposed=layer.transposed)
        for layer, result in zip(solve.layers, results, strict=True)
    }


def kept_dense(model: BlockModel, i: int, pruned: list[LayerResult]) -> list[str]:
    """Names of the matrices of block i that were not pruned; none of a repeat."""
    if i not in model.firsts:
        return []
    prefix = f"{model.names[i]}."
    layers = {result.name.removeprefix(prefix): math.prod(result.shape) for result in pruned}
    return [prefix + name for name in not_pruned(model.blocks[i], layers)]


def idle_matrices(model: BlockModel) -> list[str]:
    """Names of the matrices in blocks that the model does not run through: they stay dense."""
    return [f"{block}.{name}" for block, module in model.idle.items() for name in not_pruned(module, {})]


def _selector(run: Run, i: int) -> Callable[[str], bool]:
    """A function that says by a layer's name inside block i whether the layer is to be pruned."""
    prefix = run.model.names[i]
    return lambda name: f"{prefix}.{name}" in run.layers


def _selected_layers(run: Run, i: int) -> list[str]:
    """Names inside block i of the layers that are to be pruned."""
    prefix = f"{run.model.names[i]}."
    return [name.removeprefix(prefix) for name in run.layers if name.startswith(prefix)]


def find_stages(run: Run, i: int, states: HiddenStates) -> list[Stage]:
    """The stages of block i, which is open. The first micro-batch shows them; none if no layer is to be pruned."""
    # It may not reach the experts that are selected: others of their kind stand for them.
    experts = run.experts[i]
    kinds = {kind_of(layer, experts) for layer in _selected_layers(run, i)}
    if not kinds:
        return []
    with run.model.timeline.span("calibrate", i):
        inputs = states.inputs(i, 0)
        surveyed = survey(
            run.model.blocks[i],
            lambda hidden: states.call(i, 0, hidden, inputs=inputs),
            states.hidden[0],
            lambda name: kind_of(name, experts) in kinds,
            handed_on=partial(states.handed_on, i, inputs),
            confirmed=run.confirmed,
            experts=experts,
        )
    _check_known(run, i, surveyed.ignored)
    found = stages(surveyed)
    if any(other != _outline(found) for other in run.ranks.gather(_outline(found))):
        raise InputError(
            f"{run.model.names[i]}: unsupported model: windows on other ranks run through it in another way"
        )
    return found


def _outline(order: list[Stage]) -> list[tuple[str, list[str]]]:
    """The stages, and the layers that write to the stream: ranks must agree on them."""
    return [(stage.key, sorted(stage.writes)) for stage in order]


def _capture(run: Run, i: int, states: HiddenStates, held_out: Container[int]) -> Captured:
    """Gram matrices of all layers of block i, by all calibration windows that are not held out."""
    return capture(
        run.model.blocks[i],
        partial(states.output, i),
        [j for j in range(len(states)) if j not in held_out],
        backend=run.backend,
        selected=_selector(run, i),
        experts=run.experts[i],
    )


def _check_seen(run: Run, i: int, captured: Captured) -> None:
    """Refuse a block without layers."""
    if not captured.layers and not captured.ignored:
        raise InputError(f"{run.model.names[i]}: unsupported model: no matrix of this block was seen in a product")


def _check_sums(run: Run, i: int, captured: Captured) -> None:
    """Refuse a Gram matrix that is not finite."""
    prefix = run.model.names[i]
    for gram, G in captured.grams.items():
        # The diagonal bounds all other entries of G.
        check_finite(f"inputs of {prefix}.{gram} (their squares, summed)", G.diagonal())


def _check_known(run: Run, i: int, unselected: Iterable[str]) -> None:
    """Refuse a block that multiplies with other matrices than it did without weights: they would stay dense unsaid."""
    dense, block = run.model.shared.names, run.model.names[i]
    others = [name for name in unselected if f"{block}.{name}" not in dense]
    unknown = [name for name in others if run.seen and kind_of(name, run.experts[i]) not in run.seen[i]]
    if unknown:
        raise InputError(f"{block}.{unknown[0]}: unsupported model: the block multiplies with it for some tokens only")


def _check_apart(run: Run, i: int, layers: list[Layer]) -> None:
    """Refuse a block with layers that have weights in common: they would be pruned twice."""
    places = sorted((*addresses(layer.weight), layer.name) for layer in layers)
    for (_, end, name), (start, _, other) in pairwise(places):
        if start < end:
            raise InputError(f"{run.model.names[i]}.{other}: unsupported model: it has weights in common with {name}")
