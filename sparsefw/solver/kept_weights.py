"""Kept weights of several matrices as the variables of one optimization by gradients.

Adam (Kingma and Ba, arXiv 1412.6980) moves every kept weight w with gradient g in step t, counted from 0:

    m <- 0.9 m + 0.1 g;   v <- 0.999 v + 0.001 g^2;   w <- w - rate(t) rms(w) / sqrt(d) m' / sqrt(v')

m' and v' are m and v without the bias of their start. rms(w) is the root mean square of the kept weights of w's
parameter before the first step, d its number of columns, and rate(t) = rate (1 + cos(pi t / steps)) / 2. If all weights
of a row move together, its output changes by the share rate(t). So the rate depends neither on the scale of a model's
weights nor on its width. Removed weights have no gradient: they stay exact zeros.

Weights in half precision are moved in fp32, and rounded after every step to the dtype that they are written in.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from sparsefw.kernels.backend import TORCH, Backend


class KeptWeights:
    """The kept weights of matrices.

    Args:
        matrices: (parameter, views): each parameter with the matrices in it, whose zeros are what was removed. All else
            in it stays as it is.
        steps: number of steps that will be made.
        rate: the first rate, see above.
        backend: the operations.
        undo: whether `put_back` shall be possible, which takes a copy of the weights.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[nn.Parameter, list[Tensor]]],
        steps: int,
        rate: float,
        backend: Backend = TORCH,
        undo: bool = True,
    ) -> None:
        self._variables = [_Variable(parameter, views, undo) for parameter, views in matrices]
        self._steps, self._rate, self._backend, self._done = steps, rate, backend, 0
        for parameter in self.parameters:
            parameter.requires_grad_()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters. They ask for gradients until `close`."""
        return [variable.parameter for variable in self._variables]

    def gradients(self) -> list[Tensor]:
        """The gradients that were accumulated since the last step, zeros where there are none; without gaps, in memory.

        Other ranks add to them: NCCL takes no tensor whose entries lie in another order than that of its dimensions.
        """
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [_in_memory(p.grad, p) for p in self.parameters if p.grad is not None]

    def step(self, backward: Callable[[], None] = lambda: None, trial: bool = False) -> None:
        """Move the weights against the gradients, which are gone then.

        Args:
            backward: makes gradients that are not there. Each parameter moves as soon as its gradient is complete, so
                that few are in memory. Those with gradients of parts, see `SliceGradients`, and those that share memory
                move at the end.
            trial: nothing moves, and this is no step: to see whether `backward` raises an error.
        """
        # Half a period of a cosine, from the first rate to 0.
        rate = self._rate * (1 + math.cos(math.pi * self._done / self._steps)) / 2
        self._done += not trial
        moves = {
            id(x.parameter): x.forget if trial else partial(x.step, rate, self._done, self._backend)
            for x in self._variables
        }
        # torch refuses gradients by what has been changed, and counts changes of all that shares its memory.
        awaited = [x for x in self.parameters if x.grad is None and x.untyped_storage().nbytes() == x.nbytes]
        hooks = [x.register_post_accumulate_grad_hook(lambda x: moves.pop(id(x))()) for x in awaited]
        try:
            backward()
        finally:
            for hook in hooks:
                hook.remove()
            if trial:
                self.forget()
        for move in moves.values():
            move()

    def forget(self) -> None:
        """Let all gradients go."""
        for variable in self._variables:
            variable.forget()

    def put_back(self) -> None:
        """Make all weights what they were before the first step."""
        for variable in self._variables:
            variable.put_back()

    def close(self) -> None:
        """Let the state go. The parameters ask for no gradients any more."""
        for variable in self._variables:
            variable.close()
        self._variables = []


class _Variable:
    """A parameter with the state of its optimization. Parameters move one by one: few gradients are copied at once."""

    def __init__(self, parameter: nn.Parameter, views: list[Tensor], undo: bool) -> None:
        self.parameter = parameter
        self._flat = _in_memory(parameter.detach(), parameter).view(-1)
        kept = _in_memory(kept_entries(parameter, views), parameter).reshape(-1).nonzero().flatten()
        self._index = kept.to(index_dtype(parameter.numel()))
        before = self._flat.index_select(0, self._index)
        self._before = before if undo else None
        self._weight = before.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        self._m, self._v = torch.zeros_like(self._weight), torch.zeros_like(self._weight)
        self._scale = self._weight.square().mean().sqrt().item() / math.sqrt(views[0].shape[1]) if len(kept) else 0.0

    @torch.no_grad()
    def step(self, rate: float, step: int, backend: Backend) -> None:
        """Move the kept entries against their gradients, zeros where there are none."""
        gradient, state = self.parameter.grad, (self._weight, self._m, self._v)
        gradient = _in_memory(torch.zeros_like(self.parameter) if gradient is None else gradient, self.parameter)
        rate *= self._scale
        backend.adam_step(self._flat, gradient.reshape(-1), self._index, *state, rate=rate, step=step)
        self.forget()

    def forget(self) -> None:
        """Let the gradient go."""
        self.parameter.grad = None

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the parameter what it was."""
        assert self._before is not None
        self._flat.index_copy_(0, self._index.long(), self._before)

    def close(self) -> None:
        """The parameter asks for no gradient any more."""
        self.parameter.requires_grad_(False)
        self.forget()


def bytes_of_state(weights: int, kept: int, itemsize: int, undo: bool = True) -> int:
    """Bytes of the state of a parameter, beside the parameter itself and its gradient.

    Each weight that is kept has its place, what it was, what it is in fp32, m and v.

    Args:
        weights: number of weights, kept or not.
        kept: number of those that are kept.
        itemsize: bytes of a weight.
        undo: as for `KeptWeights`.
    """
    return kept * (index_dtype(weights).itemsize + undo * itemsize + 3 * max(4, itemsize))


def index_dtype(entries: int) -> torch.dtype:
    """The dtype of the places of so many entries."""
    return torch.int32 if entries < 2**31 else torch.int64


def _in_memory(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor whose entries, read row by row, have the order in which those of `like` lie in memory."""
    return tensor.permute(sorted(range(like.ndim), key=like.stride, reverse=True))


def kept_entries(parameter: Tensor, views: Iterable[Tensor]) -> Tensor:
    """Which entries of a parameter are kept weights, a bool tensor of its shape.

    Args:
        parameter: the parameter, in memory without gaps.
        views: the pruned matrices in it. Their zeros were removed.
    """
    kept = torch.zeros_like(parameter, dtype=torch.bool)
    for view in views:
        offset = int(view.storage_offset()) - int(parameter.storage_offset())
        kept.as_strided(view.shape, view.stride(), offset).copy_(view != 0)
    return kept
