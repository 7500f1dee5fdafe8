"""Fit the kept weights of a pruned block together, so that it puts out what the dense model's block does.

The loss of a token is e, the squared distance between the input of the next block in the pruned and in the dense model,
relative to the square of the latter: a few tokens have hidden states a thousand times larger than others. Where the
pruned model alone makes a token's so large, e is in the hundreds, and a sum would be about such tokens alone. So above
1 the loss is 1 + log(e). Behind the last block of a language model it is the divergence of what both models predict,
see `model.head`.

A step takes the gradients of one micro-batch on every rank, or of a piece of it. Some micro-batches are held out.
Weights that do no better on these are put back. As long as a round of passes lowers the loss there by much, another
one follows: a few blocks need far more steps than others, such as the one that gives the first token its large hidden
state.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparsefw.arithmetic import rounded_products
from sparsefw.driver.job import Run
from sparsefw.errors import InputError, first_line, option, shown
from sparsefw.memory import give_back
from sparsefw.model import HiddenStates
from sparsefw.model.activations import split_batches
from sparsefw.model.block_model import BlockModel
from sparsefw.model.gradients import SliceGradients, deterministic, refused
from sparsefw.model.head import divergence, predicts, tokens_and_steps, tokens_of_pass
from sparsefw.model.layers import layer_of
from sparsefw.model.recording import without_padding
from sparsefw.model.stand_ins import ForwardFailed, explained
from sparsefw.report.content import HIDDEN, PREDICTIONS, Reconstruction
from sparsefw.selection import without_index
from sparsefw.solver.kept_weights import KeptWeights
from sparsefw.solver.layer import LayerResult

T = TypeVar("T")

# The first rate, see `kept_weights`.
RATE = 0.16

# Its share where few steps fit predictions, behind a round that fits hidden states: higher ones undo what that gains.
BEHIND_HIDDEN = 0.25

# Another round follows one that has lowered the loss by this share, up to so many rounds.
WORTH, MOST_ROUNDS = 0.05, 4


def reconstruct(
    run: Run,
    i: int,
    states: HiddenStates,
    dense: HiddenStates,
    results: Sequence[LayerResult],
    ids: Tensor | None = None,
) -> Reconstruction | None:
    """Reconstruct block i, which is open and pruned.

    Args:
        run: what all blocks share; its config says how many passes over the windows a round makes.
        i: number of the block.
        states: the calibration windows before the block in the pruned model.
        dense: the same behind the block in the dense model.
        results: the block's pruned layers.
        ids: (windows, seqlen) the windows' tokens; None: they are no text.

    Returns:
        The losses and steps; None if there is nothing to fit, or nothing to compare with: the next block begins with
        something else, as a decoder behind an encoder does.

    Raises:
        InputError: gradients do not go through the block.
    """
    if not results or not states.goes_on(i):
        return None
    with _predicted(run, i, states, ids) as tokens:
        learned, held_out = split_batches(len(states))
        fit = Fit(run, i, states, dense, learned, held_out, tokens)
        # Ranks have about as many micro-batches; those with fewer begin again.
        of_rounds = [run.config.reconstruct * max(run.ranks.gather(len(fit.steps[0])))]
        if tokens:
            every, of_rounds = tokens_and_steps(run.of(i), run.shape, tokens[0].shape[1], of_rounds[0])
            fit = replace(fit, every=every, hidden_first=len(of_rounds) > 1)
        losses = _rounds(fit, results, of_rounds)
        # Experts of one rank's windows may have an operation that no other rank has seen.
        varies = dict.fromkeys(name for names in run.ranks.gather(fit.varies) for name in names)
    rounds = len(losses) - 1
    while len(losses) > 2 and not losses[-1] < min(losses[:-1]):
        # The last round was put back.
        losses.pop()
    return Reconstruction(
        before=losses[0],
        after=losses[-1],
        steps=sum(of_rounds) + (rounds - len(of_rounds)) * of_rounds[-1],
        put_back=not losses[-1] < losses[0],
        loss=PREDICTIONS if tokens else HIDDEN,
        varies=", ".join(varies),
    )


@contextmanager
def _predicted(run: Run, i: int, states: HiddenStates, ids: Tensor | None) -> Iterator[list[Tensor] | None]:
    """The tokens of each micro-batch, if predictions are compared behind block i; what makes them is in memory then.

    The model's shape says where there are predictions, as plans have it. The windows of all ranks have to agree: ranks
    make the same steps.
    """
    if ids is not None and run.of(i).predicts:
        with run.model.outside():
            every, _ = tokens_and_steps(run.of(i), run.shape, ids.shape[1], 1)
            if all(run.ranks.gather(predicts(states, ids, every))):
                # On the device: to copy some of them there, the host would wait for all that was launched.
                yield list(ids.to(run.model.device).split(states.windows))
                return
    yield None


def _rounds(fit: "Fit", results: Sequence[LayerResult], of_rounds: Sequence[int]) -> list[float]:
    """Make as many rounds as pay, see `tokens_and_steps`. The losses before the first one and behind all of them."""
    matrices, losses = pruned_matrices(fit.run.model, fit.number, results), [fit.loss()]
    while len(losses) <= len(of_rounds) or (len(losses) <= MOST_ROUNDS and losses[-1] < (1 - WORTH) * min(losses[:-1])):
        steps, by_hidden = of_rounds[min(len(losses), len(of_rounds)) - 1], len(losses) < len(of_rounds)
        rate = RATE * (BEHIND_HIDDEN if fit.hidden_first and not by_hidden else 1)
        weights = KeptWeights(matrices, steps, rate, fit.run.config.backend)
        try:
            losses.append(fit.round(weights, steps, min(losses), by_hidden))
        finally:
            weights.close()
        # The state of the next round would lie beside the holes that this one leaves.
        give_back()
    return losses


def pruned_matrices(
    model: BlockModel, i: int, results: Iterable[LayerResult]
) -> list[tuple[nn.Parameter, list[Tensor]]]:
    """The parameters of block i, which is open, that have pruned layers, and the matrices of these in them."""
    block, views = model.blocks[i], dict[str, list[Tensor]]()
    for result in results:
        name = result.name.removeprefix(f"{model.names[i]}.")
        weight = layer_of(block, name, "", result.shape, result.transposed).weight
        views.setdefault(without_index(name), []).append(weight)
    return [(block.get_parameter(name), listed) for name, listed in views.items()]


def relative_loss(out: Tensor, target: Tensor) -> Tensor:
    """Sum over all tokens of e = ||out - target||^2 / ||target||^2, or 1 + log(e) above 1, in fp32.

    A token without a target does not count.

    Args:
        out, target: (..., d) hidden states.
    """
    target = target.float()
    size = target.square().sum(-1)
    scale = torch.where(size > 0, 1 / size, 0.0)
    e = (out.float() - target).square().sum(-1) * scale
    return torch.where(e > 1, 1 + e.clamp(min=1).log(), e).sum()


@dataclass(frozen=True)
class Fit:
    """A block that is fitted.

    Attributes:
        run, number: see `reconstruct`.
        states, dense: the windows before the block in the pruned model, and behind it in the dense one.
        learned, held_out: numbers of the micro-batches to learn from, and of the others.
        tokens: the tokens of each micro-batch, where predictions are compared; None: hidden states are.
        every: a step compares the predictions of one token in so many.
        hidden_first: whether the first round compares hidden states. Then every loss is that of some tokens.
        reached: numbers of the steps in a pass whose loss had gradients so far.
        varies: the operation whose result may be another in another run, if this rank has seen one in the block.
    """

    run: Run
    number: int
    states: HiddenStates
    dense: HiddenStates
    learned: list[int]
    held_out: list[int]
    tokens: list[Tensor] | None = None
    every: int = 1
    hidden_first: bool = False
    reached: set[int] = field(default_factory=set)
    varies: list[str] = field(default_factory=list)

    @cached_property
    def steps(self) -> tuple[HiddenStates, HiddenStates, Sequence[Tensor]]:
        """`states`, `dense` and `tokens` of what is learned from, in pieces where there are any."""
        states, dense = (x.some(self.learned, divided=True) for x in (self.states, self.dense))
        tokens = torch.cat([self.tokens[j] for j in self.learned]).split(states.windows) if self.tokens else ()
        return states, dense, tokens

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of a token, over what is held out on all ranks. The algorithms are those of the steps."""
        some = 0 if self.hidden_first else None
        losses = self._with_same_bits(lambda: [self.loss_of(j, some) for j in self.held_out])
        gathered = self.run.ranks.gather((sum(x.item() for x, *_ in losses), sum(tokens for _, tokens, _ in losses)))
        return sum(loss for loss, _ in gathered) / sum(tokens for _, tokens in gathered)

    def round(self, weights: KeptWeights, steps: int, before: float, by_hidden: bool = False) -> float:
        """Make all steps of a round; returns the loss then. If it is not less than before, the weights are put back.

        With `by_hidden` the steps compare hidden states, whatever the loss compares.

        Raises:
            InputError: on all ranks; no micro-batch of any of them has gradients.
        """
        fitted = replace(self, tokens=None) if by_hidden else self
        for step in range(steps):
            # Windows were drawn at random: no other order is needed.
            of_pass, n = divmod(step, len(fitted.steps[0]))
            fitted.add_gradients(n, of_pass, weights.parameters)
            for handle in [self.run.ranks.all_reduce(gradient) for gradient in weights.gradients()]:
                handle.wait()
            weights.step()
        if not any(self.run.ranks.gather(bool(self.reached))):
            name = self.run.model.names[self.number]
            raise InputError(f"{name}: unsupported model: its output has no gradients; use {option('reconstruct', 0)}")
        after = self.loss()
        if not after < before:
            weights.put_back()
        return after

    def loss_of(self, j: int, of_pass: int | None = None, learned: bool = False) -> tuple[Tensor, int, int]:
        """The loss of micro-batch j, summed over its tokens; their number without padding; the width of hidden states.

        Args:
            j: number of the micro-batch; with `learned` among those of `steps`.
            of_pass: compare the predictions of the tokens of this pass alone, see `tokens_of_pass`.
        """
        states, dense, tokens = self.steps if learned else (self.states, self.dense, self.tokens)
        # Read once: from the host it is a copy, and the next micro-batch is read ahead.
        out, target = states.next_input(self.number, j), dense.hidden[j]
        if not tokens:
            unpadded = states.unpadded(self.number, j)
            # Zeros do not count.
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

        There are none where the micro-batch reaches no pruned weight.
        """
        self._with_same_bits(lambda: self._add_gradients(j, of_pass, parameters), parameters)

    def _with_same_bits(self, work: Callable[[], T], parameters: Sequence[nn.Parameter] = ()) -> T:
        """What `work` returns, with the same bits in every run, unless torch has no such algorithm for an operation.

        It is called again if torch refuses one. `parameters` lose the gradients that it has left them then.
        """
        if not self.varies:
            try:
                with deterministic():
                    return work()
            except (InputError, RuntimeError) as error:
                operation = refused(error)
                if not operation:
                    raise
                self.varies.append(operation)
                for parameter in parameters:
                    parameter.grad = None
        with deterministic(refuse=False):
            return work()

    def _add_gradients(self, j: int, of_pass: int, parameters: list[nn.Parameter]) -> None:
        model = self.run.model
        name, kind = model.names[self.number], type(model.model).__name__
        slices = SliceGradients(parameters)
        with torch.enable_grad(), rounded_products() if self.run.rounded else nullcontext():
            with slices:
                loss, tokens, width = self.loss_of(j, of_pass, True)
                # By entry: in half precision, gradients of the mean over all entries would be too small. Those of a sum
                # over tokens are too large for fp16. Adam makes the same steps of both.
                loss = loss * (width / (tokens if parameters[0].dtype == torch.float16 else 1))
            if not loss.requires_grad:
                # A mixture may send all tokens to experts that are not pruned.
                return
            self.reached.add(j)
            try:
                with explained(kind, name, model.input_kind):
                    # Those of a caller's model outside of the blocks may ask for gradients, too.
                    loss.backward(inputs=slices.leaves)
            except ForwardFailed as error:
                what = shown(first_line(error.__cause__ or error))
                raise InputError(
                    f"{name}: unsupported model: no gradients go through it: {what}; use {option('reconstruct', 0)}"
                ) from error
