"""Measure a stage against the dense model: Gram and cross matrices of its layers.

Both models run only the part of the block that the stage needs, and move on as far as the next stage needs them to: the
pruned model to the stage's start when the layers before it are pruned, the dense model to the start of the next stage.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparsefw.kernels.backend import Backend
from sparsefw.model.activations import Activations
from sparsefw.model.hidden_states import BlockOutput, HiddenStates
from sparsefw.model.layers.capture import Captured, capture, dense_outputs
from sparsefw.model.layers.names import Layer
from sparsefw.model.layers.stage import Stage
from sparsefw.model.layers.watch import Selector
from sparsefw.model.parts import INPUT, Point
from sparsefw.solver.target import Cross


@dataclass(frozen=True)
class Pair:
    """A block in both models, with their calibration windows.

    Attributes:
        number: number of the block.
        pruned: the windows in the pruned model, whose block is open.
        dense: the windows in the dense model.
        dense_block: the dense model's block.
        experts: as for `WeightNames`.
    """

    number: int
    pruned: HiddenStates
    dense: HiddenStates
    dense_block: nn.Module
    experts: frozenset[str] | None = None


class _Sums:
    """The matrices of a stage, summed over micro-batches."""

    def __init__(self, stage: Stage, backend: Backend) -> None:
        self.G: Tensor | None = None
        # X (X_dense - X)^T, of all layers that do not write to the stream.
        self.C: Tensor | None = None
        self.streams: dict[str, Tensor] = {}
        self._stage, self._backend = stage, backend

    def add_input(self, X: Tensor, X_dense: Tensor | None) -> None:
        """Add a micro-batch's inputs (tokens, d) of both models."""
        if self.G is None:
            self.G = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float32, device=X.device)
        self._backend.gram_accumulate(self.G, X)
        if X_dense is not None:
            if self.C is None:
                self.C = torch.zeros_like(self.G)
            self._backend.cross_accumulate(self.C, X, X_dense - X)

    def add_streams(self, layer: Layer, S: Tensor, h: Tensor, X: Tensor) -> None:
        """Add a micro-batch's input X of a layer that is to fill the gap between streams, S - h (tokens, rows)."""
        if layer.name not in self.streams:
            self.streams[layer.name] = torch.zeros(layer.weight.shape, dtype=torch.float32, device=X.device)
        # Rounded only once: torch subtracts in fp32.
        self._backend.cross_accumulate(self.streams[layer.name], (S - h).to(X.dtype), X)
        if layer.bias is not None:
            # Apart from the gap, which it would make a number with more digits.
            self.streams[layer.name].addr_(layer.bias.float(), X.float().sum(0), alpha=-1)

    def captured(self) -> Captured:
        """The matrices by layer."""
        assert self.G is not None
        self._backend.mirror_lower(self.G)
        crosses = {name: Cross("streams", matrix) for name, matrix in self.streams.items()}
        if self.C is not None:
            shared = Cross("inputs", self.C)
            crosses |= {layer.name: shared for layer in self._stage.layers if layer.name not in crosses}
        gram = self._stage.layers[0].gram
        return Captured(list(self._stage.layers), {gram: self.G}, crosses, [])


def measure(
    stage: Stage, pair: Pair, *, backend: Backend, selected: Selector, keep: bool, passing: Container[int] = ()
) -> Captured:
    """Measure a stage.

    Args:
        stage: the stage.
        pair: the block. Its windows move on.
        backend: its `gram_accumulate`, `mirror_lower` and `cross_accumulate` are used.
        selected: selects layers by their names inside the block.
        keep: whether the pruned model's inputs are kept. The next run begins there, and not at the stage's start.
        passing: numbers of the micro-batches that are not measured, and only move on.

    Raises:
        InputError: the block runs differently from one micro-batch to the next, or activations hold NaN or Inf.
    """
    kept = None
    if stage.input is None:
        captured = _measure_watched(stage, pair, backend, selected, passing)
    else:
        if keep:
            kept = stage.input, Activations(pair.pruned.store)
        captured = _measure_known(stage, stage.input, pair, backend, kept and kept[1], passing)
    pair.pruned.arrive(stage.start, kept)
    if stage.final:
        pair.dense.arrive(INPUT)
    elif stage.behind is not None:
        pair.dense.arrive(stage.behind)
    return captured


def _measure_known(
    stage: Stage, input_point: Point, pair: Pair, backend: Backend, kept: Activations | None, passing: Container[int]
) -> Captured:
    """Measure layers whose input is a known point of the block; `kept` receives their inputs."""
    sums, streams = _Sums(stage, backend), {write.stream for write in stage.writes.values()}
    for j in range(len(pair.pruned)):
        taken = _run_pruned(stage, pair, j, take={input_point, *streams}, end=input_point)
        if kept is not None:
            kept.append(taken[input_point])
        X = _as_matrix(taken[input_point])
        X_dense, behind = _dense_tensors(stage, pair, j)
        if j in passing:
            continue
        sums.add_input(X, X_dense)
        for layer in stage.layers:
            if write := stage.writes.get(layer.name):
                sums.add_streams(layer, behind[write.sum], _as_matrix(taken[write.stream]), X)
    return sums.captured()


def _dense_tensors(stage: Stage, pair: Pair, j: int) -> tuple[Tensor | None, dict[Point | None, Tensor]]:
    """The dense model's input of a stage in micro-batch j, and its streams behind the layers that write to them.

    The input is None if no layer needs it. All are matrices, (tokens, width).
    """
    sums = {write.sum for write in stage.writes.values()}
    reads = len(stage.writes) < len(stage.layers)
    wanted = {point for point in (stage.input if reads else None, stage.behind, *sums) if point is not None}
    end = None if stage.final or None in sums else max(wanted, key=lambda point: point.call)
    taken, output = _run_dense(stage, pair, j, take=wanted, end=end)
    X_dense = _as_matrix(taken[stage.input]) if reads and stage.input is not None else None
    streams: dict[Point | None, Tensor] = {point: _as_matrix(taken[point]) for point in sums if point is not None}
    if output is not None:
        streams[None] = _as_matrix(output.hidden)
    return X_dense, streams


def _measure_watched(
    stage: Stage, pair: Pair, backend: Backend, selected: Selector, passing: Container[int]
) -> Captured:
    """Measure layers that have to be watched: experts, and layers whose outputs in both models are recorded."""
    outputs = None
    # Experts are not compared with the dense model. For them it runs only to move on.
    if stage.last or stage.final or stage.behind:

        def run_dense(j: int) -> tuple[dict[Point, Tensor], BlockOutput | None]:
            take = () if stage.behind is None else (stage.behind,)
            return pair.dense.part(pair.number, j, pair.dense_block, take=take, end=stage.behind)

        move = partial(_move_dense, stage, pair)
        outputs = dense_outputs(pair.dense_block, run_dense, stage, selected, move, pair.experts)
    return capture(
        pair.pruned.model.blocks[pair.number],
        lambda j: _run_pruned(stage, pair, j),
        range(len(pair.pruned)),
        backend=backend,
        selected=selected,
        stage=stage,
        dense=outputs,
        passing=passing,
        experts=pair.experts,
    )


def _run_pruned(
    stage: Stage, pair: Pair, j: int, *, take: Iterable[Point] = (), end: Point | None = None
) -> dict[Point, Tensor]:
    """Run micro-batch j of the pruned model as far as a stage needs it, and move it on to the stage's start."""
    moves = pair.pruned.position != stage.start
    taken, _ = pair.pruned.part(pair.number, j, take={*take, stage.start} if moves else take, end=end)
    if moves:
        pair.pruned.put(pair.number, j, taken[stage.start])
    return taken


def _run_dense(
    stage: Stage, pair: Pair, j: int, *, take: Iterable[Point], end: Point | None
) -> tuple[dict[Point, Tensor], BlockOutput | None]:
    """Run micro-batch j of the dense model as far as a stage needs it, and move it on to where the next one starts."""
    ran = pair.dense.part(pair.number, j, pair.dense_block, take=take, end=end)
    _move_dense(stage, pair, j, ran)
    return ran


def _move_dense(stage: Stage, pair: Pair, j: int, ran: tuple[dict[Point, Tensor], BlockOutput | None]) -> None:
    """Move micro-batch j of the dense model on to where the next stage starts, by what a run of it returned."""
    taken, output = ran
    if stage.final and output is not None:
        pair.dense.leave(pair.number, j, output)
    elif stage.behind is not None:
        pair.dense.put(pair.number, j, taken[stage.behind])


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
