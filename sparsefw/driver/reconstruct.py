"""Reconstruct a pruned block: fit its kept weights together, so that its outputs approximate those of the dense block.

The loss of a token is e = ||out - target||^2 / ||target||^2, where `out` and `target` are the outputs of the pruned and
of the dense block. It is relative, because a few tokens have hidden states a thousand times larger than others. If only
the pruned model gives a token such a large hidden state, e is in the hundreds, and would dominate the sum over tokens.
So the loss is 1 + log(e) where e is above 1.

A step takes the gradients of one micro-batch, or of a piece of one, on every rank. A round makes one or more passes
over the windows. The loss on held-out micro-batches judges a round: if the round does not lower this loss, its weights
are put back; if it lowers the loss by much, another round follows. A few blocks need far more steps than others, such
as the block that gives the first token its large hidden state.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from sparsefw.arithmetic import rounded_products
from sparsefw.driver.job import Run
from sparsefw.errors import InputError, first_line, option, shown
from sparsefw.memory import trim_memory
from sparsefw.model.activations import split_batches
from sparsefw.model.block_model import BlockModel
from sparsefw.model.gradients import SliceGradients, with_same_bits
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.layers import layer_of
from sparsefw.model.padding import without_padding
from sparsefw.model.stubs import ForwardFailed
from sparsefw.report.content import Reconstruction
from sparsefw.selection import without_index
from sparsefw.solver.kept_weights import KeptWeights
from sparsefw.solver.layer import LayerResult

# The rate of a round's first step, see `kept_weights`. It falls to 0 along half a period of a cosine.
RATE = 0.16

# Another round follows a round that has lowered the loss by the share WORTH, up to MAX_ROUNDS rounds.
WORTH, MAX_ROUNDS = 0.05, 4


def reconstruct(
    run: Run,
    i: int,
    states: HiddenStates,
    dense: HiddenStates,
    results: Sequence[LayerResult],
) -> Reconstruction | None:
    """Reconstruct block i, which is open and pruned.

    Args:
        run: the run; its config has the number of passes over the windows in a round.
        i: number of the block.
        states: the calibration windows before the block in the pruned model.
        dense: the calibration windows after the block in the dense model.
        results: the results of the block's pruned layers.

    Returns:
        The losses and the number of steps. None if no layer is pruned, or if the next block does not read the output of
        this block: the first block of a decoder does not read the output of the encoder's last block.

    Raises:
        InputError: the block's output has no gradients, or computing them fails.
    """
    if not results or not states.is_chained(i):
        return None
    learned, held_out = split_batches(len(states))
    fit = BlockFit(run, i, states, dense, learned, held_out)
    # All ranks make the same number of steps. A rank with fewer micro-batches starts over at its first one.
    steps = run.config.reconstruct * max(run.ranks.gather(len(fit.steps[0])))
    losses = _rounds(fit, results, steps)
    # Ranks may differ: an expert that only one rank's windows reach may have an operation that no other rank uses.
    varies = dict.fromkeys(name for names in run.ranks.gather(fit.varies) for name in names)
    rounds = len(losses) - 1
    while len(losses) > 2 and not losses[-1] < min(losses[:-1]):
        # The last round was put back.
        losses.pop()
    return Reconstruction(
        before=losses[0],
        after=losses[-1],
        steps=rounds * steps,
        put_back=not losses[-1] < losses[0],
        varies=", ".join(varies),
    )


def _rounds(fit: "BlockFit", results: Sequence[LayerResult], steps: int) -> list[float]:
    """Make rounds while they lower the loss by the share WORTH.

    Args:
        fit: the reconstruction.
        results: the results of the block's pruned layers.
        steps: steps of a round.

    Returns:
        The held-out losses before the first round and after each round.
    """
    matrices, losses = pruned_matrices(fit.run.model, fit.number, results), [fit.loss()]
    while len(losses) == 1 or (len(losses) <= MAX_ROUNDS and losses[-1] < (1 - WORTH) * min(losses[:-1])):
        weights = KeptWeights(matrices, fit.run.config.backend)
        try:
            losses.append(fit.round(weights, RATE, steps, min(losses)))
        finally:
            weights.close()
        # Without this, the freed memory of this round would stay allocated besides the state of the next round.
        trim_memory()
    return losses


def pruned_matrices(
    model: BlockModel, i: int, results: Iterable[LayerResult]
) -> list[tuple[nn.Parameter, list[Tensor]]]:
    """List the parameters with pruned layers in block i, which is open, each with the matrices of its layers."""
    block, prefix, views = model.blocks[i], f"{model.names[i]}.", dict[str, list[Tensor]]()
    for result in (x for x in results if x.name.startswith(prefix)):
        name = result.name.removeprefix(prefix)
        weight = layer_of(block, name, "", result.shape, result.transposed).weight
        views.setdefault(without_index(name), []).append(weight)
    return [(block.get_parameter(name), listed) for name, listed in views.items()]


def relative_loss(out: Tensor, target: Tensor) -> Tensor:
    """Sum over all tokens e = ||out - target||^2 / ||target||^2, or 1 + log(e) where e is above 1, in fp32.

    A token whose target is 0 does not count.

    Args:
        out, target: (..., d) hidden states.
    """
    target = target.float()
    size = target.square().sum(-1)
    scale = torch.where(size > 0, 1 / size, 0.0)
    e = (out.float() - target).square().sum(-1) * scale
    return torch.where(e > 1, 1 + e.clamp(min=1).log(), e).sum()


@dataclass(frozen=True)
class BlockFit:
    """Reconstruction of a block: its windows, its loss, and its rounds of steps.

    Attributes:
        run, number: the run, and the number of the block.
        states, dense: the windows before the block in the pruned model, and after the block in the dense model.
        learned, held_out: numbers of the micro-batches that steps fit, and of the micro-batches that judge rounds.
        reached: numbers of the micro-batches of `steps` whose loss has had gradients so far.
        varies: the first operation in the block without a deterministic algorithm; empty if there is none.
    """

    run: Run
    number: int
    states: HiddenStates
    dense: HiddenStates
    learned: list[int]
    held_out: list[int]
    reached: set[int] = field(default_factory=set)
    varies: list[str] = field(default_factory=list)

    @cached_property
    def steps(self) -> tuple[HiddenStates, HiddenStates]:
        """Return `states` and `dense` of the learned micro-batches, cut into the pieces that steps take."""
        return self.states.some(self.learned), self.dense.some(self.learned)

    @torch.no_grad()
    def loss(self) -> float:
        """Compute the mean loss of a token over the held-out micro-batches of all ranks."""
        losses = with_same_bits(lambda: [self.loss_of(j) for j in self.held_out], self.varies)
        gathered = self.run.ranks.gather((sum(x.item() for x, *_ in losses), sum(tokens for _, tokens, _ in losses)))
        return sum(loss for loss, _ in gathered) / sum(tokens for _, tokens in gathered)

    def round(self, weights: KeptWeights, rate: float, steps: int, before: float) -> float:
        """Make all steps of a round, and return the held-out loss after them.

        If this loss is not below `before`, the weights are put back.

        Args:
            weights: the weights that are fitted.
            rate: rate of the first step.
            steps: number of steps in the round.
            before: the lowest held-out loss so far.

        Raises:
            InputError: no micro-batch of any rank has gradients. All ranks raise this error together.
        """
        for step in range(steps):
            # Steps take the micro-batches in order, as the windows were drawn at random.
            add_gradients = partial(self.add_gradients, step % len(self.steps[0]), weights.parameters)
            with_same_bits(add_gradients, self.varies, weights.parameters)
            for handle in [self.run.ranks.all_reduce(gradient) for gradient in weights.gradients()]:
                handle.wait()
            weights.step(rate * (1 + math.cos(math.pi * step / steps)) / 2)
        if not any(self.run.ranks.gather(bool(self.reached))):
            name = self.run.model.names[self.number]
            raise InputError(f"{name}: unsupported model: its output has no gradients; use {option('reconstruct', 0)}")
        after = self.loss()
        if not after < before:
            weights.put_back()
        return after

    def loss_of(self, j: int, learned: bool = False) -> tuple[Tensor, int, int]:
        """Compute the loss of a micro-batch, summed over its tokens.

        Args:
            j: number of the micro-batch.
            learned: whether j is a number of a micro-batch of `steps`, and not of `states`.

        Returns:
            The loss, the number of tokens without padding, and the width of hidden states.
        """
        states, dense = self.steps if learned else (self.states, self.dense)
        # `dense.hidden[j]` is read once, as each access copies it from the host and begins to copy the next one.
        out, target = states.next_input(self.number, j), dense.hidden[j]
        unpadded = states.unpadded(self.number, j)
        # Padding becomes 0, and targets of 0 do not count.
        kept = without_padding(target, unpadded)
        number = target.shape[:-1].numel() if kept is target or unpadded is None else int(unpadded.sum())
        return relative_loss(out, kept), number, target.shape[-1]

    def add_gradients(self, j: int, parameters: list[nn.Parameter]) -> None:
        """Add the gradients of the loss of micro-batch j of `steps`.

        A micro-batch that does not use a pruned weight adds nothing.
        """
        model = self.run.model
        name = model.names[self.number]
        slices = SliceGradients(parameters)
        with torch.enable_grad(), rounded_products() if self.run.rounded else nullcontext():
            with slices:
                loss, tokens, width = self.loss_of(j, True)
                # In half precision, the gradients of a mean over all entries would underflow. In fp16, the gradients of
                # a sum over tokens would overflow. Adam's steps do not depend on the scale of the loss.
                loss = loss * (width / (tokens if parameters[0].dtype == torch.float16 else 1))
            if not loss.requires_grad:
                # A router may send all tokens to experts that are not pruned.
                return
            self.reached.add(j)
            try:
                with model.explained(name):
                    # `inputs` excludes other parameters of a caller's model that may require gradients as well.
                    loss.backward(inputs=slices.leaves)
            except ForwardFailed as error:
                what = shown(first_line(error.__cause__ or error))
                raise InputError(
                    f"{name}: unsupported model: no gradients go through it: {what}; use {option('reconstruct', 0)}"
                ) from error
