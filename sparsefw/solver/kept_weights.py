"""Optimize the kept weights of several matrices together, by gradient descent with Adam.

Adam (Kingma and Ba, arXiv 1412.6980) moves every kept weight w with gradient g. In step t, counted from 0:

    m <- 0.9 m + 0.1 g;   v <- 0.999 v + 0.001 g^2;   w <- w - rate(t) rms(w) / sqrt(d) m' / sqrt(v')

m' and v' are m and v with Adam's bias correction, as both start at 0. rms(w) is the root mean square, before the first
step, of the kept weights of the parameter that holds w; d is the width of the layer's input. If all n kept weights of a
row move together, the row's output changes by the share rate(t) sqrt(n / d). So one rate suits weights of any scale and
models of any width. Removed weights do not move, and stay exactly 0.

A step may take the gradients g_1 .. g_n of several windows, one after another, without a sum of them in memory: in m
the sum of the gradients takes the place of g, and in v the sum of their squares that of g^2. If gradients differ much
between windows, this is Adam on the mean gradient.

Weights in half precision move in fp32. After every step they are rounded to the parameter's dtype.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsefw.kernels.backend import TORCH, Backend
from sparsefw.kernels.definitions import DECAYS


class KeptWeights:
    """Optimizer of kept weights.

    Args:
        matrices: (parameter, views) of each parameter. A view is a pruned matrix in the parameter, and its zeros are
            the removed weights. Other entries of the parameter never move.
        backend: the operations.
        undo: whether to keep a copy of the weights for `put_back`.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[nn.Parameter, list[Tensor]]],
        backend: Backend = TORCH,
        undo: bool = True,
    ) -> None:
        self._variables = [_Variable(parameter, views, undo) for parameter, views in matrices]
        self._backend = backend
        self._done = 0
        for parameter in self.parameters:
            parameter.requires_grad_()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters. They require gradients until `close`."""
        return [variable.parameter for variable in self._variables]

    def gradients(self) -> list[Tensor]:
        """Return the gradients that were accumulated since the last step; zeros for a parameter without a gradient.

        Ranks sum the gradients by NCCL, which takes only contiguous tensors. So the dimensions of each gradient are
        permuted to the order in which they lie in memory.
        """
        return [x.gradient() for x in self._variables]

    def step(self, rate: float, more: bool = False) -> None:
        """Move the weights against the gradients, and drop the gradients.

        Args:
            rate: the rate of this step.
            more: whether more windows of the same step follow. Then the gradients only join m and v.
        """
        self._done += not more
        for x in self._variables:
            if more:
                x.add()
            else:
                x.step(rate, self._done, self._backend)

    def forget(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the weights from before the first step."""
        for x in self._variables:
            assert x.before is not None
            x.put(x.before)

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer's state: of the first parameter "0.weight", "0.m" and "0.v".

        The first of these are the kept weights, in fp32.
        """
        variables = enumerate(self._variables)
        return {f"{j}.{name}": getattr(x, name) for j, x in variables for name in ("weight", "m", "v")}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor], done: int) -> None:
        """Go on from a state after `done` steps."""
        self._done = done
        for name, own in self.state().items():
            own.copy_(state[name])
        for x in self._variables:
            x.put(x.weight)

    def close(self) -> None:
        """Drop the state. The parameters require no gradients any more."""
        self.forget()
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        self._variables = []


class _Variable:
    """Kept weights of one parameter, with Adam's state. Parameters move one by one: few gradients are copied then."""

    def __init__(self, parameter: nn.Parameter, views: list[Tensor], undo: bool) -> None:
        self.parameter = parameter
        self._flat = _in_memory(parameter.detach(), parameter).view(-1)
        kept = _in_memory(kept_entries(parameter, views), parameter).reshape(-1).nonzero().flatten()
        self._index = kept.to(index_dtype(parameter.numel()))
        before = self._flat.index_select(0, self._index)
        self.before = before if undo else None
        self.weight = before.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self._scale = self.weight.square().mean().sqrt().item() / math.sqrt(views[0].shape[1]) if len(kept) else 0.0

    @torch.no_grad()
    def step(self, rate: float, step: int, backend: Backend) -> None:
        """Move the kept weights against their gradient, and drop the gradient. A missing gradient counts as zeros."""
        state, gradient = (self.weight, self.m, self.v), self.gradient().reshape(-1)
        backend.adam_step(self._flat, gradient, self._index, *state, rate=rate * self._scale, step=step)
        self.forget()

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradient to m and v before the step of `step`, which decays them, and drop the gradient."""
        if self.parameter.grad is not None:
            kept = self.gradient().reshape(-1).index_select(0, self._index).to(self.m.dtype)
            of_m, of_v = ((1 - decay) / decay for decay in DECAYS)
            self.m.add_(kept, alpha=of_m)
            self.v.addcmul_(kept, kept, value=of_v)
        self.forget()

    def gradient(self) -> Tensor:
        """Return the gradient of all entries, with its dimensions in the order in which they lie in memory."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return _in_memory(self.parameter.grad, self.parameter)

    def forget(self) -> None:
        """Drop the gradient."""
        self.parameter.grad = None

    def put(self, kept: Tensor) -> None:
        """Set the kept weights of the parameter."""
        self._flat.index_copy_(0, self._index.long(), kept.to(self._flat.dtype))


def bytes_of_state(weights: int, kept: int, itemsize: int, undo: bool) -> int:
    """Count the bytes of the optimizer's state of a parameter, without the parameter and its gradient.

    The state of a kept weight is its index, its value before the first step (with `undo`), its value in fp32, m and v.

    Args:
        weights: number of weights, kept or removed.
        kept: number of kept weights.
        itemsize: bytes of a weight.
        undo: whether the values before the first step are stored, as in `KeptWeights`.
    """
    return kept * (index_dtype(weights).itemsize + undo * itemsize + 3 * max(4, itemsize))


def index_dtype(entries: int) -> torch.dtype:
    """Choose the dtype of indices into this number of entries."""
    return torch.int32 if entries < 2**31 else torch.int64


def _in_memory(tensor: Tensor, like: Tensor) -> Tensor:
    """Permute the dimensions of a tensor by the decreasing strides of `like`, which is the order in its memory."""
    return tensor.permute(sorted(range(like.ndim), key=like.stride, reverse=True))


def kept_entries(parameter: Tensor, views: Iterable[Tensor]) -> Tensor:
    """Find the kept weights of a parameter, as a bool tensor of its shape.

    Args:
        parameter: the parameter; its memory has no gaps.
        views: the pruned matrices in the parameter. Their zeros are the removed weights.
    """
    kept = torch.zeros_like(parameter, dtype=torch.bool)
    for view in views:
        offset = view.storage_offset() - parameter.storage_offset()
        kept.as_strided(view.shape, view.stride(), offset).copy_(view != 0)
    return kept
