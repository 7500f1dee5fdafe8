"""Run a model's own forward with stubs in place of its blocks; report errors of the model's code in one line."""

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

# Names of a module's attributes that hold hooks of any kind.
_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]

# The type of a block, from `block_type`. Blocks of one type return outputs of the same structure.
BlockType = tuple[Any, ...]

# Makes the stub for a block's output: called with the number of the call, the block's name, and its arguments.
MakeStub = Callable[[int, str, tuple, dict], Any]


class ForwardFailed(InputError):
    """A model's own code raised an exception. That exception is the `__cause__` of this one."""


class NotABlock(InputError):
    """A module that was taken for a block is not one: its first argument is not a tensor.

    Attributes:
        name: name of the module.
    """

    def __init__(self, model: str, name: str) -> None:
        super().__init__(f"unsupported model {model}: {name} does not get hidden states as its first argument")
        self.name = name


# The kinds of input of a model's forward, in words, and the advice to the user if the forward fails on such input.
TEXT, BATCHES = "text alone", "these batches"
ADVICE = {
    TEXT: "check that transformers runs this model on tokens without other input",
    BATCHES: "check that the model itself runs on them",
}

# Exceptions of a model's forward that `explained` does not change.
PASSED = (InputError, MemoryError, torch.OutOfMemoryError, ForwardIsOver)


@contextmanager
def explained(model: str, place: str, input_kind: str = TEXT) -> Iterator[None]:
    """Turn any exception of a model's own forward, inside the `with` block, into an error of one line.

    Args:
        model: name of the model's class.
        place: the part that runs, for the message: a block's name or a description.
        input_kind: the kind of input of the forward, in words.

    Raises:
        ForwardFailed: the forward raised an exception that is not among PASSED.
    """
    try:
        yield
    except PASSED:
        raise
    # A model's code may raise any exception.
    except Exception as error:
        if "DefaultCPUAllocator" in str(error) or is_gpu_failure(error):
            # Not the model's fault: the host's memory is full (torch has no class for this), or a GPU operation failed.
            raise
        raise ForwardFailed(
            f"unsupported model {model}: {place} fails on {input_kind}: {type(error).__name__}: "
            f"{shown(first_line(error))}; {ADVICE[input_kind]}"
        ) from error


@dataclass(frozen=True)
class Template:
    """An example of what blocks of one type return. Stubs for their outputs are made from it.

    Attributes:
        output: the output of one of these blocks.
        keeps_shape: whether the hidden states in it have the shape and dtype of the block's input.
    """

    output: Any
    keeps_shape: bool

    def after(self, hidden: Tensor, change: Callable[[Tensor], Tensor] = Tensor.detach) -> Any:
        """Make a stub for the output of a block. Each tensor in the stub is a new object.

        Args:
            hidden: the block's input. It also becomes the stub's hidden states if `keeps_shape` is true.
            change: called with each tensor; returns the tensor for the stub.
        """
        return self.around(hidden if self.keeps_shape else leaves_of(self.output)[0], change)

    def around(self, hidden: Tensor, change: Callable[[Tensor], Tensor]) -> Any:
        """Make a stub with `hidden` as the hidden states of the output; `change` as for `after`."""
        # The hidden states come first.
        tensors = iter([hidden, *leaves_of(self.output)[1:]])
        return rebuilt(self.output, lambda _: change(next(tensors)))


class Templates:
    """The templates of all types of blocks that have run so far."""

    def __init__(self) -> None:
        # By type of block and shape of its input; a template under the shape None is for inputs of any shape.
        self._known: dict[tuple[BlockType, tuple[int, ...] | None], Template] = {}

    def find(self, kind: BlockType, hidden: Tensor, any_shape: bool = False) -> Template | None:
        """Find the template for a block of this type with this input; None: no such block has run.

        With `any_shape`, a template for an input of another shape is returned, too, if it has `keeps_shape`.
        """
        found = self._known.get((kind, None)) or self._known.get((kind, tuple(hidden.shape)))
        if found is None and any_shape:
            return next((x for (known, _), x in self._known.items() if known == kind and x.keeps_shape), None)
        return found

    def add(self, kind: BlockType, output: Any, hidden: Tensor, block: str, model: str) -> Template:
        """Add a template made from a block's output.

        Args:
            kind: type of the block.
            output: the output.
            hidden: the block's input.
            block: name of the block, for the message.
            model: name of the model's class, for the message.

        Raises:
            InputError: the output holds no tensor.
        """
        if not (leaves := leaves_of(output)):
            kind_of_output = type(output).__name__
            raise InputError(f"{block}: {UNSUPPORTED} {model}: the block returns a {kind_of_output} without tensors")
        first, shape = leaves[0], tuple(hidden.shape)
        same = (first.shape, first.dtype) == (hidden.shape, hidden.dtype)
        # A template keeps the shape and dtype of the hidden states. Expanded zeros take no memory.
        others = iter([first.new_zeros(()).expand(first.shape), *leaves[1:]])
        template = Template(rebuilt(output, lambda _: next(others)), same)
        # The shapes of other tensors may depend on the input's shape.
        self._known[kind, None if same and len(leaves) == 1 else shape] = template
        return template


def block_type(block: nn.Module) -> BlockType:
    """The class of a block, with the names and shapes of its parameters."""
    return type(block), *((name, x.shape) for name, x in block.named_parameters())


def run_with_stubs(
    runs: nn.Module,
    blocks: Mapping[str, nn.Module],
    batch: Batch,
    input_kind: str,
    make_stub: MakeStub,
    tracer: Tracer | None,
    last: int | None = None,
) -> Any:
    """Run a model's own forward with stubs in place of its blocks.

    Args:
        runs: the module whose forward runs.
        blocks: the blocks, by name.
        batch: the arguments, on the device of the model's weights.
        input_kind: the kind of input, in words.
        make_stub: called for every block; returns a stub for the block's output. The first of the block's arguments are
            the hidden states, even if the forward gives them by keyword. Inside this function the block is the original
            one, and can run.
        tracer: traces the forward, but not the calls inside `make_stub`.
        last: number of the block's call after which the forward is ended; None: the forward runs to its end.

    Returns:
        The output of the model; None if the forward was ended early.

    Raises:
        NotABlock: the first argument of a block is not a tensor.
        ForwardFailed: the forward raised an exception.
    """
    calls = itertools.count()

    def replacement(name: str, args: tuple, kwargs: dict) -> Any:
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
    """Replace a block's forward by a function inside the `with` block; the block's hooks are not called.

    While `replacement` runs, the block has its own forward and hooks.
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
    """Replace a block's `forward` and hooks inside the `with` block; yields the replaced ones.

    If `attributes` has no `forward`, the block has the forward of its class.
    """
    present = vars(block)
    own = {name: present[name] for name in ("forward", *_HOOKS) if name in present}
    try:
        present.pop("forward", None)
        present.update(attributes)
        yield own
    finally:
        present.pop("forward", None)
        present.update(own)


def _first_parameter(block: nn.Module) -> str:
    """The name of the first parameter of a block's forward; "" if there is no such name.

    A wrapped forward may take `*args` only. Then the forward of the block's class is asked.
    """
    for forward in (block.forward, MethodType(type(block).forward, block)):
        first = next(iter(inspect.signature(forward).parameters.values()), None)
        if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD:
            return first.name
    return ""


def hidden_of(block_output: Any) -> Tensor:
    """The hidden states in a block's output: its first tensor."""
    return leaves_of(block_output)[0]
