"""The tape of a forward: which tensors are the same, what is written in place, and what is held."""

import torch
from torch import Tensor, nn

from sparsefw.model.tape import Calls, Op, Tape, tensors_in


def recorded(run, *given: Tensor, **settings) -> list[Op]:
    tape = Tape(given, **settings)
    with Calls(tape.record):
        run(*given)
    return tape.ops


def test_tensors_are_numbered_by_their_makers():
    weight = torch.ones(3, 3)

    def run(x: Tensor) -> None:
        first, second = (x @ weight).chunk(2)
        torch.cat([first, second, x], dim=0)

    product, chunk, cat = recorded(run, torch.ones(2, 3))
    x, w = product.inputs
    assert (x.maker, w.maker) == (0, None)
    assert chunk.inputs == product.outputs
    assert chunk.out == chunk.outputs
    assert cat.inputs == (*chunk.outputs, x)
    assert cat.args == ([*chunk.outputs, x],)
    assert cat.kwargs == {"dim": 0}
    assert [value.maker for value in cat.inputs] == [2, 2, 0]
    assert [op.name for op in (product, chunk, cat)] == ["matmul", "chunk", "cat"]


def test_a_write_makes_a_new_value():
    def run(x: Tensor) -> None:
        y = (x + 1).contiguous()
        y.mul_(2)
        y.sum()

    add, same, mul, total = recorded(run, torch.ones(2))
    # What is returned unchanged is no new value.
    assert same.outputs == add.outputs
    assert mul.inputs == add.outputs
    assert mul.written == ((*add.outputs, *mul.outputs),)
    assert mul.outputs != mul.inputs
    assert total.inputs == mul.outputs
    assert mul.made == mul.outputs * 2


def test_a_write_to_a_view_changes_its_base_and_other_views():
    def run(x: Tensor) -> None:
        y = x + 1
        row, column = y[0], y[:, 0]
        row.zero_()
        y.sum()
        column.sum()

    add, row, column, zero, total, other = recorded(run, torch.ones(2, 2))
    assert [before for before, _ in zero.written] == [*add.outputs, *row.outputs]
    assert total.inputs == (zero.written[0][1],)
    assert total.inputs[0].maker == zero.number
    assert other.inputs != column.outputs
    assert other.inputs[0].maker == zero.number


def test_only_what_is_held_is_found_in_a_value():
    block = nn.Linear(3, 3)
    address = block.weight.untyped_storage().data_ptr()
    ops = recorded(lambda x: block(x), torch.ones(2, 3), holds=lambda x: x.untyped_storage().data_ptr() == address)
    x, weight, bias = ops[-1].inputs
    assert weight.tensor is block.weight
    assert (x.tensor, bias.tensor) == (None, None)


def test_nothing_is_recorded_in_a_pause_and_calls_can_be_changed():
    tape = Tape(call=lambda func, args, kwargs: func(*args) * 2)
    with Calls(tape.record):
        with tape.pause():
            x = torch.ones(2) + 1
        y = x + 1
    assert [op.name for op in tape.ops] == ["add"]
    assert y.tolist() == [6, 6]
    assert tape.value(y) is tape.ops[0].out


def test_tensors_in_containers():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    values = ({"a": a, "n": 1}, [(b,)], torch.return_types.topk((c, a)), slice(None), torch.Size([2]))
    assert [id(x) for x in tensors_in(values)] == [id(x) for x in (a, b, c, a)]
