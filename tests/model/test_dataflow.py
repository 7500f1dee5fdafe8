"""Cuts, inputs that can be kept, and ways of measuring, for blocks made by hand."""

import pytest
import torch
from helpers.damaged import (
    Block,
    check_moves_on,
    damaged_module,
    described,
    measured_stages,
    mlp,
    sequential,
    stages_of,
    whole_runs,
)
from helpers.kernel_inputs import DEVICE, generator
from torch import nn

from sparsefw.model.tape import Calls, Tape

TOKENS, D = 6, 8


def batches(count=2):
    return [torch.randn(TOKENS, D, generator=generator(n)) for n in range(count)]


def parallel(block, x):
    t = x.tanh()
    return x + block.c(block.a(t).sin()) + block.b(t)


def post_norm(block, x):
    h = block.norm(x + block.a(x.tanh()))
    return block.norm(h + mlp(block, h))


def norm_before_the_sum(block, x):
    h = x + block.norm(block.a(x.tanh()))
    return h + block.norm(mlp(block, h))


def in_place(block, x):
    h = block.a(x.tanh())
    h += x
    out = mlp(block, h)
    out += h
    return out


def in_place_after_the_branch(block, x):
    h = x + block.a(x.tanh())
    h += mlp(block, h)
    return h


def branch_after(block, x):
    h = x + block.a(x.tanh())
    y = h.sin() if h.sum() > -1e9 else h.cos()
    return h + block.c(block.b(y).relu())


def reads_the_input_again(block, x):
    h = x + block.a(x.tanh())
    return h + mlp(block, h) + x


def reads_an_earlier_tensor_again(block, x):
    t = x.tanh()
    h = x + block.a(t)
    return h + mlp(block, h) * t


def gated(block, x):
    """The gate is made of another layer's output, before the input that could be kept, and read after it."""
    h = x + block.a(x.tanh())
    gate = block.d(h.sin())
    return h + gate * block.c(block.b(h.cos()).relu())


def input_written_to(block, x):
    """The layer's input is written to after its product, through a view."""
    t = x.tanh()
    h = x + block.a(t)
    t[0].zero_()
    return h + mlp(block, h)


def used_twice(block, x):
    """Its Gram matrix is that of both inputs."""
    h = x + block.norm(block.a(x.tanh()))
    return h + block.norm(block.a(h.sin()))


def stream_of_a_layer(block, x):
    """The stream begins with a layer's output, which goes into a sum after the next layer."""
    h = block.a(x)
    return h + block.b(h.relu())


def read_after_the_sum(block, x):
    """The output depends on what the layer puts out in a product without a layer: it is not the layer's to repair."""
    h = x + block.a(x.tanh())
    return h + h @ torch.ones(D, D, device=x.device)


def counting(block, x):
    """It adds what it was called how often, so that it gives something else in parts."""
    block.calls = getattr(block, "calls", 0) + 1
    h = x + block.a(x.tanh())
    return h + block.b(h.sin()) * block.calls


SEQUENTIAL = ["a writes 0 tanh to 1", "b reads 1 sin", "c writes 1 relu kept"]
READING = ["a reads 0 tanh to 1", "b reads 1 sin", "c reads 1 relu kept"]
HANDED_ON = ["a outputs 0", "b reads 0 sin", "c outputs 0"]
WHOLE = ["a outputs 0", "b outputs 0", "c outputs 0"]
BLOCKS = {
    sequential: SEQUENTIAL,
    parallel: ["a b reads outputs 0", "c outputs 0"],
    post_norm: ["a writes 0 tanh to 1", "b reads 1 sin", "c outputs 1"],
    norm_before_the_sum: READING,
    in_place: SEQUENTIAL,
    in_place_after_the_branch: WHOLE,
    branch_after: ["a writes 0 tanh to 1", "b outputs 1", "c outputs 1"],
    reads_the_input_again: HANDED_ON,
    reads_an_earlier_tensor_again: ["a outputs 0", "b reads 0 sin", "c reads 0 relu"],
    gated: ["a writes 0 tanh to 1", "d reads 1 sin", "b reads 1 cos", "c reads 1 relu"],
    input_written_to: HANDED_ON,
    stream_of_a_layer: ["a reads 0 block to 1", "b writes 1 relu"],
    used_twice: ["a outputs 0"],
    read_after_the_sum: ["a outputs 0"],
}


@pytest.mark.parametrize("forward", BLOCKS, ids=lambda forward: forward.__name__)
def test_blocks(forward):
    pair = damaged_module(Block(forward), batches())
    runs = whole_runs(pair)
    assert described(pair) == BLOCKS[forward]
    assert len([*measured_stages(pair, passing=[1])]) == len(BLOCKS[forward])
    check_moves_on(pair, runs)


def test_a_block_that_gives_something_else_in_parts():
    assert described(damaged_module(Block(counting), batches())) == ["a outputs 0", "b outputs 0"]


def before_the_sum(block, x):
    h = x + block.a(x.tanh() if x[0, 1] > 0 else x.sin().cos())
    return h + mlp(block, h)


def after_the_sum(block, x):
    h = x + block.a(x.tanh())
    return h + block.c(block.b(h.tanh() if h[0, 1] > 0 else h.sin().cos()).relu())


@pytest.mark.parametrize(
    ("forward", "measured"), [(before_the_sum, "outputs outputs outputs"), (after_the_sum, "streams outputs outputs")]
)
def test_micro_batches_that_take_different_paths(forward, measured):
    pair = damaged_module(Block(forward), batches(8))
    runs, ways = whole_runs(pair), []
    for captured in measured_stages(pair, passing=[1]):
        ways += [captured.crosses[layer.name].of for layer in captured.layers]
    assert ways == measured.split()
    check_moves_on(pair, runs)


def test_a_write_to_a_view_changes_its_base_and_other_views():
    tape = Tape()
    with Calls(tape.record):
        y = torch.ones(2, 2) + 1
        row, column = y[0], y[:, 0]
        row.zero_()
        y.sum()
        column.sum()
    *_, write, total, other = tape.ops
    assert total.inputs[0].maker == other.inputs[0].maker == write.number


def test_a_tensor_that_is_handed_on():
    """Blocks that came later would receive a tensor without data if the part began after it."""

    def forward(block, x, state):
        state[:] = [x.tanh()]
        return sequential(block, x)

    pair = damaged_module(Block(forward), batches(), ([],))
    last, runs = pair.dense.hidden[1].clone(), whole_runs(pair)
    # The stream is no cut, and nothing can be kept: tanh is made before both.
    assert described(pair) == HANDED_ON
    assert len([*measured_stages(pair)]) == 3
    check_moves_on(pair, runs)
    (state,) = pair.dense.batches[1].objects
    assert torch.equal(state[0].read(), last.tanh())


def test_a_tensor_that_is_received():
    """It comes from an earlier block, and is there in any part."""

    def forward(block, x, state):
        return sequential(block, x) * state["shared"]

    pair = damaged_module(Block(forward), batches(), ({"shared": torch.ones(TOKENS, D).to(DEVICE)},))
    assert described(pair) == [*SEQUENTIAL[:2], "c outputs 1"]


def test_a_received_tensor_that_is_written_to():
    def forward(block, x, state):
        state["sum"] += x
        return sequential(block, x)

    pair = damaged_module(Block(forward), batches(), ({"sum": torch.zeros(TOKENS, D).to(DEVICE)},))
    assert described(pair) == HANDED_ON


def test_a_module_that_keeps_something_of_its_first_call():
    """Later calls take another path. The block is run as a whole, and the next one of its kind in parts."""

    def forward(block, x):
        if not hasattr(block, "cache"):
            block.cache = torch.arange(D, device=x.device) * 0.1
        return sequential(block, x + block.cache)

    pair = damaged_module(Block(forward), batches())
    assert described(pair) == WHOLE
    assert described(pair)[1:] == SEQUENTIAL[1:]


def test_no_point_comes_after_experts():
    def forward(block, x):
        h = x + block.a(x.tanh())
        y = torch.zeros_like(h)
        for n, expert in enumerate(block.experts):
            chosen = (h.argmax(-1) % 3 == n).nonzero()[:, 0]
            if len(chosen):
                y = y.index_add(0, chosen, expert(h[chosen]))
        h = h + y
        return h + block.c(h.sin())

    block = Block(forward)
    block.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
    pair = damaged_module(block, batches())
    first, experts, last = stages_of(pair)
    assert (first.key, first.next_start.function, first.input.function) == ("a.weight", "add", "tanh")
    assert (experts.key, experts.start) == ("experts.*.weight", first.next_start)
    assert experts.input is experts.next_start is None
    assert (last.key, last.input, last.start) == ("c.weight", None, first.next_start)


def test_no_point_comes_after_experts_that_are_multiplied_at_once():
    """Tokens without an expert may be zeros for it here, and be left out elsewhere."""

    def forward(block, x):
        h = x + block.a(x.tanh())
        h = h + torch.bmm(h.sin().expand(3, TOKENS, D), block.w).sum(0)
        return h + block.c(h.cos())

    block = Block(forward)
    block.w = nn.Parameter(torch.randn(3, D, D))
    *_, last = stages_of(damaged_module(block, batches()))
    assert (last.key, last.input) == ("c.weight", None)
