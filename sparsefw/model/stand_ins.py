"""Run a model's own forward with something else in place of each block; its errors are told in one line."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.data.batches import Batch
from sparsefw.errors import InputError, first_line, is_gpu_failure, shown
from sparsefw.model.parts import UNSUPPORTED, ForwardIsOver
from sparsefw.model.recorder import Recorder
from sparsefw.model.recording import leaves_of, rebuilt
from sparsefw.model.tape import Calls

# The attributes of a module that hold hooks: those that run before and after its forward, and others.
_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]

# Blocks of one kind return the same.
BlockType = tuple[Any, ...]

# Makes what stands for a block's output: called with the number of the call, the block's name, and its arguments.
StandIn = Callable[[int, str, tuple[Any, ...], dict[str, Any]], Any]


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


# These are inputs of a model's forward, in words, each with the advice to follow where it fails on them.
TEXT, BATCHES = "text alone", "these batches"
ADVICE = {
    TEXT: "see whether transformers runs this model on tokens without other input",
    BATCHES: "see whether the model itself runs on them",
}

# Exceptions that go through a model's forward as they are.
PASSED = (InputError, MemoryError, torch.OutOfMemoryError, ForwardIsOver)


@contextmanager
def explained(model: str, place: str, input_kind: str = TEXT) -> Iterator[None]:
    """Turn any exception out of a model's own forward, inside the `with` block, into an error of one line.

    Args:
        model: name of the model's class.
        place: what runs: the name of a block, or words.
        input_kind: what its forward is given, in words.

    Raises:
        ForwardFailed: an exception came out of it.
    """
    try:
        yield
    except PASSED:
        raise
    # A model's code may raise whatever there is.
    except Exception as error:
        if "DefaultCPUAllocator" in str(error) or is_gpu_failure(error):
            # The host's memory is full, for which torch has no class. Or a kernel of ours, which is launched inside of
            # the forward, has failed.
            raise
        raise ForwardFailed(
            f"unsupported model {model}: {place} fails on {input_kind}: {type(error).__name__}: "
            f"{shown(first_line(error))}; {ADVICE[input_kind]}"
        ) from error


@dataclass(frozen=True)
class Form:
    """What blocks of a class return.

    Attributes:
        output: what one of them returned.
        keeps: whether hidden states have the form of the input.
    """

    output: Any
    keeps: bool

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

    def add(self, kind: BlockType, output: Any, hidden: Tensor, block: str, model: str) -> Form:
        """Note what a block has returned.

        Args:
            kind: its kind.
            output: what it has returned.
            hidden: its input.
            block: its name, for the message.
            model: name of the model's class, for the message.

        Raises:
            InputError: it returns no tensor.
        """
        if not (leaves := leaves_of(output)):
            kind_of_output = type(output).__name__
            raise InputError(f"{block}: {UNSUPPORTED} {model}: the block returns a {kind_of_output} without tensors")
        first, shape = leaves[0], tuple(hidden.shape)
        same = (first.shape, first.dtype) == (hidden.shape, hidden.dtype)
        # They are given anew each time, unless the block gives them another form.
        others = iter([first.new_zeros(()).expand(first.shape), *leaves[1:]])
        form = Form(rebuilt(output, lambda _: next(others)), same)
        # Other tensors than hidden states have another shape for another input.
        self._known[kind, None if same and len(leaves) == 1 else shape] = form
        return form


def block_type(block: nn.Module) -> BlockType:
    """The class of a block, with the names and shapes of its parameters."""
    return type(block), *((name, x.shape) for name, x in block.named_parameters())


def run_replaced(
    runs: nn.Module,
    blocks: Mapping[str, nn.Module],
    batch: Batch,
    input_kind: str,
    stand_in: StandIn,
    recorder: Recorder | None = None,
    last: int | None = None,
) -> Any:
    """Run a model's own forward.

    Args:
        runs: the model.
        blocks: its blocks, by name.
        batch: its arguments, where the model's weights are.
        input_kind: what these are, in words.
        stand_in: called for every block, returns what the block would. The hidden states are the first of the arguments
            that it is called with, even if the model's forward gives them by name. Meanwhile the block is what it is
            outside, and can be run.
        recorder: records the forward, but for what the stand-in does.
        last: the forward ends behind this call of a block; None: it goes to its end.

    Returns:
        What the model returns; None if it ended before.

    Raises:
        NotABlock: it gives a block no hidden states.
        ForwardFailed: it fails.
    """
    calls = itertools.count()

    def replacement(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor):
            raise NotABlock(type(runs).__name__, name)
        i = next(calls)
        if recorder is None:
            return stand_in(i, name, args, kwargs)
        with recorder.tape.pause():
            recorder.arrives(i, name, args[0], args[1:], kwargs)
            output = stand_in(i, name, args, kwargs)
            recorder.leaves(i, output)
        if i == last:
            raise ForwardIsOver
        return output

    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(_replaced(name, block, replacement))
        stack.enter_context(Calls(recorder.record) if recorder else nullcontext())
        stack.enter_context(explained(type(runs).__name__, "its forward", input_kind))
        stack.enter_context(suppress(ForwardIsOver))
        return runs(*batch.args, **batch.kwargs)
    return None


@contextmanager
def _replaced(name: str, block: nn.Module, replacement: Callable[[str, tuple, dict], Any]) -> Iterator[None]:
    """Inside the `with` block, a call of a block, or of its forward, calls the replacement alone, without hooks.

    Inside the replacement the block is what it is outside.
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
