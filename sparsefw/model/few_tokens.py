"""A model's own forward on a few tokens, before any weight is read: which blocks it calls, and what these hand on.

The weights outside of the blocks are zeros, and so are a block's while it runs. They take no memory: pages that nobody
has written to are all the same page.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.model.explained import explained
from sparsefw.model.flow import Form, Recording
from sparsefw.model.recording import Recorder
from sparsefw.model.stand_ins import form_of_output, run_replaced
from sparsefw.model.values import rebuilt

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

    def record(self) -> Recording | None:
        """Record the forward; None if it calls no block.

        The first block of each class is run, and shows what the others return.

        Raises:
            InputError: the forward fails, calls a block twice, gives one no hidden states, or hands tensors on in a way
                that cannot be followed.
        """
        ids, blocks = torch.zeros(1, TOKENS, dtype=torch.int64), list(self._blocks.items())
        recorder = Recorder(self.names, self._kind, ids, self._weights)

        def stand_in(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name, block = blocks[i]
            self._check_call(name, args)
            self.names.append(name)
            hidden, *others = args
            with recorder.pause():
                recorder.arrives(len(self.names) - 1, hidden, tuple(others), kwargs)
                if type(block) not in self.forms:
                    self.forms[type(block)] = self._form_of(name, block, args, kwargs)
                output = self.forms[type(block)].around(hidden)
                recorder.leaves(len(self.names) - 1, output)
            return output

        with explained(self._kind, "its forward"), recorder:
            run_replaced(self._runs, [block for _, block in blocks], ids, stand_in)
        return recorder.recording() if self.names else None

    def _form_of(self, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Form:
        """What a block returns."""
        # Copies: what the block changes in them, it changes again when it is run.
        args, kwargs = rebuilt((args, kwargs), lambda x: x)
        with explained(self._kind, name), filled(block.modules()):
            output = type(block).forward(block, *args, **kwargs)
        return form_of_output(output, args[0], name, self._kind)

    def _check_call(self, name: str, args: tuple[Any, ...]) -> None:
        """Raise if a block was called before, or its first argument is not the hidden states of windows."""
        unsupported = f"unsupported model {self._kind}: {name}"
        if name in self.names:
            raise InputError(f"{unsupported} runs more than once in a forward")
        if not args or not isinstance(args[0], Tensor):
            raise InputError(f"{unsupported} is not given its hidden states as first argument")
        if args[0].shape[:2] == (TOKENS, 1):
            raise InputError(f"{unsupported} is given (tokens, windows), not (windows, tokens)")


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
