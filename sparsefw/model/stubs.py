"""Run a model's own forward with stubs in place of its blocks; its errors become one line."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.data.batches import Batch
from sparsefw.errors import InputError, first_line, is_gpu_failure, shown
from sparsefw.model.nested import leaves_of, rebuilt
from sparsefw.model.partial_forward import UNSUPPORTED, ForwardIsOver
from sparsefw.model.tape import Calls
from sparsefw.model.tracer import Tracer

# The attributes of a module that hold hooks: those that run before and after its forward, and others.
_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]

# Blocks of one type return the same.
BlockType = tuple[Any, ...]

# Makes the stub for a block's output: called with the number of the call, the block's name, and its arguments.
MakeStub = Callable[[int, str, tuple[Any, ...], dict[str, Any]], Any]


class ForwardFailed(InputError):
    """A model's own code raised an exception, which is the cause of this one."""


class NotABlock(InputError):
    """What was taken for a block is called in a way that no block is.

    Attributes:
        name: its name.
    """

    def __init__(self, model: str, name: str) -> None:
        super().__init__(f"unsupported model {model}: {name} is not given its hidden states as first argument")
        self.name = name


# The kinds of input of a model's forward, in words, each with the advice to follow where the forward fails on it.
TEXT, BATCHES = "text alone", "these batches"
ADVICE = {
    TEXT: "see whether transformers runs this model on tokens without other input",
    BATCHES: "see whether the model itself runs on them",
}

# Exceptions that pass through a model's forward as they are.
PASSED = (InputError, MemoryError, torch.OutOfMemoryError, ForwardIsOver)


@contextmanager
def explained(model: str, place: str, input_kind: str = TEXT) -> Iterator[None]:
    """Turn any exception of a model's own forward, inside the `with` block, into an error of one line.

    Args:
        model: name of the model's class.
        place: what runs: the name of a block, or words.
        input_kind: the kind of input of the forward, in words.

    Raises:
        ForwardFailed: an exception came out of it.
    """
    try:
        yield
    except PASSED:
        raise
    # A model's code may raise any exception.
    except Exception as error:
        if "DefaultCPUAllocator" in str(error) or is_gpu_failure(error):
            # The host's memory is full, for which torch has no class. Or a kernel of ours has failed, which is launched
            # inside of the forward.
            raise
        raise ForwardFailed(
            f"unsupported model {model}: {place} fails on {input_kind}: {type(error).__name__}: "
            f"{shown(first_line(error))}; {ADVICE[input_kind]}"
        ) from error


@dataclass(frozen=True)
class Form:
    """The form of what blocks of a type return.

    Attributes:
        output: the output of one of them.
        keeps: whether its hidden states have the form of the block's input.
    """

    output: Any
    keeps: bool

    def after(self, hidden: Tensor, change: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
        """Make a stub for the output of a block. Each of its tensors is a new object.

        Args:
            hidden: the block's input, which is taken for the hidden states of the output if they have the same form.
            change: makes each tensor of the stub.
        """
        return self.around(hidden if self.keeps else leaves_of(self.output)[0], change)

    def around(self, hidden: Tensor, change: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
        """Make a stub for an output with these hidden states, as `after`."""
        # The hidden states come first.
        tensors = iter([hidden, *leaves_of(self.output)[1:]])
        return rebuilt(self.output, lambda _: change(next(tensors)))


class Forms:
    """The forms of what blocks of each type return, as far as they are known."""

    def __init__(self) -> None:
        # By type, and shape of the input; None for any shape.
        self._known: dict[tuple[BlockType, tuple[int, ...] | None], Form] = {}

    def find(self, kind: BlockType, hidden: Tensor, any_shape: bool = False) -> Form | None:
        """Find what a block of a type returns for this input; None: not known.

        With `any_shape`, the output for another input will do, if it keeps the form of hidden states.
        """
        found = self._known.get((kind, None)) or self._known.get((kind, tuple(hidden.shape)))
        if found is None and any_shape:
            return next((form for (known, _), form in self._known.items() if known == kind and form.keeps), None)
        return found

    def add(self, kind: BlockType, output: Any, hidden: Tensor, block: str, model: str) -> Form:
        """Note the output of a block.

        Args:
            kind: its type.
            output: the output.
            hidden: the block's input.
            block: its name, for the message.
            model: name of the model's class, for the message.

        Raises:
            InputError: it holds no tensor.
        """
        if not (leaves := leaves_of(output)):
            kind_of_output = type(output).__name__
            raise InputError(f"{block}: {UNSUPPORTED} {model}: the block returns a {kind_of_output} without tensors")
        first, shape = leaves[0], tuple(hidden.shape)
        same = (first.shape, first.dtype) == (hidden.shape, hidden.dtype)
        # A stub takes the block's input for its hidden states, or else needs their form alone.
        others = iter([first.new_zeros(()).expand(first.shape), *leaves[1:]])
        form = Form(rebuilt(output, lambda _: next(others)), same)
        # Other tensors than hidden states have another shape for another input.
        self._known[kind, None if same and len(leaves) == 1 else shape] = form
        return form


def block_type(block: nn.Module) -> BlockType:
    """The class of a block, with the names and shapes of its parameters."""
    return type(block), *((name, x.shape) for name, x in block.named_parameters())


def run_with_stubs(
    runs: nn.Module,
    blocks: Mapping[str, nn.Module],
    batch: Batch,
    input_kind: str,
    make_stub: MakeStub,
    tracer: Tracer | None = None,
    last: int | None = None,
) -> Any:
    """Run a model's own forward with stubs in place of its blocks.

    Args:
        runs: the model.
        blocks: its blocks, by name.
        batch: the arguments, where the model's weights are.
        input_kind: the kind of input, in words.
        make_stub: called for every block, returns a stub for the block's output. The hidden states are the first of the
            arguments that it is called with, even if the forward gives them by name. Inside this function the block is
            as it was, and can be run.
        tracer: traces the forward, without the work of `make_stub`.
        last: the forward ends after this call of a block; None: it goes to its end.

    Returns:
        The output of the model; None if it ended before.

    Raises:
        NotABlock: it gives a block no hidden states.
        ForwardFailed: it fails.
    """
    calls = itertools.count()

    def replacement(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            raise NotABlock(type(runs).__name__, name)
        i = next(calls)
        if tracer is None:
            return make_stub(i, name, args, kwargs)
        with tracer.tape.pause():
            tracer.before_block(i, name, args[0], args[1:], kwargs)
            output = make_stub(i, name, args, kwargs)
            tracer.after_block(i, output)
        if i == last:
            raise ForwardIsOver
        return output

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(_replaced(name, block, replacement))
        if tracer:
            stack.enter_context(Calls(tracer.record))
        stack.enter_context(explained(type(runs).__name__, "its forward", input_kind))
        with suppress(ForwardIsOver):
            return runs(*batch.args, **batch.kwargs)
    return None


@contextmanager
def _replaced(name: str, block: nn.Module, replacement: Callable[[str, tuple, dict], Any]) -> Iterator[None]:
    """Replace a block, and its forward, by a function inside the `with` block; no hooks are called.

    Inside the replacement the block is as it was.
    """
    first = _first_parameter(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        with _called_with(block, own):
            return replacement(name, args, kwargs)

    with _called_with(block, {"forward": forward} | {hooks: {} for hooks in _HOOKS}) as own:
        yield


@contextmanager
def _called_with(block: nn.Module, attributes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a block another forward, or its class's, and other hooks inside the `with` block; yields its own ones."""
    own = {name: vars(block)[name] for name in ("forward", *_HOOKS) if name in vars(block)}
    try:
        vars(block).pop("forward", None)
        vars(block).update(attributes)
        yield own
    finally:
        vars(block).pop("forward", None)
        vars(block).update(own)


def _first_parameter(block: nn.Module) -> str:
    """The name of the first argument of a block's forward; of its class's, if its own forward takes any arguments."""
    for forward in (block.forward, MethodType(type(block).forward, block)):
        first = next(iter(inspect.signature(forward).parameters.values()), None)
        if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD:
            return first.name
    return ""


def hidden_of(block_output: Any) -> Tensor:
    """The hidden states in a block's output: its first tensor."""
    return block_output if isinstance(block_output, Tensor) else leaves_of(block_output)[0]
