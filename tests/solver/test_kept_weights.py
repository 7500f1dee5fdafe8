"""Steps on kept weights are those of Adam, and nothing else in a parameter moves."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from sparsefw.solver.kept_weights import (
    DECAYS,
    KeptWeights,
    adam_step,
    bytes_of_state,
    index_dtype,
    kept_entries,
    rate_at,
)

RATE = 0.2
# Integers as wide as the values: 0.0 and -0.0 differ.
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def bits(x):
    return x.detach().clone().view(BITS[x.dtype])


def pruned(*shape, seed=0, scale=1.0, dtype=torch.float32):
    """Random weights, of which about half are removed; one of these is -0.0."""
    generator = torch.Generator().manual_seed(seed)
    W = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    W[torch.rand(*shape, generator=generator) < 0.5] = 0
    W.view(-1)[1] = -0.0
    W.view(-1)[0] = scale
    # In float64 they have digits that fp32 has not.
    return W.to(dtype)


def drawn(count, *shape, seed=1):
    """Gradients of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-8, 5, shape, generator=generator)
    return [sizes * torch.randn(*shape, generator=generator) for _ in range(count)]


def give(parameter, gradient):
    """Add a gradient to a parameter's."""
    (parameter * gradient.to(parameter.dtype)).sum().backward()


def adam(W, kept, d, gradients, rate=RATE):
    """The weights in float64 after a step with each of the gradients, by the formula; `kept` are those that move."""
    beta, gamma = DECAYS
    W, steps = W.double().clone(), len(gradients)
    rms = W[kept].square().mean().sqrt()
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    for t, gradient in enumerate(gradients):
        g = torch.where(kept, gradient.double(), 0.0)
        m, v = beta * m + (1 - beta) * g, gamma * v + (1 - gamma) * g.square()
        step = (m / (1 - beta ** (t + 1))) / (v / (1 - gamma ** (t + 1))).sqrt()
        size = rate * (1 + math.cos(math.pi * t / steps)) / 2 * rms / math.sqrt(d)
        W -= torch.where(v > 0, size * step, 0.0)
    return W


def moved(matrices, gradients, rate=RATE):
    """Make a step with each of the gradients, lists with one for each parameter."""
    weights = KeptWeights(matrices, len(gradients), rate)
    for of_step in gradients:
        for (parameter, _), gradient in zip(matrices, of_step, strict=True):
            give(parameter, gradient)
        weights.gradients()
        weights.step()
    weights.close()


def test_the_steps_are_those_of_adam():
    """Every parameter has its own scale and width."""
    sources = [pruned(5, 7), pruned(1, 3, seed=2, scale=1e-3), pruned(4, 33, seed=3, scale=100.0)]
    parameters = [nn.Parameter(W.clone()) for W in sources]
    gradients = [drawn(12, *W.shape, seed=n) for n, W in enumerate(sources)]
    moved([(p, [p.detach()]) for p in parameters], list(zip(*gradients, strict=True)))
    for parameter, W, own in zip(parameters, sources, gradients, strict=True):
        expected = adam(W, W != 0, W.shape[1], own)
        assert (expected != W).sum() == (W != 0).sum()
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6 * W.abs().max().item())


def test_one_step_moves_every_kept_weight_by_the_rate():
    """All weights of a row that move together change its output by the share that the rate says."""
    W = torch.ones(3, 16)
    parameter = nn.Parameter(W.clone())
    moved([(parameter, [parameter.detach()])], [[torch.full_like(W, 1e-6)]])
    x = torch.ones(16) / 4
    assert torch.allclose(parameter @ x, (1 - RATE / 4) * (W @ x), rtol=1e-5)


def test_gradients_that_are_sent_have_no_gaps():
    """NCCL refuses others. A parameter may lie in memory column by column, and its gradient lies as it does."""
    W = pruned(4, 6)
    parameter = nn.Parameter(W.T.contiguous().T)
    weights = KeptWeights([(parameter, [parameter.detach()])], 1, RATE)
    (parameter * 2).sum().backward()
    assert not parameter.grad.is_contiguous()
    (sent,) = weights.gradients()
    assert sent.is_contiguous()
    assert sent.data_ptr() == parameter.grad.data_ptr()
    assert sent.numel() == parameter.grad.numel()


def test_gradients_add_up_and_a_step_without_one_goes_on():
    W = pruned(4, 6)
    first, second, none = *drawn(2, 4, 6), torch.zeros(4, 6)
    parameter = nn.Parameter(W.clone())
    weights = KeptWeights([(parameter, [parameter.detach()])], 2, RATE)
    give(parameter, first)
    give(parameter, second)
    (total,) = weights.gradients()
    torch.testing.assert_close(total, first + second)
    # The gradients of other ranks are added in place.
    total.add_(first)
    weights.step()
    assert parameter.grad is None
    (empty,) = weights.gradients()
    assert not empty.any()
    weights.step()
    expected = adam(W, W != 0, 6, [2 * first + second, none])
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-10, 1e-18, 1e-22, 1e-30])
def test_tiny_gradients_make_no_large_step(size):
    """Their squares may be nothing in fp32. No weight moves further than by its rate."""
    W = pruned(4, 6)
    parameter, most = nn.Parameter(W.clone()), RATE * W[W != 0].square().mean().sqrt() / math.sqrt(6)
    moved([(parameter, [parameter.detach()])], [[torch.full_like(W, size)]])
    assert (parameter - W).abs().max() <= 1.001 * most


class TestRate:
    def test_falls_from_the_first_to_nearly_nothing(self):
        rates = [rate_at(t, 50, 0.3) for t in range(50)]
        assert rates[0] == 0.3
        assert rates[25] == pytest.approx(0.15)
        assert all(a > b > 0 for a, b in pairwise(rates))
        assert rates[-1] < 0.001

    def test_one_step_has_the_whole_rate(self):
        assert rate_at(0, 1, 0.3) == 0.3


@pytest.mark.parametrize("dtype", BITS)
class TestWhatDoesNotMove:
    def check(self, parameter, before, views, kept):
        """Only kept entries move, and all of them do."""
        assert torch.equal(kept_entries(parameter, views), kept)
        moved([(parameter, views)], [[g] for g in drawn(3, *parameter.shape)])
        assert torch.equal(bits(parameter)[~kept], bits(before)[~kept])
        # In half precision steps may end where they have begun.
        assert (bits(parameter)[kept] != bits(before)[kept]).double().mean() > 0.7

    def test_removed_entries(self, dtype):
        before = pruned(5, 7, dtype=dtype)
        parameter = nn.Parameter(before.clone())
        self.check(parameter, before, [parameter.detach()], before != 0)

    def test_of_transposed_views(self, dtype):
        before = pruned(5, 7, dtype=dtype)
        parameter = nn.Parameter(before.clone())
        self.check(parameter, before, [parameter.detach().T], before != 0)

    def test_of_a_parameter_that_lies_transposed(self, dtype):
        before = pruned(5, 7, dtype=dtype)
        parameter = nn.Parameter(before.T.contiguous().T)
        assert not parameter.is_contiguous()
        self.check(parameter, before, [parameter.detach()], before != 0)

    def test_slices_that_are_not_given(self, dtype):
        """Experts that stay dense."""
        before = pruned(4, 5, 7, dtype=dtype)
        parameter, kept = nn.Parameter(before.clone()), before != 0
        kept[[0, 2]] = False
        self.check(parameter, before, [parameter.detach()[1], parameter.detach()[3].T], kept)

    def test_rows_that_are_not_given(self, dtype):
        """Experts may be stacked by rows, and a parameter may begin inside of a storage."""
        storage = pruned(9, 7, dtype=dtype)
        parameter = nn.Parameter(storage[1:])
        before = parameter.detach().clone()
        kept = before != 0
        kept[:2], kept[4:6] = False, False
        first = storage[0].clone()
        self.check(parameter, before, [parameter.detach()[2:4], parameter.detach()[6:]], kept)
        assert torch.equal(bits(storage[0]), bits(first))

    def test_where_all_is_removed(self, dtype):
        parameter = nn.Parameter(torch.zeros(3, 4, dtype=dtype))
        moved([(parameter, [parameter.detach()])], [[g] for g in drawn(3, 3, 4)])
        assert not bits(parameter).any()


def test_scale_and_width_are_those_of_the_views():
    """The columns of a transposed view count; weights of other slices count in no mean."""
    W = pruned(3, 5, 8)
    W[0] *= 1000
    parameter, kept = nn.Parameter(W.clone()), W != 0
    kept[0] = False
    gradients = drawn(4, 3, 5, 8)
    moved([(parameter, [parameter.detach()[1].T, parameter.detach()[2].T])], [[g] for g in gradients])
    torch.testing.assert_close(parameter.detach().double(), adam(W, kept, 5, gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_steps_below_the_last_digit_add_up(dtype):
    """Half precision alone would lose each of them."""
    W = torch.full((3, 16), 1.0, dtype=dtype)
    # A step is a sixteenth of the distance to the next smaller number.
    eps, steps = torch.finfo(dtype).eps, 400
    parameter, rate = nn.Parameter(W.clone()), eps / 8
    seen, weights = [], KeptWeights([(parameter, [parameter.detach()])], steps, rate)
    for _ in range(steps):
        give(parameter, torch.ones_like(W))
        weights.step()
        seen.append(parameter.detach().clone())
    weights.close()
    assert torch.equal(seen[0], W)
    expected = adam(W, W != 0, 16, [torch.ones_like(W)] * steps, rate)
    assert expected[0, 0].item() == pytest.approx(1 - steps * rate / 8, rel=1e-3)
    assert torch.equal(parameter.detach(), expected.to(dtype))
    assert parameter[0, 0] < 1 - 5 * eps


@pytest.mark.parametrize("dtype", BITS)
class TestAfterwards:
    def made(self, dtype):
        before = [pruned(4, 6, dtype=dtype), pruned(2, 3, 5, seed=4, dtype=dtype)]
        parameters = [nn.Parameter(W.clone()) for W in before]
        views = [[parameters[0].detach()], [parameters[1].detach()[0]]]
        weights = KeptWeights(list(zip(parameters, views, strict=True)), 3, RATE)
        for _ in range(2):
            for parameter in parameters:
                give(parameter, torch.ones_like(parameter))
            weights.step()
        return before, parameters, weights

    def test_put_back_is_exact(self, dtype):
        before, parameters, weights = self.made(dtype)
        assert all((bits(a) != bits(b)).any() for a, b in zip(parameters, before, strict=True))
        weights.put_back()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(parameters, before, strict=True))

    def test_put_back_even_what_is_no_number(self, dtype):
        before, parameters, weights = self.made(dtype)
        for parameter in parameters:
            give(parameter, torch.full_like(parameter, torch.nan))
        weights.step()
        assert parameters[0].isnan().any()
        weights.put_back()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(parameters, before, strict=True))

    def test_close_leaves_plain_parameters(self, dtype):
        _, parameters, weights = self.made(dtype)
        assert all(parameter.requires_grad for parameter in parameters)
        give(parameters[0], torch.ones_like(parameters[0]))
        after = [bits(parameter) for parameter in parameters]
        weights.close()
        for parameter, expected in zip(parameters, after, strict=True):
            assert parameter.grad is None
            assert not parameter.requires_grad
            assert torch.equal(bits(parameter), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_state_takes_what_is_expected(dtype):
    """Beside the weights: gradients, and of those that are kept their places, old values, values in fp32, m and v."""
    parameter = nn.Parameter(pruned(64, 96, dtype=dtype))
    kept = int(parameter.count_nonzero())
    weights = KeptWeights([(parameter, [parameter.detach()])], 2, RATE)
    give(parameter, torch.ones_like(parameter))
    (variable,) = weights._variables
    held = [variable._index, variable._before, variable._weight, *weights.gradients()]
    weights.step()
    (state,) = variable._optimizer.state.values()
    held += [state["exp_avg"], state["exp_avg_sq"]]
    assert sum(x.nbytes for x in held) == bytes_of_state(parameter.numel(), kept, parameter.element_size())
    assert index_dtype(2**31) is torch.int64
    assert adam_step(10, 4, 2).bytes == 2 * adam_step(5, 2, 2).bytes == 136
