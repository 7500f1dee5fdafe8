"""Accumulate Gram and cross matrices of a block's layers over the calibration windows.

Layers that read the same input share its Gram matrix. A cross matrix compares a layer with the dense model. To measure
a stage, the windows of both models run through the part of the block that the stage needs. Afterwards the pruned
model's windows are at the stage's start, and the dense model's windows at the start of the next stage.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.kernels.backend import Backend
from sparsefw.model.activations import Activations
from sparsefw.model.find_layers import WeightNames
from sparsefw.model.hidden_states import BlockRun, HiddenStates
from sparsefw.model.layers import Experts, Layer, Stage, is_expert
from sparsefw.model.padding import without_padding
from sparsefw.model.partial_forward import INPUT, Point
from sparsefw.model.stubs import hidden_of
from sparsefw.model.watch import Selector, Watch, everything
from sparsefw.solver.targets import Cross

# Called with the number of a micro-batch; runs it through a block.
Run = Callable[[int], Any]


@dataclass(frozen=True)
class Captured:
    """Layers of a block or of a stage, with their Gram and cross matrices.

    Attributes:
        layers: the selected layers, in the order of use. Experts that got no token are not listed.
        grams: Gram matrices (in, in) fp32, by `Layer.gram`.
        crosses: cross matrices by the layer's name; empty if there was no comparison with the dense model. Experts have
            no cross matrix, since in the dense model they get other tokens.
        ignored: names of the layers that `selected` has left out.
    """

    layers: list[Layer]
    grams: dict[str, Tensor]
    crosses: dict[str, Cross]
    ignored: list[str]


class _Sums:
    """Gram and cross matrices by name, in fp32, summed over micro-batches."""

    def __init__(self, backend: Backend) -> None:
        self.grams: dict[str, Tensor] = {}
        self.crosses: dict[str, Tensor] = {}
        self._backend = backend

    def add_gram(self, name: str, X: Tensor) -> None:
        """Add X^T X of inputs X (tokens, in)."""
        self._backend.gram_accumulate(_zeros_in(self.grams, name, X, X), X)

    def add_cross(self, name: str, A: Tensor, B: Tensor) -> None:
        """Add A^T B of A (tokens, rows) and B (tokens, columns)."""
        self._backend.cross_accumulate(_zeros_in(self.crosses, name, A, B), A, B)


def _zeros_in(sums: dict[str, Tensor], name: str, A: Tensor, B: Tensor) -> Tensor:
    """The sum that A^T B is added to; made of zeros if there is none of this name."""
    if name not in sums:
        sums[name] = torch.zeros(A.shape[1], B.shape[1], dtype=torch.float32, device=A.device)
    return sums[name]


def capture(
    block: nn.Module,
    run: Run,
    batches: Iterable[int],
    *,
    backend: Backend,
    selected: Selector = everything,
    stage: Stage | None = None,
    dense: tuple[nn.Module, Run] | None = None,
    unpadded: Callable[[int], Tensor | None] = lambda j: None,
    move: Callable[[int, Any], None] = lambda j, ran: None,
    experts: Experts,
) -> Captured:
    """Run a block on its calibration inputs; find its layers and accumulate the Gram matrices of their inputs.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through the block.
        batches: numbers of the micro-batches.
        backend: the kernels that accumulate the matrices.
        selected: selects layers by their names inside the block. An input that no selected layer reads has no Gram
            matrix.
        stage: watch only this stage's layers, and run no more of the block than they need; None: watch the whole block.
        dense: the dense model's block, and a function that runs a micro-batch through it; None: do not accumulate cross
            matrices.
        unpadded: called with the number of a micro-batch; returns the positions without padding, None: all.
        move: called after each run of the dense model with the number of the micro-batch, and the result of the run;
            None in place of the result if the run ended early. It is called outside of the watch, so that the calls
            that it makes are not taken for layers.
        experts: names of modules that may be experts.

    Raises:
        InputError: the layers that share an input differ between two micro-batches.
    """
    sums, names, dense_names = _Sums(backend), WeightNames(block), WeightNames((dense or [block])[0])

    def add_crosses(j: int, run_dense: Run) -> None:
        # A new watch for each micro-batch, so that its outputs are freed at the end of this function.
        dense_watch = Watch(dense_names, experts, selected, stage=stage, record_outputs=True)
        move(j, dense_watch.through(partial(run_dense, j)))
        for name, X, output in watch.pairs():
            expected = dense_watch.output_of(name)
            if expected is not None and expected.shape == output.shape:
                # In half precision torch subtracts in fp32, and rounds only the difference.
                sums.add_cross(name, (expected - output).to(X.dtype), X)

    watch = Watch(names, experts, selected, sums.add_gram, stage, record_outputs=dense is not None)
    for j in batches:
        watch.through(partial(run, j), unpadded(j))
        # A separate function, so that no variable keeps the micro-batch's tensors in memory.
        if dense:
            add_crosses(j, dense[1])
    idle = {name for name, G in sums.grams.items() if is_expert(name, experts) and not G.diagonal().any()}
    layers = [layer for layer in watch.layers.values() if layer.gram not in idle]
    grams = {name: backend.mirror_lower(G) for name, G in sums.grams.items() if name not in idle}
    crosses = {name: Cross("outputs", matrix) for name, matrix in sums.crosses.items()}
    return Captured(layers, grams, crosses, [*watch.ignored])


@dataclass(frozen=True)
class Pair:
    """A block of the pruned and of the dense model, with the calibration windows of both.

    Attributes:
        number: number of the block.
        pruned: the windows in the pruned model, whose block is open.
        dense: the windows in the dense model.
        dense_block: the block of the dense model.
        experts: names of modules that may be experts.
    """

    number: int
    pruned: HiddenStates
    dense: HiddenStates
    dense_block: nn.Module
    experts: Experts


def measure(
    stage: Stage, pair: Pair, *, backend: Backend, selected: Selector, keep: bool, passing: Container[int] = ()
) -> Captured:
    """Measure a stage: accumulate the Gram and cross matrices of its layers.

    Args:
        stage: the stage.
        pair: the block in both models. Its windows move on, see the module's docstring.
        backend: the kernels that accumulate the matrices.
        selected: selects layers by their names inside the block.
        keep: whether to keep the layers' inputs in the pruned model, so that the next run begins there.
        passing: numbers of the micro-batches that move on without being measured (the held-out ones).

    Raises:
        InputError: the block runs differently from one micro-batch to the next, or activations hold NaN or Inf.
    """
    kept = (stage.input, Activations(pair.pruned.hidden.store)) if keep and stage.input is not None else None
    if stage.input is None:
        captured = _measure_watched(stage, pair, backend, selected, passing)
    else:
        captured = _measure_known(stage, stage.input, pair, backend, kept and kept[1], passing)
    pair.pruned.arrive(stage.start, kept)
    if stage.final:
        pair.dense.arrive(INPUT)
    elif stage.next_start is not None:
        pair.dense.arrive(stage.next_start)
    return captured


def _measure_known(
    stage: Stage, input_point: Point, pair: Pair, backend: Backend, kept: Activations | None, passing: Container[int]
) -> Captured:
    """Measure a stage whose input is a known point of the block; the inputs are appended to `kept`."""
    sums, streams = _Sums(backend), {write.stream for write in stage.writes.values()}
    gram = stage.layers[0].gram
    for j in range(len(pair.pruned)):
        taken = _run_pruned(stage, pair, j, take={input_point, *streams}, end=input_point)
        if kept is not None:
            kept.append(taken[input_point])
        X = _as_matrix(without_padding(taken[input_point], pair.pruned.unpadded(pair.number, j)))
        dense = _dense_tensors(stage, pair, j)
        if j in passing:
            continue
        sums.add_gram(gram, X)
        if input_point in dense:
            sums.add_cross("", X, dense[input_point] - X)
        for layer in stage.layers:
            if write := stage.writes.get(layer.name):
                # The layer has to fill the gap between the streams. torch subtracts in fp32, and rounds only the gap.
                S, h = dense[write.sum], _as_matrix(taken[write.stream])
                sums.add_cross(layer.name, (S - h).to(X.dtype), X)
                if layer.bias is not None:
                    # The bias is part of h. It is subtracted in fp32 here, as the gap is rounded.
                    sums.crosses[layer.name].addr_(layer.bias.float(), X.sum(0, dtype=torch.float32), alpha=-1)
    backend.mirror_lower(sums.grams[gram])
    # X^T (X_dense - X) of all layers that do not write to the stream.
    shared = Cross("inputs", sums.crosses.pop("")) if "" in sums.crosses else None
    crosses = {name: Cross("streams", matrix) for name, matrix in sums.crosses.items()}
    crosses |= {layer.name: shared for layer in stage.layers if shared and layer.name not in crosses}
    return Captured([*stage.layers], sums.grams, crosses, [])


def _dense_tensors(stage: Stage, pair: Pair, j: int) -> dict[Point | None, Tensor]:
    """Run micro-batch j of the dense model, return the tensors that a stage is compared with, and move j on.

    Returns:
        Matrices (tokens, width) by point: the input, if a layer is measured from it, and the stream after each layer
        that writes to it. The key None stands for the block's output.
    """
    compared = {write.sum for write in stage.writes.values()}
    if len(stage.writes) < len(stage.layers):
        compared.add(stage.input)
    wanted = {point for point in (*compared, stage.next_start) if point is not None}
    end = None if stage.final or None in compared else max(wanted, key=lambda point: point.call)
    taken, output = pair.dense.part(pair.number, j, pair.dense_block, take=wanted, end=end)
    tensors: dict[Point | None, Tensor] = dict(taken.items())
    if output is not None:
        tensors[None] = hidden_of(output.returned)
    if stage.final and output is not None:
        pair.dense.leave(pair.number, j, output)
    elif stage.next_start is not None:
        pair.dense.put(pair.number, j, taken[stage.next_start])
    return {point: _as_matrix(tensors[point]) for point in compared}


def _measure_watched(
    stage: Stage, pair: Pair, backend: Backend, selected: Selector, passing: Container[int]
) -> Captured:
    """Measure a stage without a known input, by watching its layers: experts, or layers compared by their outputs."""
    run_dense = partial(pair.dense.part, pair.number, block=pair.dense_block)

    def move(j: int, ran: tuple[object, BlockRun] | None) -> None:
        """Move micro-batch j of the dense model on. `ran` is its run so far; None if the run ended early."""
        if stage.final:
            pair.dense.leave(pair.number, j, ran[1] if ran else pair.dense.output(pair.number, j, pair.dense_block))
        elif stage.next_start is not None:
            taken, _ = run_dense(j, take=(stage.next_start,), end=stage.next_start)
            pair.dense.put(pair.number, j, taken[stage.next_start])

    micro_batches = range(len(pair.pruned))
    # Experts are not compared with the dense model.
    captured = capture(
        pair.pruned.model.blocks[pair.number],
        partial(_run_pruned, stage, pair),
        [j for j in micro_batches if j not in passing],
        backend=backend,
        selected=selected,
        stage=stage,
        dense=(pair.dense_block, run_dense) if stage.last else None,
        unpadded=partial(pair.pruned.unpadded, pair.number),
        move=move,
        experts=pair.experts,
    )
    for j in micro_batches:
        if j in passing:
            _run_pruned(stage, pair, j, end=stage.start)
        if j in passing or not stage.last:
            move(j, None)
    return captured


def _run_pruned(
    stage: Stage, pair: Pair, j: int, *, take: Iterable[Point] = (), end: Point | None = None
) -> dict[Point, Tensor]:
    """Run micro-batch j of the pruned model up to `end`, and move it to the stage's start; returns tensors by point."""
    moves = pair.pruned.position != stage.start
    taken, _ = pair.pruned.part(pair.number, j, take={*take, stage.start} if moves else take, end=end)
    if moves:
        pair.pruned.put(pair.number, j, taken[stage.start])
    return taken


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
