"""Parts of a block: they begin at tensors that are given, cost nothing before, and give what the whole block gives."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsefw.errors import InputError
from sparsefw.model import partial_forward
from sparsefw.model.partial_forward import INPUT, call_without_data, next_point, run_part
from sparsefw.model.tape import Calls

TOKENS, D = 5, 8
CANNOT_RESUME = "unsupported model: a block cannot resume from its residual stream as it did before"
DIFFERS = "unsupported model: a block runs differently from one micro-batch to the next"


class Block(nn.Module):
    """x + a(tanh x), then that + c(relu(b(sin of it)))."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.requires_grad_(False)

    def forward(self, x):
        h = x + self.a(x.tanh())
        return h + self.c(self.b(h.sin()).relu())


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

    def named(self, function, number=0):
        """The point of the number-th call of a function."""
        return [point for point in self.outputs if point.function == function][number]


class RealProducts(TorchDispatchMode):
    """Counts products of tensors with data."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out.is_meta:
            self.products += func.overloadpacket._qualified_op_name in ("aten::addmm", "aten::mm", "aten::bmm")
        return out


def hidden(seed=1):
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(seed))


def recorded(block, x):
    """The recorded calls of a whole run, and its output."""
    calls, x = Recorded(), x.clone()
    with torch.no_grad(), Calls(calls.call):
        output = block(x)
    return calls, output


class TestParts:
    def test_every_tensor_of_the_whole(self):
        block, x = Block(), hidden()
        calls, output = recorded(block, x)
        taken, whole = run_part(block, {INPUT: x}, calls.outputs)
        assert torch.equal(whole, output)
        assert taken.keys() == calls.outputs.keys()
        for point, tensor in calls.outputs.items():
            assert torch.equal(taken[point], tensor)

    @pytest.mark.parametrize(
        ("given", "end", "products"),
        [
            # Only the layers after the sum run, and the block's input is not needed.
            (["add"], None, 2),
            # The tensors before are given: the stream, which is the block's input or the sum, and a layer's input.
            (["input", "tanh"], None, 3),
            (["add", "relu"], None, 1),
            (["input"], "relu", 2),
            (["add"], "relu", 1),
        ],
    )
    def test_only_a_part_runs(self, given, end, products):
        block, x = Block(), hidden()
        calls, output = recorded(block, x)
        points = {name: calls.named(name) for name in ("tanh", "add", "relu")} | {"input": INPUT}
        tensors, wanted = calls.outputs | {INPUT: x}, points["relu"]
        with RealProducts() as real:
            start = {points[name]: tensors[points[name]] for name in given}
            taken, whole = run_part(block, start, [wanted], end and points[end])
        assert real.products == products
        assert torch.equal(taken[wanted], tensors[wanted])
        assert whole is None if end else torch.equal(whole, output)

    def test_what_does_not_depend_on_the_input_is_made_for_real(self):
        """Positions that are made before the sum may be read after it, and states are written step by step."""

        def recurrent(block, x):
            positions = torch.arange(len(x), device=x.device).to(x.device, x.dtype)
            states = torch.zeros(x.shape, device=x.device)
            for n in range(TOKENS):
                states[n] = x[n].tanh()
            return Block.forward(block, states) * positions[:, None].expand(x.shape)

        block = Other(recurrent)
        _, output, start = behind_sum(block)
        _, whole = run_part(block, start)
        assert torch.equal(whole, output)


def fails(match, block, given, take=(), end=None):
    """Assert that a part ends in an InputError of one line."""
    with pytest.raises(InputError, match=match) as caught:
        run_part(block, given, take, end)
    assert "\n" not in str(caught.value)


class Other(Block):
    """A block with another forward."""

    def __init__(self, forward):
        super().__init__()
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


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


class TestErrors:
    @pytest.mark.parametrize(
        "second",
        [
            # The same function where the part begins, after another one.
            lambda block, x: (x + block.a(x.sigmoid())) + block.c(block.b(x).relu()),
            # Another shape.
            lambda block, x: x[None] + block.a(x.tanh()),
        ],
        ids=["path", "shape"],
    )
    def test_another_path_to_the_beginning(self, second):
        *_, start = behind_sum(Block())
        fails(DIFFERS, Other(second), start)

    @pytest.mark.parametrize(
        "second",
        [
            lambda block, x: x + block.a(x.tanh()),
            lambda block, x: (x + block.a(x.sinh())) + block.c(block.b(x.sin()).relu()),
        ],
        ids=["fewer", "path"],
    )
    def test_wanted_points_that_are_not_reached(self, second):
        wanted = recorded(Block(), hidden())[0].named("relu")
        for end in (wanted, None):
            fails(DIFFERS, Other(second), {INPUT: hidden()}, [wanted], end)

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
        ids=["input", "output", "branch", "unused"],
    )
    def test_tensors_that_were_skipped(self, forward):
        block = Other(forward)
        *_, start = behind_sum(block)
        fails(CANNOT_RESUME, block, start)

    def test_what_it_returns_beside_the_hidden_states_may_have_been_skipped(self):
        block = Other(reading(lambda x, y, h: (h, y)))
        _, (output, _), start = behind_sum(block)
        _, (whole, _) = run_part(block, start)
        assert torch.equal(whole, output)

    def test_a_given_tensor_is_written_to(self):
        """Through a view of it."""
        fails(DIFFERS, Other(lambda block, x: x + block.a(x.view(-1).tanh_().view(TOKENS, D))), {INPUT: hidden()})

    def test_a_wanted_tensor_is_written_to_later(self):
        """Whoever wants it would read something else."""
        block, x = Other(in_place), hidden()
        calls, output, start = behind_sum(block)
        fails(DIFFERS, block, {INPUT: x}, [*start])
        fails(DIFFERS, block, start)
        # The sum that was written to is a point of its own.
        (last,) = [point for point in calls.outputs if point.call == max(p.call for p in calls.outputs)]
        taken, _ = run_part(block, {INPUT: x}, [last])
        assert torch.equal(taken[last], output)


def forms(value, meta=None):
    """Sizes, steps and dtypes of nested tensors, and whether they have no data."""
    if isinstance(value, Tensor):
        return value.is_meta if meta is None else meta, value.shape, value.stride(), value.dtype
    return [forms(item, meta) for item in value]


X, SQUARE, HEADS = torch.randn(2, 3, 8), torch.zeros(2, 3)[:, :2], torch.randn(1, 2, 6, 4)
# Some differ in a number's type, in strides, a dtype or an argument alone.
CALLS = [
    (Tensor.__getitem__, X, (slice(None), torch.tensor([2, 0]))),
    (torch.cat, [X, X], -1),
    (Tensor.max, X, 1),
    (Tensor.to, X, torch.device("cpu"), torch.float16),
    (nn.functional.scaled_dot_product_attention, HEADS, HEADS, HEADS),
    (Tensor.mul, torch.tensor([2]), 1),
    (Tensor.mul, torch.tensor([2]), 1.0),
    (torch.relu, SQUARE),
    (torch.relu, SQUARE.T),
    (torch.relu, X.double()),
    (Tensor.__getitem__, X, slice(0, 2)),
    (Tensor.__getitem__, X, slice(0, 1)),
]


def test_calls_without_data_give_the_forms_that_torch_gives_also_when_they_are_made_again(monkeypatch):
    results = {}
    monkeypatch.setattr(partial_forward, "_results", results)
    found = [[call_without_data(func, args, {}) for func, *args in CALLS] for _ in range(2)]
    for (func, *args), *both in zip(CALLS, *found, strict=True):
        assert forms(both[0]) == forms(both[1]) == forms(func(*args), meta=True)
        assert both[0] is not both[1]
    assert len(results) == len(CALLS)
    # One that writes to a tensor is made again.
    x, y = torch.zeros(3), torch.ones(3)
    for _ in range(2):
        call_without_data(lambda x, y: x.add_(y) + y, (x, y), {})
    assert (len(results), x.tolist()) == (len(CALLS), [0, 0, 0])
