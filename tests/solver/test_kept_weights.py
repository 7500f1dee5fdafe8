"""Steps on kept weights are those of Adam, and nothing else in a parameter moves."""

import copy
import math

import pytest
import torch
from helpers.kernel_inputs import DEVICE, generator
from helpers.problems import TRITON
from torch import nn

from sparsefw.kernels.backend import TORCH
from sparsefw.kernels.definitions import DECAYS
from sparsefw.solver.kept_weights import KeptWeights, kept_entries

RATE = 0.2
BACKENDS = pytest.mark.parametrize("backend", [TORCH, TRITON], ids=["cpu", "triton"])
# Integers as wide as the values: 0.0 and -0.0 differ.
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def bits(x):
    return x.detach().clone().view(BITS[x.dtype])


def pruned(*shape, seed=0, scale=1.0, dtype=torch.float32):
    """Random weights, of which about half are removed; one of these is -0.0."""
    draws = generator(seed)
    W = scale * torch.randn(*shape, generator=draws, dtype=torch.float64)
    W[torch.rand(*shape, generator=draws) < 0.5] = 0
    W.view(-1)[1] = -0.0
    W.view(-1)[0] = scale
    # In float64 they have digits that fp32 has not.
    return W.to(DEVICE, dtype)


def drawn(count, *shape, seed=1):
    """Gradients of many magnitudes."""
    draws = generator(seed)
    sizes = 10.0 ** torch.randint(-8, 5, shape, generator=draws)
    return [(sizes * torch.randn(*shape, generator=draws)).to(DEVICE) for _ in range(count)]


def give(parameter, gradient):
    """Add a gradient to a parameter's."""
    (parameter * gradient.to(parameter.dtype)).sum().backward()


def adam(W, kept, d, gradients, rate=RATE):
    """The weights in float64 after a step with each of the gradients, by the formula; `kept` are those that move.

    In a step of several gradients, m takes their sum, and v the sum of their squares.
    """
    beta, gamma = DECAYS
    W = W.double().clone()
    rms = W[kept].square().mean().sqrt()
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    for t, gradient in enumerate(gradients):
        g = torch.where(kept, gradient.double(), 0.0).view(-1, *W.shape)
        m, v = beta * m + (1 - beta) * g.sum(0), gamma * v + (1 - gamma) * g.square().sum(0)
        step = (m / (1 - beta ** (t + 1))) / (v / (1 - gamma ** (t + 1))).sqrt()
        W -= torch.where(v > 0, rate * rms / math.sqrt(d) * step, 0.0)
    return W


def moved(matrices, gradients, rate=RATE, backend=TORCH):
    """Make a step with each of the gradients, lists with one for each parameter."""
    weights = KeptWeights(matrices, backend)
    for of_step in gradients:
        for (parameter, _), gradient in zip(matrices, of_step, strict=True):
            give(parameter, gradient)
        weights.gradients()
        weights.step(rate)
    weights.close()


@BACKENDS
def test_the_steps_are_those_of_adam(backend):
    """Every parameter has its own scale and width: those of the views that are given."""
    sources = [pruned(5, 7), pruned(1, 3, seed=2, scale=1e-3), pruned(4, 33, seed=3, scale=100.0), pruned(3, 5, 8)]
    sources[3][0] *= 1000
    parameters = [nn.Parameter(W.clone()) for W in sources]
    views, kept = [[p.detach()] for p in parameters], [W != 0 for W in sources]
    views[3], kept[3][0] = [parameters[3].detach()[1].T, parameters[3].detach()[2].T], False
    gradients = [drawn(12, *W.shape, seed=n) for n, W in enumerate(sources)]
    moved(list(zip(parameters, views, strict=True)), list(zip(*gradients, strict=True)), backend=backend)
    for parameter, W, view, mine, own in zip(parameters, sources, views, kept, gradients, strict=True):
        expected = adam(W, mine, view[0].shape[1], own)
        assert torch.equal(expected != W, mine)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6 * W.abs().max().item())


def test_gradients_add_up_and_a_step_without_one_goes_on():
    """They have no gaps, which NCCL refuses, wherever the parameter lies; those of other ranks are added in place."""
    W = pruned(4, 6)
    first, second, none = *drawn(2, 4, 6), torch.zeros_like(W)
    parameter = nn.Parameter(W.T.contiguous().T)
    weights = KeptWeights([(parameter, [parameter.detach()])])
    give(parameter, first)
    give(parameter, second)
    (total,) = weights.gradients()
    assert total.is_contiguous()
    assert total.data_ptr() == parameter.grad.data_ptr()
    torch.testing.assert_close(total.T, first + second)
    total.add_(first.T)
    weights.step(RATE)
    assert parameter.grad is None
    (empty,) = weights.gradients()
    assert not empty.any()
    weights.step(RATE)
    expected = adam(W, W != 0, 6, [2 * first + second, none])
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_several_windows_and_a_state_to_go_on_from(dtype):
    """One window has no gradient. The state of every parameter is read from another optimizer after a step."""
    sources = [pruned(5, 7, dtype=dtype), pruned(4, 6, seed=2, dtype=dtype)]
    gradients = [drawn(9, *W.shape, seed=n) for n, W in enumerate(sources)]
    gradients[1][4] = torch.zeros_like(gradients[1][4])
    results = []
    for interrupted in (False, True):
        parameters = [nn.Parameter(W.clone()) for W in sources]
        matrices = [(x, [x.detach()]) for x in parameters]
        weights = KeptWeights(matrices)
        for n, of_window in enumerate(zip(*gradients, strict=True)):
            for parameter, gradient in zip(parameters, of_window, strict=True):
                if gradient.any():
                    give(parameter, gradient)
            weights.step(RATE, more=n % 3 < 2)
            if interrupted and n == 2:
                state = copy.deepcopy(weights.state())
                weights.put_back()
                weights = KeptWeights(matrices)
                weights.restore(state, 1)
        results.append(parameters)
    for parameter, again, W, own in zip(*results, sources, gradients, strict=True):
        assert torch.equal(bits(parameter), bits(again))
        if dtype == torch.float32:
            expected = adam(W, W != 0, W.shape[1], torch.stack(own).view(3, 3, *W.shape))
            torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


def whole(storage):
    return nn.Parameter(storage), slice(None), lambda x: [x]


# By case: the parameter in a storage, the rows of it that are given, and their views.
PLACES = {
    "rows": whole,
    "transposed views": lambda storage: (nn.Parameter(storage), slice(None), lambda x: [x.T]),
    "transposed in memory": lambda storage: whole(storage.T.contiguous().T),
    # Experts that stay dense; experts may be stacked by rows, and a parameter may begin inside of a storage.
    "slices": lambda storage: (nn.Parameter(storage.view(3, 3, 7)), [1, 2], lambda x: [x[1], x[2].T]),
    "rows inside": lambda storage: (nn.Parameter(storage[1:]), [2, 3, 6, 7], lambda x: [x[2:4], x[6:]]),
}


@BACKENDS
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("place", PLACES)
def test_only_kept_entries_move(place, dtype, backend):
    storage = pruned(9, 7, dtype=dtype)
    first = storage[0].clone()
    parameter, given, views_of = PLACES[place](storage)
    before, views = parameter.detach().clone(), views_of(parameter.detach())
    kept = torch.zeros_like(before, dtype=torch.bool)
    kept[given] = before[given] != 0
    assert torch.equal(kept_entries(parameter, views), kept)
    moved([(parameter, views)], [[g] for g in drawn(3, *parameter.shape)], backend=backend)
    assert torch.equal(bits(parameter)[~kept], bits(before)[~kept])
    # In half precision steps may end where they have begun.
    assert (bits(parameter)[kept] != bits(before)[kept]).double().mean() > 0.7
    assert place != "rows inside" or torch.equal(bits(storage[0]), bits(first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_steps_below_the_last_digit_add_up(dtype):
    """Half precision alone would lose each of them."""
    W = torch.full((3, 16), 1.0, dtype=dtype)
    # A step is a sixteenth of the distance to the next smaller number.
    eps, steps = torch.finfo(dtype).eps, 400
    parameter, rate = nn.Parameter(W.clone()), eps / 16
    moved([(parameter, [parameter.detach()])], [[torch.ones_like(W)]] * steps, rate)
    expected = adam(W, W != 0, 16, [torch.ones_like(W)] * steps, rate)
    assert expected[0, 0].item() == pytest.approx(1 - steps * rate / 4, rel=1e-3)
    assert torch.equal(parameter.detach(), expected.to(dtype))
    assert parameter[0, 0] < 1 - 5 * eps


@pytest.mark.parametrize("dtype", BITS)
def test_put_back_is_exact_and_close_leaves_plain_parameters(dtype):
    before = [pruned(4, 6, dtype=dtype), pruned(2, 3, 5, seed=4, dtype=dtype)]
    parameters = [nn.Parameter(W.clone()) for W in before]
    weights = KeptWeights([(parameters[0], [parameters[0].detach()]), (parameters[1], [parameters[1].detach()[0]])])
    for gradient in (1.0, torch.nan):
        for parameter in parameters:
            give(parameter, torch.full_like(parameter, gradient))
        weights.step(RATE)
        assert all((bits(a) != bits(b)).any() for a, b in zip(parameters, before, strict=True))
        # Even what is no number.
        weights.put_back()
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(parameters, before, strict=True))
    give(parameters[0], torch.ones_like(parameters[0]))
    weights.close()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("size", [1e-10, 1e-18, 1e-22, 1e-30])
def test_tiny_gradients_make_no_large_step(size):
    """Their squares may be nothing in fp32. No weight moves further than by its rate."""
    W = pruned(4, 6)
    parameter, most = nn.Parameter(W.clone()), RATE * W[W != 0].square().mean().sqrt() / math.sqrt(6)
    moved([(parameter, [parameter.detach()])], [[torch.full_like(W, size)]])
    assert (parameter - W).abs().max() <= 1.001 * most
