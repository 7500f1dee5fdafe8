"""Accumulate Gram and cross matrices of a block's layers over the calibration windows.

Layers that read the same input share its Gram matrix. A cross matrix compares a layer's output with its output in the
dense model.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparsefw.kernels.backend import Backend
from sparsefw.model.layers.experts import experts_of
from sparsefw.model.layers.names import Layer, WeightNames, is_expert
from sparsefw.model.layers.products import Reading
from sparsefw.model.layers.stage import Stage
from sparsefw.model.layers.watch import Selector, Watch, everything
from sparsefw.solver.target import Cross

# Runs one micro-batch, by its number, through a block.
Run = Callable[[int], object]

# What a run returns.
Ran = TypeVar("Ran")

# Outputs of the dense model's layers: called with the number of a micro-batch, then with the name of a layer.
DenseOutputs = Callable[[int], Callable[[str], Tensor | None]]


@dataclass(frozen=True)
class Captured:
    """Layers of a block or of a stage, with the matrices that calibration accumulated.

    Attributes:
        layers: the selected layers, in the order of use. Experts whose inputs are all zero are none: no token was sent
            to them.
        grams: Gram matrices (in, in) fp32, by `Layer.gram`.
        crosses: cross matrices by layer, see `target`; empty without a comparison with the dense model. Experts have
            none, since they are sent other tokens than in the dense model.
        ignored: names of the layers that were seen and not selected.
    """

    layers: list[Layer]
    grams: dict[str, Tensor]
    crosses: dict[str, Cross]
    ignored: list[str]


def capture(
    block: nn.Module,
    run: Run,
    batches: Iterable[int],
    *,
    backend: Backend,
    selected: Selector = everything,
    stage: Stage | None = None,
    dense: DenseOutputs | None = None,
    passing: Container[int] = (),
    experts: frozenset[str] | None = None,
) -> Captured:
    """Run a block over its calibration inputs; find its layers and accumulate the Gram matrices of their inputs.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through it.
        batches: numbers of the micro-batches.
        backend: its `gram_accumulate`, `mirror_lower` and `cross_accumulate` are used.
        selected: selects layers by their names inside the block. An input that no selected layer reads has no Gram
            matrix; like other inputs it stays in memory until the micro-batch has passed.
        stage: watch its layers only, and run no more of the block than they need; None: the whole block.
        dense: outputs of the dense model's layers; with them, cross matrices are accumulated, too.
        passing: numbers of the micro-batches that are run and not measured.
        experts: names of modules that may be experts; None: those of `experts_of`.

    Raises:
        InputError: a layer shares its input with different layers from one micro-batch to the next.
    """
    grams: dict[str, Tensor] = {}
    crosses: dict[str, Cross] = {}

    def add_gram(name: str, tensor: Tensor, reading: Reading) -> None:
        X = reading.rows(tensor)
        if name not in grams:
            grams[name] = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float32, device=X.device)
        if j not in passing:
            backend.gram_accumulate(grams[name], X)

    def add_crosses(dense_output: Callable[[str], Tensor | None]) -> None:
        for name, X, output in watch.outputs.pairs():
            expected = dense_output(name)
            if expected is None or expected.shape != output.shape:
                continue
            if name not in crosses:
                zeros = torch.zeros(output.shape[1], X.shape[1], dtype=torch.float32, device=X.device)
                crosses[name] = Cross("outputs", zeros)
            if j in passing:
                continue
            # Rounded only once, whatever the dtype: torch subtracts in fp32.
            backend.cross_accumulate(crosses[name].matrix, (expected - output).to(X.dtype), X)

    names, experts = WeightNames(block), experts_of(block) if experts is None else experts
    watch = Watch(names, experts, selected, add_gram, stage, record_outputs=dense is not None)
    for j in batches:
        watch.through(partial(run, j))
        if dense:
            add_crosses(dense(j))
    idle = {name for name, G in grams.items() if is_expert(name, experts) and not G.diagonal().any()}
    layers = [layer for layer in watch.layers.values() if layer.gram not in idle]
    grams = {name: backend.mirror_lower(G) for name, G in grams.items() if name not in idle}
    return Captured(layers, grams, crosses, [*watch.ignored])


def dense_outputs(
    block: nn.Module,
    run: Callable[[int], Ran],
    stage: Stage | None = None,
    selected: Selector = everything,
    move: Callable[[int, Ran], object] = lambda j, ran: None,
    experts: frozenset[str] | None = None,
) -> DenseOutputs:
    """Outputs of a stage's layers in the dense model.

    A micro-batch is run as far as the stage needs it, and further if the dense model moves on in the stage.

    Args:
        block: the dense model's block.
        run: runs one of the dense model's micro-batches through it.
        stage: None is the whole block.
        selected: selects the layers whose outputs are recorded; the same as in `capture`, so that outputs of both
            models are followed as far.
        move: moves the micro-batch on, called with its number and what the run returned. What is made of outputs then,
            between two blocks, is no output of a layer.
        experts: names of modules that may be experts; None: those of `experts_of`.
    """
    names, experts = WeightNames(block), experts_of(block) if experts is None else experts
    moves = stage is not None and (stage.final or stage.behind is not None)

    def outputs_of(j: int) -> Callable[[str], Tensor | None]:
        # A new watch for each micro-batch, so that the outputs are freed with it.
        watch = Watch(names, experts, selected, stage=stage, record_outputs=True, run_on=moves)
        ran = watch.through(partial(run, j))
        if ran is not None:
            move(j, ran)
        return watch.outputs.output_of

    return outputs_of
