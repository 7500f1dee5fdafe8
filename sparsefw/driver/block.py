"""The steps of pruning one block: find its stages, measure the inputs of a stage's layers, solve the layers in place.

If layers approximate the dense model's outputs, the calibration windows also run through the dense block, and the block
is pruned stage by stage: the inputs of later layers are measured after earlier layers are pruned.
"""

import itertools
import math
from collections.abc import Container, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparsefw.arithmetic import check_finite
from sparsefw.driver.job import Run
from sparsefw.driver.partition import add_up, combine, exchange, exchange_rows, find_solves, rows_of
from sparsefw.errors import InputError
from sparsefw.memory import trim_memory
from sparsefw.model.block_model import BlockModel
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.layers import Stage, kind_of, not_pruned
from sparsefw.model.measure import Captured, Pair, capture, measure
from sparsefw.model.partial_forward import INPUT
from sparsefw.model.stages import stages, survey
from sparsefw.model.swap import DenseBlock
from sparsefw.ranks import Handle
from sparsefw.report import log
from sparsefw.selection import without_index
from sparsefw.solver.layer import LayerResult, prune_layers

# A dense copy of a block, and the calibration windows of the dense model at the block's input.
Reference = tuple[DenseBlock, HiddenStates]


def read_block(run: Run, i: int) -> DenseBlock | None:
    """Open block i. Returns a copy of its dense weights if the run needs them after the block is pruned."""
    # The peak of the first block is that of the run so far, which may have generated text.
    if i and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    block = run.model.open(i, run.placement.ahead)
    with run.model.timeline.span("read", i):
        return DenseBlock(block) if run.config.uses_dense_target or len(run.config.methods) > 1 else None


def share_of_zeros(run: Run, i: int) -> float:
    """Compute the share of zeros in the weights of block i, which is open and not pruned yet, that will be pruned."""
    parameters = dict(run.model.blocks[i].named_parameters())
    weights = [parameters[name] for name in {without_index(name) for name in run.selected(i)}]
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in weights)
    return zeros / sum(weight.numel() for weight in weights)


def measure_stage(
    run: Run, i: int, stage: Stage | None, states: HiddenStates, dense: Reference | None, held_out: Container[int]
) -> Captured:
    """Accumulate the Gram and cross matrices of a stage's layers.

    Args:
        run: the run.
        i: number of the block, which is open.
        stage: the stage; None: all layers of the block are measured in one run, without the dense model.
        states: the calibration windows, at the block's input or where the previous stage has left them.
        dense: the dense block, and the calibration windows in the dense model. Every stage needs them.
        held_out: numbers of the micro-batches that layers are not fitted to.

    Raises:
        InputError: activations hold NaN or Inf, or the block has no layers.
    """
    selected, backend, experts = run.selected(i).__contains__, run.config.backend, run.of(i).expert_names
    with run.model.timeline.span("calibrate", i):
        if stage is None:
            measured = capture(
                run.model.blocks[i],
                partial(states.output, i),
                [j for j in range(len(states)) if j not in held_out],
                backend=backend,
                selected=selected,
                unpadded=partial(states.unpadded, i),
                experts=experts,
            )
        else:
            assert dense is not None
            pair = Pair(i, states, dense[1], dense[0], experts)
            keep = _is_kept(run, stage)
            measured = measure(stage, pair, backend=backend, selected=selected, keep=keep, passing=held_out)
        measured = combine(run.model.blocks[i], measured, run.ranks, experts)
        if not measured.layers and not measured.ignored:
            raise InputError(f"{run.model.names[i]}: unsupported model: no matrix of this block was seen in a product")
        if stage is None:
            _check_known(run, i, measured.ignored)
        # The solve allocates tensors of other sizes, which do not fit into the memory that micro-batches have freed.
        trim_memory()
        return measured


def calibration_mode(run: Run, found: list[Stage | None]) -> str:
    """Describe for the report how the calibration windows ran through a block with these stages."""
    order = [stage for stage in found if stage]
    if not order:
        return "once through the block"
    start = "a point inside the block" if any(stage.start != INPUT for stage in order) else "the start"
    kept = [layer.name for stage in order if _is_kept(run, stage) for layer in stage.layers]
    return f"stage by stage, from {start}" + (f"; kept: the input of {', '.join(kept)}" if kept else "")


def tensors_of(run: Run, i: int, method: str) -> dict[str, Tensor]:
    """Copy the tensors of block i, which is open and pruned by a method, to the host."""
    with run.model.timeline.span("write", i):
        tensors = run.model.block_tensors(i)
        if method != run.config.method and run.model.device.type == "cpu":
            # Copied, since the next method overwrites the block's memory.
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return tensors


def _is_kept(run: Run, stage: Stage) -> bool:
    # The input of the last stage is not read again if a reconstruction follows: windows return to the block's input.
    if not stage.cacheable or (stage.final and run.config.goes_back):
        return False
    return stage.layers[0].weight.shape[1] <= run.placement.kept_width


def solve(run: Run, i: int, captured: Captured, method: str) -> list[LayerResult]:
    """Prune the measured layers, and free each Gram matrix after its last use.

    Layers with the same input are solved together.
    """
    timeline, ranks = run.model.timeline, run.ranks
    results = dict[str, LayerResult]()
    solves = find_solves(captured, method, run.config, ranks, run.of(i).expert_names)
    arriving = dict[str, list[Handle]]()
    if not ranks.alone:
        with timeline.span("exchange", i):
            arriving = add_up(captured, solves, ranks, run.config.backend)
    for gram, G in captured.grams.items():
        # Checking the diagonal is enough, since it bounds all other entries of G.
        check_finite(f"inputs of {run.model.names[i]}.{gram} (their squares, summed)", G.diagonal())
    last = {solve.gram: n for n, solve in enumerate(solves)}
    for n, solve in enumerate(solves):
        if solve.owner in (None, ranks.number):
            parts = [*zip(solve.layers, solve.rows(ranks), strict=True)]
            with timeline.span("solve", i):
                for layer in solve.layers:
                    for handle in arriving.pop(layer.name, ()):
                        handle.wait()
                solved = prune_layers(
                    [(f"{run.model.names[i]}.{layer.name}", layer.weight[rows]) for layer, rows in parts],
                    captured.grams[solve.gram],
                    method,
                    run.config,
                    memory=run.placement.solver,
                    crosses=[rows_of(captured.crosses.pop(layer.name, None), rows) for layer, rows in parts],
                )
                solved = exchange_rows(solve, solved, ranks)
            for layer, result in zip(solve.layers, solved, strict=True):
                results[layer.name] = replace(result, transposed=layer.transposed)
        if n == last[solve.gram]:
            captured.grams.pop(solve.gram, None)
    if not ranks.alone:
        with timeline.span("exchange", i):
            for handle in itertools.chain(*arriving.values()):
                # Waits also for matrices that other ranks need, as their memory is reused after this.
                handle.wait()
            results = exchange(solves, results, ranks)
    found = [results[layer.name] for solve in solves for layer in solve.layers]
    for result in found:
        run.say(log.layer_row(result, run.model.names[i]))
    return found


def kept_dense(model: BlockModel, i: int, pruned: list[LayerResult]) -> list[str]:
    """List the names of the matrices of block i that were not pruned; empty if the block repeats an earlier one."""
    if i not in model.unique_blocks:
        return []
    prefix = f"{model.names[i]}."
    layers = {result.name.removeprefix(prefix): math.prod(result.shape) for result in pruned}
    return [prefix + name for name in not_pruned(model.blocks[i], layers)]


def unused_matrices(model: BlockModel) -> list[str]:
    """List the names of the matrices in blocks that the model's forward never runs. These matrices stay dense."""
    return [f"{block}.{name}" for block, module in model.unused.items() for name in not_pruned(module, {})]


def find_stages(run: Run, i: int, states: HiddenStates, dense: Reference | None) -> list[Stage | None]:
    """Find the stages of block i, which is open, in the order of use.

    Args:
        run: the run.
        i: number of the block.
        states: the calibration windows before the block. The first micro-batch shows the stages.
        dense: the dense block and its windows, if layers approximate the dense model's outputs. Stages move these
            windows through the block. If there is no stage, they move through it here.

    Returns:
        The stages; [None] if all layers are measured in one run; an empty list if no layer is pruned.
    """
    order = _surveyed(run, i, states) if dense else []
    if dense and not order:
        with run.model.timeline.span("calibrate", i):
            dense[1].advance(i, dense[0])
    return [*order] or [None] * bool(run.selected(i))


def _surveyed(run: Run, i: int, states: HiddenStates) -> list[Stage]:
    """Find the stages of block i by running its first micro-batch; an empty list if no layer is to be pruned."""
    # The micro-batch may not reach a selected expert. Then another expert of the same kind shows the stage.
    experts = run.of(i).expert_names
    kinds = {kind_of(layer, experts) for layer in run.selected(i)}
    if not kinds:
        return []
    known = len(run.split_failures)
    with run.model.timeline.span("calibrate", i):
        run_block = states.run_of(i, 0)
        surveyed = survey(
            run.model.blocks[i],
            run_block,
            states.hidden[0],
            lambda name: kind_of(name, experts) in kinds,
            handed_on=lambda _: states.handed_on(i, run_block),
            split_failures=run.split_failures,
            experts=experts,
        )
    for why in filter(None, [*run.split_failures.values()][known:]):
        run.say(f"{run.model.names[i]}: every stage of this block and of similar ones begins at its start: {why}")
    _check_known(run, i, surveyed.ignored)
    found = stages(surveyed)
    # Ranks must agree on the stages, and on the layers that add to the residual stream.
    outline = [(stage.key, sorted(stage.writes)) for stage in found]
    if any(other != outline for other in run.ranks.gather(outline)):
        raise InputError(
            f"{run.model.names[i]}: unsupported model: windows on other ranks make other calls in it; use one rank"
        )
    return found


def _check_known(run: Run, i: int, unselected: Iterable[str]) -> None:
    """Refuse a block that uses a matrix that its trial run did not show. The matrix would silently stay dense."""
    dense, block = run.model.shared.names, run.model.names[i]
    others = [name for name in unselected if f"{block}.{name}" not in dense]
    unknown = [name for name in others if kind_of(name, run.of(i).expert_names) not in run.of(i).seen]
    if unknown:
        raise InputError(f"{block}.{unknown[0]}: unsupported model: the block multiplies with it for some tokens only")
