"""One micro-batch's forward through a block, recorded: its operations, its products, and what its modules read."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.model.layers.names import WeightNames
from sparsefw.model.layers.products import Product, products_of
from sparsefw.model.stand_ins import hidden_of
from sparsefw.model.tape import Calls, Op, Tape, Value, tensors_in


@dataclass(frozen=True)
class ModuleCall:
    """That a module is called, or that it returns.

    Attributes:
        module: its name in the block.
        before: number of the operation that follows.
        read: its first tensor, where it is called. Others may be sums that go from module to module.
        returned: the tensors that it returns, where it does.
    """

    module: str
    before: int
    read: tuple[Value, ...] = ()
    returned: tuple[Value, ...] = ()


@dataclass(frozen=True)
class BlockTape:
    """A recorded forward of a block.

    Attributes:
        ops: the operations.
        products: by the number of an operation, its products with matrices of the block.
        hidden: the block's input.
        output: the hidden states that it returns.
        handed_on: other tensors of it that later blocks are given.
        names: the block's matrices.
        modules: calls of modules, in order, with those of modules inside.
    """

    ops: list[Op]
    products: dict[int, list[Product]]
    hidden: Value
    output: Value
    handed_on: list[Value]
    names: WeightNames
    modules: list[ModuleCall]


def record_block(
    block: nn.Module,
    run: Callable[[Tensor], Any],
    hidden: Tensor,
    handed_on: Callable[[Any], Any] = lambda returned: (),
    modules: Collection[str] = (),
) -> tuple[BlockTape, Any]:
    """Record a forward of a block, and what it returns.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through it: called with the block's input, returns what the block does.
        hidden: one micro-batch.
        handed_on: called with what the block has returned; the tensors that later blocks are given beside the hidden
            states.
        modules: names of the modules whose calls are wanted.
    """
    names = WeightNames(block)
    # Biases, too: they may be computed.
    tape = Tape((hidden,), lambda x: x.dim() < 2 or names.is_weight(x))
    calls: list[ModuleCall] = []

    def note(name: str, read: Any = (), returned: Any = ()) -> None:
        with tape.pause():
            first, all_of = (tuple(map(tape.value, tensors_in(x))) for x in (read, returned))
        calls.append(ModuleCall(name, len(tape.ops) + 1, first[:1], all_of))

    def watch(hooks: ExitStack, name: str) -> None:
        module = block.get_submodule(name)
        called = module.register_forward_pre_hook(lambda _, args, kwargs: note(name, (args, kwargs)), with_kwargs=True)
        hooks.callback(called.remove)
        hooks.callback(module.register_forward_hook(lambda _, args, out: note(name, (), out)).remove)

    with torch.no_grad(), ExitStack() as hooks:
        for name in modules:
            watch(hooks, name)
        with Calls(tape.record):
            returned = run(hidden)
    given, output, *others = map(tape.value, tensors_in((hidden, hidden_of(returned), handed_on(returned))))
    products = {op.number: found for op in tape.ops if (found := products_of(op.function, op.args, op.kwargs, names))}
    return BlockTape(tape.ops, products, given, output, others, names, calls), returned
