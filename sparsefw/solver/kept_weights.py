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
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsefw.kernels.cost import Cost

# Decay of m and v.
DECAYS = (0.9, 0.999)

# Is added to sqrt(v'). The squares of smaller gradients are nothing in fp32: v would be 0, and m / sqrt(v) endless.
LEAST = 1e-16


class KeptWeights:
    """The kept weights of matrices.

    Args:
        matrices: (parameter, views): each parameter with the matrices in it, whose zeros are what was removed. All else
            in it stays as it is.
        steps: number of steps that will be made.
        rate: the first rate, see above.
    """

    def __init__(self, matrices: Iterable[tuple[nn.Parameter, list[Tensor]]], steps: int, rate: float) -> None:
        self._variables = [_Variable(parameter, views) for parameter, views in matrices]
        self._steps, self._rate, self._done = steps, rate, 0
        for parameter in self.parameters:
            parameter.requires_grad_()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters. They ask for gradients until `close`."""
        return [variable.parameter for variable in self._variables]

    def gradients(self) -> list[Tensor]:
        """The gradients that were accumulated since the last step, zeros where there are none."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def step(self) -> None:
        """Move the weights against the gradients, which are gone then."""
        rate = rate_at(self._done, self._steps, self._rate)
        for variable in self._variables:
            variable.step(rate)
        self._done += 1

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

    def __init__(self, parameter: nn.Parameter, views: list[Tensor]) -> None:
        self.parameter = parameter
        self._kept, self._before = kept_entries(parameter, views), parameter.detach().clone()
        # In half precision a copy; otherwise the memory of the parameter itself.
        self._weight = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).requires_grad_()
        self._scale = 0.0
        if self._kept.any():
            rms = self._weight.detach()[self._kept].square().mean().sqrt().item()
            self._scale = rms / math.sqrt(views[0].shape[1])
        self._optimizer = torch.optim.Adam([self._weight], lr=0.0, betas=DECAYS, eps=LEAST, fused=True)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move the kept entries against their gradients."""
        assert self.parameter.grad is not None
        self._weight.grad = self.parameter.grad.to(self._weight.dtype).mul_(self._kept)
        self.parameter.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._scale
        self._optimizer.step()
        self._weight.grad = None
        if self.parameter.data_ptr() != self._weight.data_ptr():
            self.parameter.copy_(self._weight)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the parameter what it was."""
        self.parameter.copy_(self._before)

    def close(self) -> None:
        """Let the state go. Optimizers hold themselves, and would keep theirs until Python looks for such circles."""
        self.parameter.requires_grad_(False)
        self.parameter.grad = None
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()


def adam_step(weights: int) -> Cost:
    """The cost of a step of so many weights, kept or not: gradient, m, v, weight in fp32 in, but for the first out."""
    return Cost(12 * weights, 28 * weights)


def bytes_of_state(weights: int, itemsize: int) -> int:
    """Bytes of the state of so many weights, kept or not, beside the weights themselves.

    m, v, whether a weight is kept, what it was, and its gradient; in half precision also the weight in fp32.

    Args:
        weights: number of weights.
        itemsize: bytes of a weight.
    """
    moved = max(4, itemsize)
    return weights * (2 * moved + 1 + 2 * itemsize + (moved if itemsize < moved else 0))


def rate_at(step: int, steps: int, rate: float) -> float:
    """The rate of a step, counted from 0: half a period of a cosine, from `rate` to 0."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


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
