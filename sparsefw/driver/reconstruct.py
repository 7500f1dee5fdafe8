"""Reconstruct a pruned block: fit its kept weights together, so that its outputs approximate those of the dense block.

The loss of a token is e = ||out - target||^2 / ||target||^2, where `out` and `target` are the outputs of the pruned and
of the dense block. It is relative, because a few tokens have hidden states a thousand times larger than others. If only
the pruned model gives a token such a large hidden state, e is in the hundreds, and would dominate the sum over tokens.
So the loss is 1 + log(e) where e is above 1. After the last block of a language model the loss is the divergence
between the predictions of both models, see `model.head`.

A step takes the gradients of one micro-batch, or of a piece of one, on every rank. A round makes one or more passes
over the windows. The loss on held-out micro-batches judges a round: if the round does not lower this loss, its weights
are put back; if it lowers the loss by much, another round follows. A few blocks need far more steps than others, such
as the block that gives the first token its large hidden state.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from sparsefw.arithmetic import rounded_products
from sparsefw.driver.job import Run
from sparsefw.errors import InputError, first_line, option, shown
from sparsefw.estimate.steps import tokens_and_steps
from sparsefw.memory import trim_memory
from sparsefw.model.activations import split_batches
from sparsefw.model.block_model import BlockModel
from sparsefw.model.gradients import SliceGradients, with_same_bits
from sparsefw.model.head import divergence, logits_are_tokenwise, tokens_of_pass
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.layers import layer_of
from sparsefw.model.padding import without_padding
from sparsefw.model.stubs import ForwardFailed
from sparsefw.report.content import HIDDEN, PREDICTIONS, Reconstruction
from sparsefw.selection import without_index
from sparsefw.solver.kept_weights import KeptWeights
from sparsefw.solver.layer import LayerResult

# The rate of a round's first step, see `kept_weights`. It falls to 0 along half a period of a cosine.
RATE = 0.16

# Steps that fit predictions after a round that has fitted hidden states begin at this share of RATE. A higher rate
# would undo the gain of that round.
AFTER_HIDDEN = 0.25

# Another round follows a round that has lowered the loss by the share WORTH, up to MAX_ROUNDS rounds.
WORTH, MAX_ROUNDS = 0.05, 4


def reconstruct(
    run: Run,
    i: int,
    states: HiddenStates,
    dense: HiddenStates,
    results: Sequence[LayerResult],
    ids: Tensor | None,
) -> Reconstruction | None:
    """Reconstruct block i, which is open and pruned.

    Args:
        run: the run; its config has the number of passes over the windows in a round.
        i: number of the block.
        states: the calibration windows before the block in the pruned model.
        dense: the calibration windows after the block in the dense model.
        results: the results of the block's pruned layers.
        ids: (windows, seqlen) the tokens of the windows; None: the calibration uses batches in place of text.

    Returns:
        The losses and the number of steps. None if no layer is pruned, or if the next block does not read the output of
        this block: the first block of a decoder does not read the output of the encoder's last block.

    Raises:
        InputError: the block's output has no gradients, or computing them fails.
    """
    if not results or not states.is_chained(i):
        return None
    with _predicted(run, i, states, ids) as tokens:
        learned, held_out = split_batches(len(states))
        fit = BlockFit(run, i, states, dense, learned, held_out, tokens)
        # All ranks make the same number of steps. A rank with fewer micro-batches starts over at its first one.
        planned = [run.config.reconstruct * max(run.ranks.gather(len(fit.steps[0])))]
        if tokens:
            every, planned = tokens_and_steps(run.shape, tokens[0].shape[1], planned[0])
            fit = replace(fit, every=every, hidden_first=len(planned) > 1)
        losses = _rounds(fit, results, planned)
        # Ranks may differ: an expert that only one rank's windows reach may have an operation that no other rank uses.
        varies = dict.fromkeys(name for names in run.ranks.gather(fit.varies) for name in names)
    rounds = len(losses) - 1
    while len(losses) > 2 and not losses[-1] < min(losses[:-1]):
        # The last round was put back.
        losses.pop()
    return Reconstruction(
        before=losses[0],
        after=losses[-1],
        steps=sum(planned) + (rounds - len(planned)) * planned[-1],
        put_back=not losses[-1] < losses[0],
        loss=PREDICTIONS if tokens else HIDDEN,
        varies=", ".join(varies),
    )


@contextmanager
def _predicted(run: Run, i: int, states: HiddenStates, ids: Tensor | None) -> Iterator[list[Tensor] | None]:
    """Yield the tokens of each micro-batch if the loss of block i compares predictions, else None.

    Inside the `with` block the model's head is in memory. The loss compares predictions if the model's shape, on which
    plans rely, says so, and if all ranks can compute predictions, since ranks must make the same steps.
    """
    if ids is not None and run.of(i).predicts:
        with run.model.outside_loaded():
            every, _ = tokens_and_steps(run.shape, ids.shape[1], 1)
            if all(run.ranks.gather(logits_are_tokenwise(states, ids, every))):
                # Moved to the device here: a copy at every step would wait for all work that was launched before it.
                yield list(ids.to(run.model.device).split(states.windows))
                return
    yield None


def _rounds(fit: "BlockFit", results: Sequence[LayerResult], planned: Sequence[int]) -> list[float]:
    """Make rounds while they lower the loss by the share WORTH.

    Args:
        fit: the reconstruction.
        results: the results of the block's pruned layers.
        planned: steps of each planned round. All but the last of these fit hidden states. Further rounds are like
            the last one.

    Returns:
        The held-out losses before the first round and after each round.
    """
    matrices, losses = pruned_matrices(fit.run.model, fit.number, results), [fit.loss()]
    while len(losses) <= len(planned) or (len(losses) <= MAX_ROUNDS and losses[-1] < (1 - WORTH) * min(losses[:-1])):
        steps, by_hidden = planned[min(len(losses), len(planned)) - 1], len(losses) < len(planned)
        rate = RATE * (AFTER_HIDDEN if fit.hidden_first and not by_hidden else 1)
        weights = KeptWeights(matrices, fit.run.config.backend)
        try:
            losses.append(fit.round(weights, rate, steps, min(losses), by_hidden))
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
        tokens: the tokens of each micro-batch if the loss compares predictions; None: it compares hidden states.
        every: a step compares the predictions of one token out of `every`.
        hidden_first: whether the first round compares hidden states. Then the held-out loss counts the tokens of one
            pass only, see `tokens_of_pass`.
        reached: numbers of the micro-batches of `steps` whose loss has had gradients so far.
        varies: the first operation in the block without a deterministic algorithm; empty if there is none.
    """

    run: Run
    number: int
    states: HiddenStates
    dense: HiddenStates
    learned: list[int]
    held_out: list[int]
    tokens: list[Tensor] | None
    every: int = 1
    hidden_first: bool = False
    reached: set[int] = field(default_factory=set)
    varies: list[str] = field(default_factory=list)

    @cached_property
    def steps(self) -> tuple[HiddenStates, HiddenStates, Sequence[Tensor]]:
        """Return `states`, `dense` and `tokens` of the learned micro-batches, cut into the pieces that steps take."""
        states, dense = (x.some(self.learned) for x in (self.states, self.dense))
        tokens = torch.cat([self.tokens[j] for j in self.learned]).split(states.windows) if self.tokens else ()
        return states, dense, tokens

    @torch.no_grad()
    def loss(self) -> float:
        """Compute the mean loss of a token over the held-out micro-batches of all ranks."""
        some = 0 if self.hidden_first else None
        losses = with_same_bits(lambda: [self.loss_of(j, some) for j in self.held_out], self.varies)
        gathered = self.run.ranks.gather((sum(x.item() for x, *_ in losses), sum(tokens for _, tokens, _ in losses)))
        return sum(loss for loss, _ in gathered) / sum(tokens for _, tokens in gathered)

    def round(self, weights: KeptWeights, rate: float, steps: int, before: float, by_hidden: bool = False) -> float:
        """Make all steps of a round, and return the held-out loss after them.

        If this loss is not below `before`, the weights are put back.

        Args:
            weights: the weights that are fitted.
            rate: rate of the first step.
            steps: number of steps in the round.
            before: the lowest held-out loss so far.
            by_hidden: whether the steps compare hidden states although the held-out loss may compare predictions.

        Raises:
            InputError: no micro-batch of any rank has gradients. All ranks raise this error together.
        """
        fitted = replace(self, tokens=None) if by_hidden else self
        for step in range(steps):
            # Steps take the micro-batches in order, as the windows were drawn at random.
            of_pass, n = divmod(step, len(fitted.steps[0]))
            add_gradients = partial(fitted.add_gradients, n, of_pass, weights.parameters)
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

    def loss_of(self, j: int, of_pass: int | None, learned: bool = False) -> tuple[Tensor, int, int]:
        """Compute the loss of a micro-batch, summed over its tokens.

        Args:
            j: number of the micro-batch.
            of_pass: number of the pass; only its tokens are compared, see `tokens_of_pass`. None: all tokens are
                compared.
            learned: whether j is a number of a micro-batch of `steps`, and not of `states`.

        Returns:
            The loss, the number of tokens without padding, and the width of hidden states.
        """
        states, dense, tokens = self.steps if learned else (self.states, self.dense, self.tokens)
        # `dense.hidden[j]` is read once, as each access copies it from the host and begins to copy the next one.
        out, target = states.next_input(self.number, j), dense.hidden[j]
        if not tokens:
            unpadded = states.unpadded(self.number, j)
            # Padding becomes 0, and targets of 0 do not count.
            kept = without_padding(target, unpadded)
            number = target.shape[:-1].numel() if kept is target or unpadded is None else int(unpadded.sum())
            return relative_loss(out, kept), number, target.shape[-1]
        ids = tokens[j]
        if of_pass is not None:
            some = tokens_of_pass(of_pass, self.every)
            ids, out, target = ids[:, some], out[:, some], target[:, some]
        return divergence(self.run.model, ids, out, target), target.shape[:-1].numel(), target.shape[-1]

    def add_gradients(self, j: int, of_pass: int, parameters: list[nn.Parameter]) -> None:
        """Add the gradients of the loss of micro-batch j of `steps` in pass `of_pass` of a round.

        A micro-batch that does not use a pruned weight adds nothing.
        """
        model = self.run.model
        name = model.names[self.number]
        slices = SliceGradients(parameters)
        with torch.enable_grad(), rounded_products() if self.run.rounded else nullcontext():
            with slices:
                loss, tokens, width = self.loss_of(j, of_pass, True)
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
