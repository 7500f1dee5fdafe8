"""Parts of a block: they begin at tensors that are given, cost nothing before, and give what the whole block gives."""

import pytest
import torch
from helpers.checkpoints import refused
from helpers.damaged import Block, sequential

from sparsefw.model.partial_forward import INPUT, next_point, run_part
from sparsefw.model.tape import Calls

TOKENS, D = 5, 8
CANNOT_RESUME = "unsupported model: a block cannot resume from its residual stream as it did before"
DIFFERS = "unsupported model: a block runs differently from one micro-batch to the next"


class Recorded:
    """The point and a copy of the output of every call."""

    def __init__(self):
        self.last, self.outputs = INPUT, {}

    def call(self, func, args, kwargs):
        self.last = next_point(self.last, func)
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            self.outputs[self.last] = out.clone()
        return out

    def named(self, function):
        """The point of the first call of a function."""
        return next(point for point in self.outputs if point.function == function)


def hidden():
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(1))


def recorded(block, x):
    """The recorded calls of a whole run, and its output."""
    calls, x = Recorded(), x.clone()
    with torch.no_grad(), Calls(calls.call):
        output = block(x)
    return calls, output


@pytest.mark.parametrize("given", ["add", "input tanh", "add relu", "input"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_part_makes_the_bits_of_the_whole(given, ends):
    block, x = Block(sequential), hidden()
    calls, output = recorded(block, x)
    points = {name: calls.named(name) for name in ("tanh", "add", "relu")} | {"input": INPUT}
    tensors, wanted = calls.outputs | {INPUT: x}, points["relu"]
    start = {points[name]: tensors[points[name]] for name in given.split()}
    taken, whole = run_part(block, start, [wanted], wanted if ends else None)
    assert torch.equal(taken[wanted], tensors[wanted])
    assert whole is None if ends else torch.equal(whole, output)


def test_what_does_not_depend_on_the_input_is_made_for_real():
    """Positions that are made before the sum may be read after it, and states are written step by step."""

    def recurrent(block, x):
        positions = torch.arange(len(x), device=x.device).to(x.device, x.dtype)
        states = torch.zeros(x.shape, device=x.device)
        for n in range(TOKENS):
            states[n] = x[n].tanh()
        return sequential(block, states) * positions[:, None].expand(x.shape)

    block = Block(recurrent)
    _, output, start = behind_sum(block)
    _, whole = run_part(block, start)
    assert torch.equal(whole, output)


def fails(match, block, given, take=(), end=None):
    """Assert that a part ends in an InputError."""
    with refused(match):
        run_part(block, given, take, end)


def behind_sum(block):
    """The points and outputs of a whole run, and those that a part after the first sum begins with."""
    calls, output = recorded(block, hidden())
    return calls, output, {calls.named("add"): calls.outputs[calls.named("add")]}


def reading(after):
    """A forward that reads something after its sum: the input, the layer's output or the sum."""

    def forward(block, x):
        y = block.a(x.tanh())
        return after(x, y, x.add(y))

    return forward


def in_place(block, x):
    h = x + block.a(x.tanh())
    h += block.b(h.sin())
    return h


def test_another_path_is_refused():
    """To where the part begins, or to a point that is wanted."""
    *_, start = behind_sum(Block(sequential))
    # The same function where the part begins, after another one; and another shape.
    fails(DIFFERS, Block(lambda block, x: (x + block.a(x.sigmoid())) + block.c(block.b(x).relu())), start)
    fails(DIFFERS, Block(lambda block, x: x[None] + block.a(x.tanh())), start)
    wanted = recorded(Block(sequential), hidden())[0].named("relu")
    for second in (
        lambda block, x: x + block.a(x.tanh()),
        lambda block, x: (x + block.a(x.sinh())) + block.c(block.b(x.sin()).relu()),
    ):
        for end in (wanted, None):
            fails(DIFFERS, Block(second), {INPUT: hidden()}, [wanted], end)


@pytest.mark.parametrize(
    "forward",
    [
        reading(lambda x, y, h: torch.cat([h, x])),
        # The output itself was skipped.
        reading(lambda x, y, h: (y, h)),
        # Values are read of what was skipped.
        reading(lambda x, y, h: h if y.sum() > 0 else -h),
        # Nothing of it is in the output.
        reading(lambda x, y, h: [h, y.relu()][0]),
    ],
)
def test_who_reads_what_was_skipped_is_refused(forward):
    block = Block(forward)
    *_, start = behind_sum(block)
    fails(CANNOT_RESUME, block, start)


def test_what_it_returns_beside_the_hidden_states_may_have_been_skipped():
    block = Block(reading(lambda x, y, h: (h, y)))
    _, (output, _), start = behind_sum(block)
    _, (whole, _) = run_part(block, start)
    assert torch.equal(whole, output)


def test_a_given_tensor_is_written_to():
    """Through a view of it."""
    fails(DIFFERS, Block(lambda block, x: x + block.a(x.view(-1).tanh_().view(TOKENS, D))), {INPUT: hidden()})


def test_a_wanted_tensor_is_written_to_later():
    """Whoever wants it would read something else."""
    block = Block(in_place)
    *_, start = behind_sum(block)
    fails(DIFFERS, block, {INPUT: hidden()}, [*start])
    fails(DIFFERS, block, start)
