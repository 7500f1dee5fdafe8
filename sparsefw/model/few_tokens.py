"""A model's own forward on a few tokens, before any weight is read: which blocks it calls, and what these hand on.

The weights outside of the blocks are zeros, and so are a block's while it runs. They take no memory: pages that nobody
has written to are all the same page.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.compared import Traced, check_same, other_values
from sparsefw.model.explained import ForwardFailed, explained
from sparsefw.model.flow import Form, Recording
from sparsefw.model.stand_ins import form_of_output, run_replaced
from sparsefw.model.values import objects_of, rebuilt

# Tokens of the forward: enough for every kind of attention.
TOKENS = 8


class FewTokens:
    """A forward on a few tokens, with stand-ins for the blocks.

    Args:
        runs: the model whose forward it is. Its weights outside of the blocks are there, see `filled`.
        blocks: what may be its blocks, by name.

    Attributes:
        names: the blocks that were called, in the order of their calls.
        forms: what blocks return, by their class.
    """

    def __init__(self, runs: nn.Module, blocks: dict[str, nn.Module]) -> None:
        self._runs, self._kind, self._blocks = runs, type(runs).__name__, blocks
        self._weights = {f"{name}.{n}": x for name, block in blocks.items() for n, x in block.named_parameters()}
        self.names: list[str] = []
        self.forms: dict[type, Form] = {}
        # Attributes that blocks have set: the module, its name, and the module's attributes before.
        self._set: list[tuple[nn.Module, str, dict[str, Any]]] = []

    def record(self) -> Recording | None:
        """Record the forward; None if it calls no block.

        The first block of each class is run, and shows what the others return. So is each block that is given objects,
        which it may change. Then the forward is run once more. Nothing in it may depend on what the blocks did.

        Raises:
            InputError: the forward fails, calls a block twice, gives one no hidden states, or hands tensors on in a way
                that cannot be followed.
        """
        try:
            first = self._run(self._run_block)
        finally:
            self._restore_attributes()
        if not self.names:
            return None
        names, self.names = self.names, []
        try:
            second = self._run(lambda block, args, kwargs: self.forms[type(block)].around(args[0], other_values))
        except ForwardFailed as error:
            raise InputError(
                f"unsupported model {self._kind}: its forward depends on what blocks return or change in a way that "
                f"cannot be followed: without it, {shown(first_line(error.__cause__ or error))}"
            ) from error
        check_same(first, second, names, self._kind)
        return first.recording()

    def _run(self, block_output: Callable[[nn.Module, tuple, dict], Any]) -> Traced:
        """Run the forward; the function makes what stands for a block's output."""
        ids, blocks = torch.zeros(1, TOKENS, dtype=torch.int64), list(self._blocks.items())
        recorder = Traced(self.names, self._kind, ids, self._weights)

        def replacement(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name, block = blocks[i]
            self._check_call(name, args)
            self.names.append(name)
            hidden, *others = args
            with recorder.pause():
                recorder.arrives(len(self.names) - 1, hidden, tuple(others), kwargs)
                output = block_output(block, args, kwargs)
                recorder.leaves(len(self.names) - 1, output)
            return output

        with explained(self._kind, "its forward"), recorder:
            run_replaced(self._runs, [block for _, block in blocks], ids, replacement)
        recorder.ends()
        return recorder

    def _run_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for a block's output, with the block's changes to the objects that it is given."""
        kind, name, objects = type(block), self.names[-1], objects_of((*args, *kwargs.values()))
        if objects or kind not in self.forms:
            # The objects themselves, with other tensors than those that are followed.
            memo = {id(known): (known, known) for known in objects}
            own, others = rebuilt((args, kwargs), Tensor.detach, memo)
            with explained(self._kind, name), filled(block.modules()), self._attributes_noted(block):
                output = kind.forward(block, *own, **others)
            self.forms.setdefault(kind, form_of_output(output, own[0], name, self._kind))
        return self.forms[kind].around(args[0])

    @contextmanager
    def _attributes_noted(self, block: nn.Module) -> Iterator[None]:
        """Note which attributes of its modules a block sets inside the `with` block, and what they were before."""
        before = [(module, dict(module.__dict__)) for module in block.modules()]
        yield
        for module, attributes in before:
            self._set += [(module, k, attributes) for k, x in module.__dict__.items() if attributes.get(k) is not x]

    def _restore_attributes(self) -> None:
        """Give the blocks' modules the attributes that they had before the blocks were run."""
        for module, name, before in reversed(self._set):
            module.__dict__.pop(name, None)
            if name in before:
                module.__dict__[name] = before[name]
        self._set = []

    def _check_call(self, name: str, args: tuple[Any, ...]) -> None:
        """Raise if a block was called before, or its first argument is not the hidden states."""
        unsupported = f"unsupported model {self._kind}: {name}"
        if name in self.names:
            raise InputError(f"{unsupported} runs more than once in a forward")
        if not args or not isinstance(args[0], Tensor):
            raise InputError(f"{unsupported} is not given its hidden states as first argument")


@contextmanager
def filled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the `with` block, these modules have zeros in place of tensors on the meta device; tied ones stay tied.

    All of them are views of one piece of memory, as large as the largest.
    """
    slots: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in modules:
        stored: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in stored:
            slots += [(tensors, name, x) for name, x in tensors.items() if x is not None and x.is_meta]
    memory = torch.from_numpy(np.zeros(max((tensor.nbytes for *_, tensor in slots), default=0), np.uint8))
    made = {id(tensor): _zeros_like(tensor, memory) for *_, tensor in slots}
    for tensors, name, tensor in slots:
        tensors[name] = made[id(tensor)]
    try:
        yield
    finally:
        for tensors, name, tensor in slots:
            tensors[name] = tensor


def _zeros_like(tensor: Tensor, memory: Tensor) -> Tensor:
    """Zeros in this memory, which takes none as long as it is only read."""
    data = memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return nn.Parameter(data, requires_grad=False) if isinstance(tensor, nn.Parameter) else data
