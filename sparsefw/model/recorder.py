"""Record what a model's own forward does with its blocks' outputs: which of them later blocks are given, and as what.

Stand-ins take the place of the blocks' outputs. The calls that are made of them between two blocks are recorded, so
that they can be made again with the real outputs.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.model import tape
from sparsefw.model.parts import UNSUPPORTED
from sparsefw.model.recording import (
    Box,
    Call,
    Constant,
    Memo,
    Recording,
    Step,
    Value,
    leaves_of,
    numbers_in,
    objects_of,
    outline,
    rebuilt,
    tensors_of,
)
from sparsefw.model.tape import Op, Tape, tensors_in, with_tensors

# Functions whose results say what values a tensor has, by name. What a forward does next may depend on them.
_READING = {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "item", "tolist", "numpy"}
_READING |= {"equal", "allclose", "is_nonzero", "__array__", "__dlpack__"}

# Functions that take only the form of a tensor, by name.
_OF_FORM = {"zeros_like", "ones_like", "empty_like", "full_like"}
_OF_FORM |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}

# Functions that ask a tensor for its form alone. Who asks for the device needs the tensor there.
_FORM = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad", "is_meta")}
_FORM |= {Tensor.size, Tensor.dim, Tensor.numel}


class Recorder:
    """Follows the outputs of blocks through a model's forward: `with Calls(recorder.record): ...`.

    Args:
        model: name of the model's class, for messages.
        given: the tensors that the forward is given.
        blocks: the blocks, by their names.
        real: tensors that take the places of followed ones, by their numbers, once `begun` is true.
        watched: names of tensors, by their ids; None: nothing is watched, and no trace is kept.

    Attributes:
        names: names of the blocks that have been called, in this order.
        tape: all calls.
        begun: whether the last block has been called.
        read: names of the watched tensors that a function reads, the blocks' own calls included.
        trace: outlines of what each block is given, and of the calls with what blocks return. They are equal to those
            of another forward that does the same.
    """

    def __init__(
        self,
        model: str,
        given: list[Tensor],
        blocks: Mapping[str, nn.Module],
        real: Mapping[int, Tensor] | None = None,
        watched: Mapping[int, str] | None = None,
    ) -> None:
        self._model, self._real, self.begun, self.names = model, real or {}, False, list[str]()
        self._watched, self.read = watched or {}, set[str]()
        self.trace: list[list[Any]] | None = None if watched is None else []
        self.tape = Tape(given)
        self._weights = {
            self.tape.value(x): f"{name}.{inner}"
            for name, block in blocks.items()
            for inner, x in block.named_parameters()
        }
        # The numbers of followed values, and the tensors that calls with them are given beside them.
        self._numbers: dict[tape.Value, int] = {}
        self._others: dict[tape.Value, Tensor] = {}
        # Values that are made of what the forward is given.
        self._of_batch: set[tape.Value] = set()
        self._calls: dict[int, Call] = {}
        # The calls since the last block, and their numbers on the tape.
        self._steps: list[Step] = []
        self._recorded: set[int] = set()
        # Why the model is refused if another block follows.
        self._refusal = ""
        # Objects that blocks are given, by their ids: the object, its outline, and how many blocks are given it.
        self._objects: dict[int, tuple[Any, list[Any], int]] = {}
        # The tensors that blocks are given, by their ids, and how often they had been written to.
        self._given: dict[int, tuple[Tensor, int]] = {}
        # An object counts as it is when a block is given it first: blocks may change it.
        self._met: Memo = {}

    def record(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Make a call, and record it."""
        if self._watched and func not in _FORM:
            self.read |= {self._watched[id(x)] for x in tensors_in((args, kwargs)) if id(x) in self._watched}
        if self.begun and not self.tape.paused:
            # Real tensors take the places of what is read behind the last block.
            numbers, real = self._numbers, self._real
            args, kwargs = with_tensors((args, kwargs), lambda x: real.get(numbers.get(self.tape.value(x), -1), x))
            return func(*args, **kwargs)
        count = len(self.tape.ops)
        out = self.tape.record(func, args, kwargs)
        if len(self.tape.ops) == count:
            return out
        op = self.tape.ops[-1]
        for before, after in op.written:
            if before in self._weights:
                self._check_weight(op, before)
                self._weights[after] = self._weights[before]
        if any(value in self._numbers for value in op.inputs):
            tensors = tensors_in((args, kwargs))
            self._others |= {v: x for v, x in zip(op.inputs, tensors, strict=True) if v not in self._numbers}
            self._follow(op)
        elif op.name not in _OF_FORM and any(v.maker == 0 or v in self._of_batch for v in op.inputs):
            self._of_batch.update(op.made)
        return out

    def _follow(self, op: Op) -> None:
        """Note a call with followed values."""
        makers = {v.maker for v in op.inputs if v not in self._numbers and v.maker}
        # Such a step writes to one tensor, and returns it.
        other = op.written and (len(op.written) > 1 or op.outputs != (op.written[0][1],))
        if other or makers & self._recorded:
            self._refusal = "what is made of its output is written to in place"
        elif op.outputs:
            self._recorded.add(op.number)
            numbers = [self._numbers.setdefault(value, len(self._numbers)) for value in op.outputs]
            args, kwargs = rebuilt((op.args, op.kwargs), self._leaf)
            self._steps.append(Step(op.function, args, kwargs, numbers, in_place=bool(op.written)))
            self._keep(self._steps[-1])
        elif op.name in _READING:
            self._refusal = "what follows it depends on the values that it returns"

    def _leaf(self, x: Any) -> Any:
        """What stands for a tensor in a recorded call, if it is followed."""
        value = self.tape.value(x) if isinstance(x, Tensor) else x
        return Value(self._numbers[value]) if value in self._numbers else x

    def _check_weight(self, op: Op, weight: tape.Value) -> None:
        """Refuse a forward that changes a block's weight: the blocks run and are written without this change."""
        # One that changes nothing, such as * 1, is no harm.
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

    def arrives(self, i: int, name: str, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """Record what block i, of this name, is given, inside `tape.pause`.

        Raises:
            InputError: what was done with the output of the block before cannot be done again.
        """
        if self._refusal:
            raise InputError(f"{self.names[-1]}: {UNSUPPORTED} {self._model}: {self._refusal}")
        self.names.append(name)
        for known in objects_of((*args, *kwargs.values())):
            _, before, count = self._objects.get(id(known), (known, outline(known), 0))
            self._objects[id(known)] = known, before, count + 1
        self._given |= {id(x): (x, x._version) for x in tensors_of((hidden, args, kwargs)) if id(x) not in self._given}
        self._check_unchanged()
        self._keep(name, hidden, args, kwargs)
        self._calls[i] = Call(args, kwargs, self._steps, hidden)
        self._steps = []

    def leaves(self, i: int, output: Any) -> None:
        """Follow what stands for the output of block i, which may have changed the objects that it was given."""
        call = self._calls[i]
        for x in tensors_of(output):
            self._numbers.setdefault(self.tape.value(x), len(self._numbers))
        call.form = rebuilt(output, self._leaf)
        call.outputs, call.after = [leaf.number for leaf in leaves_of(call.form)], len(self._numbers)
        self._objects = {key: (known, outline(known), count) for key, (known, _, count) in self._objects.items()}

    def recording(self, end: set[int] | None = None) -> Recording:
        """What was recorded.

        Args:
            end: numbers of the tensors that are read behind the last block, but for its hidden states; None: they are
                found, if the forward was recorded to its end.
        """
        self._check_unchanged()
        last = self._calls[len(self._calls) - 1]
        behind = leaves_of([(step.args, step.kwargs) for step in self._steps])
        if end is None:
            end = {number for number in numbers_in(behind) - {*last.outputs[:1]} if number < last.after}
        constants: dict[tape.Value, tuple[int, Tensor]] = {}

        def leaf(x: Any) -> Any:
            if isinstance(followed := self._leaf(x), Value):
                return followed
            value, tensor = (self.tape.value(x), x) if isinstance(x, Tensor) else (x, self._others[x])
            return Constant(constants.setdefault(value, (len(constants), tensor))[0])

        hidden, self._calls[0].hidden = self._calls[0].hidden, None
        for call in self._calls.values():
            call.hidden = rebuilt(call.hidden, leaf)
        live = self._live(end)
        shared = [known for known, _, count in self._objects.values() if count > 1]
        boxed = {id(known): (known, Box(n)) for n, known in enumerate(shared)}
        boxes = rebuilt(shared, leaf)
        if numbers_in(boxes):
            raise InputError(f"{UNSUPPORTED} {self._model}: its forward puts a block's output into an object of others")
        for call in self._calls.values():
            for step in call.steps:
                step.args, step.kwargs = rebuilt((step.args, step.kwargs), leaf)
            call.args, call.kwargs = rebuilt((call.args, call.kwargs), leaf, dict(boxed))
        return Recording(
            self._calls,
            hidden,
            live,
            constants=[x for _, x in constants.values()],
            boxes=boxes,
            of_batch={n for value, (n, _) in constants.items() if self._is_of_batch(value)},
            end=end,
            batch_behind=any(self._is_of_batch(x) for x in behind if isinstance(x, tape.Value)),
        )

    def _is_of_batch(self, value: tape.Value) -> bool:
        return value.maker == 0 or value in self._of_batch

    def _check_unchanged(self) -> None:
        """Raise if the forward has changed what it gave a block: the block would be given the changed one."""
        changed = [type(known).__name__ for known, before, _ in self._objects.values() if outline(known) != before]
        changed += [type(x).__name__ for x, version in self._given.values() if x._version != version]
        if changed:
            raise InputError(f"{UNSUPPORTED} {self._model}: its forward changes a {changed[0]} that a block was given")

    def _live(self, end: set[int]) -> dict[int, list[int]]:
        """As of `Recording`. Leaves only the steps that a block, or what lies behind the last one, depends on."""
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
                        needed = needed.difference(step.outputs) | numbers_in((step.args, step.kwargs))
            needed = needed.difference(call.outputs) | numbers_in(rebuilt((call.args, call.kwargs), self._leaf))
            following = call
        return live

    def _keep(self, *what: Any) -> None:
        if self.trace is not None:
            self.trace.append(outline(rebuilt(what, self._digest, self._met)))

    def _digest(self, x: Any) -> str:
        if isinstance(followed := self._leaf(x), Value):
            return f"value {followed.number}"
        x = self._others.get(x, x)
        if isinstance(x, nn.Parameter) and not x.is_inference():
            # Large, and the same one in both forwards.
            return f"{id(x)} {x._version}"
        data = b"" if x.is_meta else x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return f"{x.dtype} {tuple(x.shape)} {zlib.crc32(data)}"
