"""Trace a model's forward: follow the outputs of its blocks to later blocks.

Stubs take the place of the blocks' outputs. The calls of torch functions with them are recorded, so that they can be
made again with the real outputs.
"""

import zlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
from sparsefw.model.tape import READING, Op, Tape, TapeValue, with_tensors
from sparsefw.model.trace import Call, Step, Trace

# Names of functions that read no more of a tensor than its form.
_OF_FORM = {"zeros_like", "ones_like", "empty_like", "full_like"}
_OF_FORM |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


class Tracer:
    """Traces a forward: `with Calls(tracer.record): ...`.

    Args:
        model: name of the model's class, for messages.
        arguments: tensors among the arguments of the forward.
        weights: weights of blocks by name, which the forward must not change.

    Attributes:
        names: names of the blocks that have been called, in this order.
        tape: all calls.
        real: tensors by their numbers. Once they are there, nothing is recorded, and they replace the stubs in all
            calls.
    """

    def __init__(self, model: str, arguments: list[Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
        self._model, self.names, self.tape = model, list[str](), Tape(arguments)
        self.real: Mapping[int, Tensor] | None = None
        self._weights = {self.tape.value(x): name for name, x in (weights or {}).items()}
        # The values that are followed, and the constants that blocks and steps are given, with their numbers.
        self._numbers: dict[TapeValue, int] = {}
        self._constants: dict[TapeValue, tuple[int, Tensor]] = {}
        # Values that are made of the forward's arguments.
        self._batch_dependent: set[TapeValue] = set()
        self._calls: dict[int, Call] = {}
        # The calls since the last block, and the numbers of all such calls on the tape.
        self._steps: list[Step] = []
        self._recorded: set[int] = set()
        # Why the model is refused if another block follows.
        self._refusal = ""
        # By id: the objects and tensors that blocks are given, with their state then.
        self._given: dict[int, tuple[Any, Any]] = {}
        # An object is copied when a block is given it first: blocks may change it.
        self._copies: Memo = {}

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call, and record it."""
        if (real := self.real) is not None and not self.tape.paused:
            args, kwargs = with_tensors(
                (args, kwargs), lambda x: real.get(self._numbers.get(self.tape.value(x), -1), x)
            )
            return func(*args, **kwargs)
        out, op, operands = self.tape.call(func, args, kwargs)
        if op is None:
            return out
        for before, after in op.written:
            if before in self._weights:
                self._check_weight(op, before)
                self._weights[after] = self._weights[before]
        if any(value in self._numbers for value in op.inputs):
            self._follow(op, dict(zip(op.inputs, operands, strict=True)))
        elif op.name not in _OF_FORM and any(map(self._depends_on_batch, op.inputs)):
            self._batch_dependent.update(op.made)
        return out

    def _follow(self, op: Op, tensors: dict[TapeValue, Tensor]) -> None:
        """Record a step: a call with followed values."""
        makers = {v.maker for v in op.inputs if v not in self._numbers and v.maker}
        # A step that writes to one tensor, and returns it, can be made again.
        other = op.written and (len(op.written) > 1 or op.outputs != (op.written[0][1],))
        if other or makers & self._recorded:
            self._refusal = "what is made of its output is written to in place"
        elif op.outputs:
            self._recorded.add(op.number)
            outputs = [self._numbers.setdefault(value, len(self._numbers)) for value in op.outputs]
            args, kwargs = rebuilt((op.args, op.kwargs), lambda value: self._reference(value, tensors[value]))
            self._steps.append(Step(op.function, args, kwargs, outputs, in_place=bool(op.written)))
        elif op.name in READING:
            self._refusal = "what follows it depends on the values that it returns"

    def _reference(self, value: TapeValue, x: Tensor) -> ValueRef | ConstantRef:
        """The reference of a value, whose tensor is x."""
        if value in self._numbers:
            return ValueRef(self._numbers[value])
        return ConstantRef(self._constants.setdefault(value, (len(self._constants), x))[0])

    def _of_tensor(self, x: Tensor) -> ValueRef | ConstantRef:
        return self._reference(self.tape.value(x), x)

    def _depends_on_batch(self, value: TapeValue) -> bool:
        return value.maker == 0 or value in self._batch_dependent

    def _check_weight(self, op: Op, weight: TapeValue) -> None:
        """Refuse a forward that changes a block's weight: the blocks run and are written without this change."""
        # A call that changes nothing, such as * 1, is no harm.
        before = torch.rand(weight.shape, dtype=weight.dtype)
        after = before.clone()
        changes = any(value is not weight for value in op.inputs)
        if not changes:
            args, kwargs = rebuilt((op.args, op.kwargs), lambda x: after)
            op.function(*args, **kwargs)
        if changes or not torch.equal(before, after):
            raise InputError(
                f"{self._weights[weight]}: {UNSUPPORTED} {self._model}: its forward changes this weight of a block; "
                "prune a checkpoint whose config does not ask for it"
            )

    def before_block(self, i: int, name: str, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """Record the arguments of block i, inside `tape.pause`.

        Raises:
            InputError: the steps since the block before cannot be made again.
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
        """Follow the stub for the output of block i, which may have changed objects among its arguments."""
        for x in tensors_of(output):
            self._numbers.setdefault(self.tape.value(x), len(self._numbers))
        call = self._calls[i]
        call.form = rebuilt(output, self._of_tensor)
        call.outputs = [reference.number for reference in leaves_of(call.form)]
        self._given |= {key: (x, _state(x)) for key, (x, _) in self._given.items() if not isinstance(x, Tensor)}

    def summary(self) -> list[Any]:
        """A comparable form of all that the forward has done with its blocks' outputs so far."""
        return [
            *outline([self.names, self._calls, self._steps], lambda reference: reference),
            *(_digest(x) for _, x in self._constants.values()),
        ]

    def trace(self, end: set[int] | None = None) -> Trace:
        """The trace of the forward so far.

        Args:
            end: numbers of the tensors that are read after the last block, besides its hidden states; None: the forward
                was recorded to its end, and shows them.
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
        """Numbers of the tensors that the steps after the last block read, besides its hidden states."""
        last = [*self._calls.values()][-1]
        end, made = set[int](), {*last.outputs[:1]}
        for step in self._steps:
            end |= step.reads - made
            made.update(step.outputs)
        return end

    def _share_objects(self) -> list[Any]:
        """Put references in place of the objects that several blocks are given; returns the objects."""
        calls = self._calls.values()
        counts = Counter(id(x) for call in calls for x in objects_of((*call.args, *call.kwargs.values())))
        shared = {id(x): x for _, x in self._copies.values() if counts[id(x)] > 1}
        objects = [*shared.values()]
        if numbers_in(objects):
            raise InputError(f"{UNSUPPORTED} {self._model}: its forward puts a block's output into an object of others")
        memo = {key: (x, ObjectRef(n)) for n, (key, x) in enumerate(shared.items())}
        for call in calls:
            call.args, call.kwargs = rebuilt((call.args, call.kwargs), lambda reference: reference, dict(memo))
        return objects

    def _check_unchanged(self) -> None:
        """Refuse a forward that changes an argument of a block later: the block would be given the changed one."""
        if changed := [type(x).__name__ for x, before in self._given.values() if _state(x) != before]:
            raise InputError(f"{UNSUPPORTED} {self._model}: its forward changes a {changed[0]} that a block was given")

    def _find_live(self, end: set[int]) -> dict[int, list[int]]:
        """The `live` of a trace. Removes steps that no block and nothing after the last one depends on."""
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
    """The state of an object or a tensor, which differs after a change."""
    return x._version if isinstance(x, Tensor) else outline(x)


def _digest(x: Tensor) -> str:
    """A digest of a tensor, by which it is compared with that of another forward."""
    if isinstance(x, nn.Parameter) and not x.is_inference():
        # It is large, and the same one in both forwards.
        return f"{id(x)} {x._version}"
    data = b"" if x.is_meta else x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{x.dtype} {tuple(x.shape)} {zlib.crc32(data)}"
