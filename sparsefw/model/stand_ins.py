"""Stand-ins for blocks: run a model's own forward with something else in place of each."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from sparsefw.data import Batch
from sparsefw.errors import InputError
from sparsefw.model.explained import StopForward
from sparsefw.model.parts import UNSUPPORTED
from sparsefw.model.recording import leaves_of, rebuilt

# Blocks of one kind return the same.
BlockType = tuple[Any, ...]

# Stands for a block: called with the block's number and what the block is given.
Replacement = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]

# The attributes of a module that hold what runs before and after its forward.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


@dataclass(frozen=True)
class Form:
    """What blocks of a class return.

    Attributes:
        output: what one of them returned. Hidden states of the form of its input are a meta tensor.
        shape: shape of its input.
    """

    output: Any
    shape: tuple[int, ...]

    @property
    def only_hidden(self) -> bool:
        """Whether the hidden states are the only tensor, and have the form of the input."""
        return self.keeps and len(leaves_of(self.output)) == 1

    @property
    def keeps(self) -> bool:
        """Whether hidden states have the form of the input."""
        return leaves_of(self.output)[0].is_meta

    def after(self, hidden: Tensor, change: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
        """A stand-in for the output of a block. Each of its tensors is a new object.

        Args:
            hidden: the block's input, which is the stand-in's hidden states if they have the same form.
            change: makes each tensor of the stand-in.
        """
        return self.around(hidden if self.keeps else leaves_of(self.output)[0], change)

    def around(self, hidden: Tensor, change: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
        """A stand-in for an output with these hidden states, as `after`."""
        # The hidden states come first.
        stand_ins = iter([hidden, *leaves_of(self.output)[1:]])
        return rebuilt(self.output, lambda _: change(next(stand_ins)))


class Forms:
    """What blocks of each kind return, as far as it is known."""

    def __init__(self) -> None:
        # By kind, and shape of the input; None for any shape.
        self._known: dict[tuple[BlockType, tuple[int, ...] | None], Form] = {}

    def find(self, kind: BlockType, hidden: Tensor) -> Form | None:
        """What a block of a kind returns for this input; None if it is not known."""
        return self._known.get((kind, None)) or self._known.get((kind, tuple(hidden.shape)))

    def like(self, kind: BlockType, hidden: Tensor) -> Form | None:
        """As `find`, or what it returns for another input, if it keeps the form of hidden states."""
        others = (form for (known, _), form in self._known.items() if known == kind and form.keeps)
        return self.find(kind, hidden) or next(others, None)

    def add(self, kind: BlockType, form: Form) -> Form:
        """Note a form, and return it. Other tensors than hidden states have another shape for another input."""
        self._known[kind, None if form.only_hidden else form.shape] = form
        return form


def block_type(block: nn.Module) -> BlockType:
    """The class of a block, with the names and shapes of its parameters."""
    return type(block), *((name, x.shape) for name, x in block.named_parameters())


def run_replaced(runs: nn.Module, blocks: Sequence[nn.Module], batch: Batch, replacement: Replacement) -> Any:
    """Run a model's own forward.

    Args:
        runs: the model.
        blocks: its blocks.
        batch: its arguments, where the model's weights are.
        replacement: called for every block, returns what the block would. The hidden states are the first of the
            arguments that it is called with, even if the model's forward gives them by name. Meanwhile the block is
            what it is outside, and can be run.

    Returns:
        What the model returns; None if the replacement raised `StopForward`.
    """
    with ExitStack() as replaced:
        for i, block in enumerate(blocks):
            replaced.enter_context(_replaced(block, i, replacement))
        try:
            return runs(*batch.args, **batch.kwargs)
        except StopForward:
            return None


@contextmanager
def _replaced(block: nn.Module, i: int, replacement: Replacement) -> Iterator[None]:
    """Inside the `with` block, a call of block i calls the replacement alone, without the block's hooks."""
    first = _first_parameter(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        with _called_with(block, own):
            return replacement(i, args, kwargs)

    with _called_with(block, {"forward": forward} | {name: {} for name in _HOOKS}) as own:
        yield


@contextmanager
def _called_with(block: nn.Module, attributes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inside the `with` block, a block has another forward, or its class's, and other hooks; yields its own ones."""
    own = {name: vars(block)[name] for name in ("forward", *_HOOKS) if name in vars(block)}
    try:
        vars(block).pop("forward", None)
        vars(block).update(attributes)
        yield own
    finally:
        vars(block).pop("forward", None)
        vars(block).update(own)


def _first_parameter(block: nn.Module) -> str:
    """The name of the first argument of a block's forward; of its class's, if its own one takes any."""
    for forward in (block.forward, MethodType(type(block).forward, block)):
        first = next(iter(inspect.signature(forward).parameters.values()), None)
        if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD:
            return first.name
    return ""


def hidden_of(block_output: Any) -> Tensor:
    """The hidden states among what a block returned: its first tensor."""
    return block_output if isinstance(block_output, Tensor) else leaves_of(block_output)[0]


def form_of_output(output: Any, hidden: Tensor, block: str, model: str) -> Form:
    """The form of what a block has returned.

    Args:
        output: what it has returned.
        hidden: its input.
        block: its name, for the message.
        model: name of the model's class, for the message.

    Raises:
        InputError: it returns no tensor.
    """
    leaves = leaves_of(output)
    if not leaves:
        raise InputError(f"{block}: {UNSUPPORTED} {model}: the block returns a {type(output).__name__} without tensors")
    first = leaves[0]
    # They are given anew each time, unless the block gives them another form.
    same = (first.shape, first.dtype) == (hidden.shape, hidden.dtype)
    others = iter([hidden.to("meta") if same else first.new_zeros(()).expand(first.shape), *leaves[1:]])
    return Form(rebuilt(output, lambda _: next(others)), tuple(hidden.shape))
