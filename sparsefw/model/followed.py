"""A model's own forward with stand-ins for its blocks: which blocks it calls, and what these hand on.

Text is followed on a few tokens, before any weight is read. The weights outside of the blocks are zeros, and so are a
block's while it runs. They take no memory: pages that nobody has written to are all the same page.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefw.data import Batch, token_batch
from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.compared import Traced, check_same, other_values
from sparsefw.model.explained import ForwardFailed, explained
from sparsefw.model.flow import Recording
from sparsefw.model.slots import filled, slots_of
from sparsefw.model.stand_ins import Forms, form_of_output, kind_of_block, run_replaced
from sparsefw.model.values import objects_of, rebuilt

# A few tokens are enough for every kind of attention.
FEW_TOKENS = token_batch(torch.zeros(1, 8, dtype=torch.int64))


class NotABlock(InputError):
    """What was taken for a block is called in a way that no block is.

    Attributes:
        name: its name.
    """

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class Followed:
    """A model's forward, with stand-ins for the blocks.

    Args:
        runs: the model whose forward it is. Its weights outside of the blocks are there.
        blocks: what may be its blocks, by name.
        batch: the arguments of the forward.
        given: what these are, in words, for messages.
        ready: inside its `with` block, modules of a block have their tensors where they are needed.

    Attributes:
        names: the blocks that were called, in the order of their calls; one that was called twice stands there twice.
        forms: what blocks return.
        logits_itemsize: bytes of an entry of the logits that it returns; 0 if it returns none.
    """

    def __init__(
        self,
        runs: nn.Module,
        blocks: dict[str, nn.Module],
        batch: Batch,
        given: str,
        ready: Callable[[Iterable[nn.Module]], AbstractContextManager[None]],
    ) -> None:
        self._runs, self._kind, self._blocks = runs, type(runs).__name__, blocks
        self._batch, self._given, self._ready = batch, given, ready
        self._kinds = {name: kind_of_block(block) for name, block in blocks.items()}
        self._weights = {f"{name}.{n}": x for name, block in blocks.items() for n, x in block.named_parameters()}
        self.names: list[str] = []
        self.forms = Forms()
        self.logits_itemsize = 0
        # Attributes that blocks have set: the module, its name, and the module's attributes before.
        self._set: list[tuple[nn.Module, str, dict[str, Any]]] = []

    def record(self) -> Recording | None:
        """Record the forward; None if it calls no block.

        The first block of each kind is run, and shows what the others return. So is each block that is given objects,
        which it may change. Then the forward is run once more. Nothing in it may depend on what the blocks did.

        Raises:
            NotABlock: it gives a block no hidden states.
            InputError: the forward fails, or hands tensors on in a way that cannot be followed.
        """
        try:
            first = self._run(self._run_block)
        finally:
            self._restore_attributes()
        if not self.names:
            return None
        names, self.names = self.names, []
        try:
            second = self._run(self._other_values)
        except ForwardFailed as error:
            raise InputError(
                f"unsupported model {self._kind}: its forward depends on what blocks return or change in a way that "
                f"cannot be followed: without it, {shown(first_line(error.__cause__ or error))}"
            ) from error
        check_same(first, second, names, self._kind)
        if not any(count == 1 for count in Counter(names).values()):
            raise InputError(
                f"unsupported model {self._kind}: {names[0]} runs more than once in a forward, and so do all blocks"
            )
        return first.recording()

    def _run(self, block_output: Callable[[str, tuple, dict], Any]) -> Traced:
        """Run the forward; the function makes what stands for the output of the block of this name."""
        blocks = list(self._blocks)
        recorder = Traced(self.names, self._kind, self._batch.tensors, self._weights)

        def replacement(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = blocks[i]
            self._check_call(name, args)
            self.names.append(name)
            hidden, *others = args
            with recorder.pause():
                recorder.arrives(len(self.names) - 1, hidden, tuple(others), kwargs)
                output = block_output(name, args, kwargs)
                recorder.leaves(len(self.names) - 1, output)
            return output

        with explained(self._kind, "its forward", self._given), recorder:
            returned = run_replaced(self._runs, list(self._blocks.values()), self._batch, replacement)
        recorder.ends()
        logits = getattr(returned, "logits", None)
        self.logits_itemsize = logits.element_size() if isinstance(logits, Tensor) else 0
        return recorder

    def _run_block(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for a block's output, with the block's changes to the objects that it is given."""
        block, kind, objects = self._blocks[name], self._kinds[name], objects_of((*args, *kwargs.values()))
        form = self.forms.find(kind, args[0])
        if objects or form is None:
            # The objects themselves, with other tensors than those that are followed.
            memo = {id(known): (known, known) for known in objects}
            own, others = rebuilt((args, kwargs), Tensor.detach, memo)
            with explained(self._kind, name, self._given), self._ready(block.modules()), self._attributes_noted(block):
                output = block(*own, **others)
            form = form or self.forms.add(kind, form_of_output(output, own[0], name, self._kind))
        return form.after(args[0])

    def _other_values(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for the block's output, with other values than `_run_block` gives it."""
        form = self.forms.find(self._kinds[name], args[0])
        assert form is not None, name
        return form.after(args[0], other_values)

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
        """Raise if a block's first argument is not the hidden states."""
        if not args or not isinstance(args[0], Tensor):
            raise NotABlock(
                f"unsupported model {self._kind}: {name} is not given its hidden states as first argument", name
            )


@contextmanager
def zeros_in(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the `with` block, these modules have zeros in place of tensors on the meta device; tied ones stay tied.

    All of them are views of one piece of memory, as large as the largest.
    """
    slots = [slot for slot in slots_of(("", module) for module in modules) if slot.own.is_meta]
    # Memory that is only read takes none.
    memory = torch.from_numpy(np.zeros(max((slot.own.nbytes for slot in slots), default=0), np.uint8))
    with filled(slots, lambda slot: memory[: slot.own.nbytes].view(slot.own.dtype).view(slot.own.shape)):
        yield
