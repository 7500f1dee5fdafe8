"""Trace a model's forward: follow the outputs of its blocks to later blocks.

The forward runs with stubs in place of the blocks' outputs. The tracer records the torch functions that the forward
calls with stubs, so that these calls can be replayed with the real outputs.
"""

import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.data.batches import bytes_of
from sparsefw.errors import InputError
from sparsefw.model.nested import (
    ConstantRef,
    Memo,
    ObjectRef,
    ValueRef,
    leaves_of,
    numbers_in,
    objects_of,
    outline,
    rebuilt,
    tensors_of,
)
from sparsefw.model.partial_forward import UNSUPPORTED
from sparsefw.model.tape import READING, Op, Operands, Tape, TapeValue, with_tensors
from sparsefw.model.trace import Call, Step, Trace

# Names of functions that read only the shape, dtype and device of a tensor.
_OF_METADATA = {"zeros_like", "ones_like", "empty_like", "full_like"}
_OF_METADATA |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


class Tracer:
    """Traces a forward: `with Calls(tracer.record): ...`.

    Args:
        model: name of the model's class, for messages.
        arguments: tensors among the arguments of the forward.
        weights: weights of blocks by name; the forward must not change them.

    Attributes:
        names: names of the blocks that have been called so far, in the order of the calls.
        tape: all calls of torch functions.
        real: real tensors by their numbers in the trace. Once `real` is set, these tensors replace their stubs in all
            calls, and nothing is recorded any more.
    """

    def __init__(self, model: str, arguments: list[Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
        self._model, self.names, self.tape = model, list[str](), Tape(arguments)
        self.real: Mapping[int, Tensor] | None = None
        self._weights = {self.tape.value(x): name for name, x in (weights or {}).items()}
        # The numbers of followed values (outputs of blocks, and values computed from them).
        self._numbers: dict[TapeValue, int] = {}
        # The numbers and tensors of constants: all other values that are arguments of blocks and steps.
        self._constants: dict[TapeValue, tuple[int, Tensor]] = {}
        # Values that depend on the forward's arguments.
        self._batch_dependent: set[TapeValue] = set()
        self._calls: dict[int, Call] = {}
        # The steps since the last block.
        self._steps: list[Step] = []
        # The numbers that all steps so far have as operations on the tape.
        self._recorded: set[int] = set()
        # The reason to refuse the model, if the forward calls another block.
        self._refusal = ""
        # Maps the id of an argument of blocks (an object or a tensor) to the argument and its state in the call.
        self._given: dict[int, tuple[Any, Any]] = {}
        # Copies of objects, made when an object is first an argument of a block: blocks may change it.
        self._copies: Memo = {}

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call, and record it."""
        if (real := self.real) is not None and not self.tape.paused:
            args, kwargs = with_tensors(
                (args, kwargs), lambda x: real.get(self._numbers.get(self.tape.value(x), -1), x)
            )
            return func(*args, **kwargs)
        out, op, tensors = self.tape.call(func, args, kwargs)
        if op is None:
            return out
        for before, after in op.written:
            if before in self._weights:
                self._check_weight(op, before)
                self._weights[after] = self._weights[before]
        if any(value in self._numbers for value in op.inputs):
            self._follow(op, tensors)
        elif op.name not in _OF_METADATA and any(map(self._depends_on_batch, op.inputs)):
            self._batch_dependent.update(op.made)
        return out

    def _follow(self, op: Op, tensors: Operands) -> None:
        """Record a step: a call with followed values."""
        makers = {v.maker for v in op.inputs if v not in self._numbers and v.maker}
        # An in-place step can be replayed only if it writes to a single tensor, and returns this tensor.
        not_replayable = op.written and (len(op.written) > 1 or op.outputs != (op.written[0][1],))
        if not_replayable or makers & self._recorded:
            self._refusal = "a tensor that depends on its output is written to in place"
        elif op.outputs:
            self._recorded.add(op.number)
            outputs = [self._numbers.setdefault(value, len(self._numbers)) for value in op.outputs]
            args, kwargs = rebuilt((op.args, op.kwargs), lambda value: self._reference(value, tensors[value]))
            self._steps.append(Step(op.function, args, kwargs, outputs, in_place=bool(op.written)))
        elif op.name in READING:
            self._refusal = "the forward after this block branches on the values of its output"

    def _reference(self, value: TapeValue, x: Tensor) -> ValueRef | ConstantRef:
        """The reference that stands for a value; x is the value's tensor."""
        if value in self._numbers:
            return ValueRef(self._numbers[value])
        return ConstantRef(self._constants.setdefault(value, (len(self._constants), x))[0])

    def _of_tensor(self, x: Tensor) -> ValueRef | ConstantRef:
        return self._reference(self.tape.value(x), x)

    def _depends_on_batch(self, value: TapeValue) -> bool:
        return value.maker == 0 or value in self._batch_dependent

    def _check_weight(self, op: Op, weight: TapeValue) -> None:
        """Refuse a forward that changes a block's weight, since the block is pruned and written without this change."""
        # A call that leaves the values as they are, such as mul_(1), is allowed. A test on random values shows it.
        before = torch.rand(weight.shape, dtype=weight.dtype)
        after = before.clone()
        changes = any(value is not weight for value in op.inputs)
        if not changes:
            args, kwargs = rebuilt((op.args, op.kwargs), lambda x: after)
            op.function(*args, **kwargs)
        if changes or not torch.equal(before, after):
            raise InputError(
                f"{self._weights[weight]}: {UNSUPPORTED} {self._model}: its forward changes this weight of a block; "
                "prune a checkpoint whose config does not ask for this change"
            )

    def before_block(self, i: int, name: str, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """Record the arguments of block i, inside `tape.pause`.

        Raises:
            InputError: the steps since the block before cannot be replayed.
        """
        if self._refusal:
            raise InputError(f"{self.names[-1]}: {UNSUPPORTED} {self._model}: {self._refusal}")
        self.names.append(name)
        for x in (*objects_of((*args, *kwargs.values())), *tensors_of((hidden, args, kwargs))):
            self._given.setdefault(id(x), (x, _state(x)))
        self._check_unchanged()
        first = self._of_tensor(hidden)
        args, kwargs = rebuilt((args, kwargs), self._of_tensor, self._copies)
        self._calls[i] = Call(args, kwargs, self._steps, first)
        self._steps = []

    def after_block(self, i: int, output: Any) -> None:
        """Follow the stub for the output of block i. The block may have changed objects among its arguments."""
        for x in tensors_of(output):
            self._numbers.setdefault(self.tape.value(x), len(self._numbers))
        call = self._calls[i]
        call.returned = rebuilt(output, self._of_tensor)
        call.outputs = [reference.number for reference in leaves_of(call.returned)]
        self._given |= {key: (x, _state(x)) for key, (x, _) in self._given.items() if not isinstance(x, Tensor)}

    def summary(self) -> list[Any]:
        """All that the forward has done with its blocks' outputs so far, as a list that equals another run's."""
        return [
            *outline([self.names, self._calls, self._steps], lambda reference: reference),
            *(_digest(x) for _, x in self._constants.values()),
        ]

    def trace(self, end: set[int] | None = None) -> Trace:
        """The trace of the forward so far.

        Args:
            end: numbers of the tensors that the forward reads after the last block, without this block's hidden states;
                None: they are found in the trace, which goes to the end of the forward.
        """
        self._check_unchanged()
        end = self._find_end() if end is None else end
        first = next(iter(self._calls.values()))
        hidden, first.hidden = first.hidden, None
        live, objects = self._find_live(end), self._share_objects()
        constants = dict(self._constants.values())
        read = numbers_in([self._calls, objects], ConstantRef)
        read_after = numbers_in([(step.args, step.kwargs) for step in self._steps], ConstantRef)
        dependent = {n for value, (n, _) in self._constants.items() if self._depends_on_batch(value)}
        return Trace(
            self._calls,
            constants[hidden.number],
            live,
            constants={n: x for n, x in constants.items() if n in read},
            objects=objects,
            batch_dependent=read & dependent,
            end=end,
            batch_after=not read_after.isdisjoint(dependent),
        )

    def _find_end(self) -> set[int]:
        """Numbers of the tensors that the steps after the last block read, without this block's hidden states."""
        last = [*self._calls.values()][-1]
        end, made = set[int](), {*last.outputs[:1]}
        for step in self._steps:
            end |= step.reads - made
            made.update(step.outputs)
        return end

    def _share_objects(self) -> list[Any]:
        """Replace the objects that are arguments of several blocks by references; return these objects."""
        calls = self._calls.values()
        counts = Counter(id(x) for call in calls for x in objects_of((*call.args, *call.kwargs.values())))
        shared = {id(x): x for _, x in self._copies.values() if counts[id(x)] > 1}
        objects = [*shared.values()]
        if numbers_in(objects):
            raise InputError(
                f"{UNSUPPORTED} {self._model}: its forward puts a block's output into an object that several blocks get"
            )
        memo = {key: (x, ObjectRef(n)) for n, (key, x) in enumerate(shared.items())}
        for call in calls:
            call.args, call.kwargs = rebuilt((call.args, call.kwargs), lambda reference: reference, dict(memo))
        return objects

    def _check_unchanged(self) -> None:
        """Refuse a forward that changes a block's argument after the call: a replay would use the changed argument."""
        if changed := [type(x).__name__ for x, before in self._given.values() if _state(x) != before]:
            raise InputError(f"{UNSUPPORTED} {self._model}: its forward changes a {changed[0]} that a block was given")

    def _find_live(self, end: set[int]) -> dict[int, list[int]]:
        """Find the attribute `live` of a trace, and remove steps whose results no block and no later step reads."""
        live, needed = dict[int, list[int]](), set(end)
        following: Call | None = None
        for i, call in reversed(self._calls.items()):
            live[i] = sorted(needed)
            if following:
                needed |= numbers_in(following.hidden)
                steps, following.steps = following.steps, []
                for step in reversed(steps):
                    if needed.intersection(step.outputs):
                        following.steps.insert(0, step)
                        before = needed.difference(step.outputs) | step.reads
                        step.last = sorted(before.union(step.outputs) - needed)
                        needed = before
            needed = needed.difference(call.outputs) | numbers_in((call.args, call.kwargs))
            following = call
        return live


def _state(x: Any) -> Any:
    """The state of an object or a tensor. It is another one after a change."""
    return x._version if isinstance(x, Tensor) else outline(x)


def _digest(x: Tensor) -> str:
    """A digest of a tensor, for the comparison of two forwards."""
    if isinstance(x, nn.Parameter) and not x.is_inference():
        # A parameter is large, and the same object in both forwards.
        return f"{id(x)} {x._version}"
    data = b"" if x.is_meta else bytes_of(x)
    return f"{x.dtype} {tuple(x.shape)} {zlib.crc32(data)}"
