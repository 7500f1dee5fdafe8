"""Record what a model's own forward does with its blocks' outputs: which of them later blocks are given, and as what.

Stand-ins take the place of the blocks' outputs. A torch function mode follows them through the forward, so that nothing
that is made of them between two blocks is lost: the calls are recorded, and made again with the real outputs.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsefw.errors import InputError
from sparsefw.model.flow import Call, Recording, Step, name_of, numbers_in
from sparsefw.model.operands import tensors_in
from sparsefw.model.parts import DIFFERS, UNSUPPORTED
from sparsefw.model.values import Box, Constant, Value, leaves_of, objects_of, outline, rebuilt, tensors_of

# Functions whose results say what values a tensor has, by name. What a forward does next may depend on them.
_READING = {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "item", "tolist", "numpy"}
_READING |= {"equal", "allclose", "is_nonzero", "__array__", "__dlpack__"}

# Functions that take only the form of a tensor, by name.
_OF_FORM = {"zeros_like", "ones_like", "empty_like", "full_like"}
_OF_FORM |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"}


@dataclass
class _Known:
    """A tensor that is followed; held, so that no other one takes its id."""

    tensor: Tensor
    number: int


class Recorder(TorchFunctionMode):
    """Follows the outputs of blocks through a model's forward.

    Args:
        names: names of the blocks, for messages.
        model: name of the model's class, for messages.
        given: the tensors that the forward is given.
        weights: weights of the blocks, by their names.
    """

    def __init__(
        self, names: list[str], model: str, given: list[Tensor], weights: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self._names, self._model = names, model
        self._weights = {id(weight): (weight, name) for name, weight in (weights or {}).items()}
        self._known: dict[int, _Known] = {}
        # Tensors that are made of those that the forward is given, by their ids.
        self._of_batch: dict[int, weakref.ref[Tensor]] = {id(x): weakref.ref(x) for x in given}
        self._count = 0
        self._calls: dict[int, Call] = {}
        # The calls since the last block.
        self._steps: list[Step] = []
        # Why the model is refused if another block follows.
        self._refusal = ""
        # Objects that blocks are given, by their ids: the object, its outline, and how many blocks are given it.
        self._objects: dict[int, tuple[Any, list[Any], int]] = {}
        # The tensors that blocks are given, by their ids, and how often they had been written to.
        self._given: dict[int, tuple[Tensor, int]] = {}
        self._hidden: Tensor | None = None
        self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        operands = tensors_in((args, kwargs))
        weight = next((x for x in operands if id(x) in self._weights), None)
        if weight is not None:
            return self._of_weight(weight, func, args, kwargs)
        if not any(id(x) in self._known for x in operands):
            out = func(*args, **kwargs)
            if name_of(func) not in _OF_FORM and any(map(self._is_of_batch, operands)):
                self._of_batch |= {id(x): weakref.ref(x) for x in tensors_in(out)}
            return out
        versions = [x._version for x in operands]
        out = self._called(func, args, kwargs)
        written = [x for x, version in zip(operands, versions, strict=True) if x._version != version]
        if written and not (len(written) == 1 and written[0] is out and self._is_alone(out)):
            self._refusal = "what is made of its output is written to in place"
        elif written:
            self._changes(out, func, args, kwargs)
        elif made := tensors_in(out):
            self._steps.append(Step(func, args, kwargs, [self._follow(x) for x in made]))
        elif name_of(func) in _READING:
            self._refusal = "what follows it depends on the values that it returns"
        return out

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside the `with` block, calls are made as they are: something else than the model's forward runs."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def arrives(self, i: int, hidden: Tensor, args: tuple, kwargs: dict) -> None:
        """Record what block i is given.

        Raises:
            InputError: it is not its turn, or what was done with the output of the block before cannot be done again.
        """
        if self._refusal:
            raise InputError(f"{self._last()}: {UNSUPPORTED} {self._model}: {self._refusal}")
        if i != len(self._calls):
            raise InputError(DIFFERS)
        if not self._calls:
            self._hidden = hidden
        self._note_objects((*args, *kwargs.values()))
        self._given |= {id(x): (x, x._version) for x in tensors_of((hidden, args, kwargs)) if id(x) not in self._given}
        self._check_unchanged()
        self._calls[i] = Call(args, kwargs, self._steps, hidden if self._calls else None)
        self._steps = []

    def leaves(self, i: int, output: Any) -> None:
        """Follow what stands for the output of block i."""
        call = self._calls[i]
        call.form = rebuilt(output, lambda x: Value(self._follow(x)))
        call.outputs, call.after = [leaf.number for leaf in leaves_of(call.form)], self._count

    def recording(self, end: set[int] | None = None) -> Recording:
        """What was recorded.

        Args:
            end: numbers of the tensors that are read behind the last block, but for its hidden states; None: they are
                found, if the forward was recorded to its end.
        """
        assert self._hidden is not None
        self._check_unchanged()
        last = self._calls[len(self._calls) - 1]
        # Calls of followed tensors alone are recorded.
        of_batch_behind = any(map(self._is_of_batch, tensors_in([(step.args, step.kwargs) for step in self._steps])))
        if end is None:
            read = {number for step in self._steps for number in self._numbers((step.args, step.kwargs))}
            end = {number for number in read if number < last.after and number not in last.outputs[:1]}
        self._drop_unused_steps(end)
        constants: dict[int, tuple[int, Tensor]] = {}

        def leaf(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if known := self._find(x):
                return Value(known.number)
            return Constant(constants.setdefault(id(x), (len(constants), x))[0])

        shared = [known for known, _, count in self._objects.values() if count > 1]
        boxed = {id(known): (known, Box(n)) for n, known in enumerate(shared)}
        boxes = rebuilt(shared, leaf)
        if numbers_in(boxes):
            raise InputError(f"{UNSUPPORTED} {self._model}: its forward puts a block's output into an object of others")
        for call in self._calls.values():
            for step in call.steps:
                step.args, step.kwargs = rebuilt((step.args, step.kwargs), leaf)
            call.args, call.kwargs = rebuilt((call.args, call.kwargs), leaf, dict(boxed))
            call.hidden = leaf(call.hidden)
        of_batch = {number for number, x in constants.values() if self._is_of_batch(x)}
        tensors = [x for _, x in constants.values()]
        return Recording(self._hidden, self._calls, boxes, tensors, of_batch, end, of_batch_behind)

    def _follow(self, x: Tensor) -> int:
        """The number of a tensor, which is followed from now on."""
        if (known := self._find(x)) is None:
            known = self._known[id(x)] = _Known(x, self._count)
            self._count += 1
        return known.number

    def _find(self, x: Tensor) -> _Known | None:
        return self._known.get(id(x))

    def _is_alone(self, x: Tensor) -> bool:
        """Whether a tensor is followed, and no other followed one has its memory, nor one that a block is given."""
        others = [known.tensor for known in self._known.values()] + [given for given, _ in self._given.values()]
        place = x.untyped_storage().data_ptr()
        return self._find(x) is not None and not any(
            y is not x and y.untyped_storage().data_ptr() == place for y in others
        )

    def _changes(self, x: Tensor, func: Any, args: tuple, kwargs: dict) -> None:
        """Record a call that has written to a followed tensor, which has another number from now on."""
        before = self._known[id(x)].number
        for step in (*(step for call in self._calls.values() for step in call.steps), *self._steps):
            step.args, step.kwargs = rebuilt((step.args, step.kwargs), lambda y: Value(before) if y is x else y)
        args, kwargs = rebuilt((args, kwargs), lambda y: Value(before) if y is x else y)
        self._known[id(x)].number, self._count = self._count, self._count + 1
        self._steps.append(Step(func, args, kwargs, [self._known[id(x)].number], in_place=True))

    def _is_of_batch(self, x: Tensor) -> bool:
        known = self._of_batch.get(id(x))
        return known is not None and known() is x

    def _last(self) -> str:
        return self._names[len(self._calls) - 1]

    def _numbers(self, value: Any) -> set[int]:
        """Numbers of the followed tensors in a nested value."""
        return numbers_in(value) | {known.number for x in tensors_of(value) if (known := self._find(x))}

    def _called(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The result of a function of followed tensors."""
        return func(*args, **kwargs)

    def _of_weight(self, weight: Tensor, func: Any, args: tuple, kwargs: dict) -> Any:
        """Call a function of a block's weight, which has no data, and refuse one that changes it."""
        version = weight._version
        out = func(*args, **kwargs)
        if weight._version != version:
            # The blocks run and are written without this change. One that changes nothing, such as * 1, is no harm.
            before = torch.rand(weight.shape, dtype=weight.dtype)
            after = before.clone()
            others = [x for x in tensors_in((args, kwargs)) if x is not weight and x.is_meta]
            args, kwargs = rebuilt((args, kwargs), lambda x: after if x is weight else x)
            changes = bool(others)
            if not changes:
                func(*args, **kwargs)
                changes = not torch.equal(before, after)
            if changes:
                raise InputError(
                    f"{self._weights[id(weight)][1]}: {UNSUPPORTED} {self._model}: its forward changes this weight of "
                    "a block; prune a checkpoint whose config does not ask for it"
                )
        return out

    def _note_objects(self, given: Any) -> None:
        """Note the objects that a block is given."""
        for known in objects_of(given):
            _, before, count = self._objects.get(id(known), (known, outline(known), 0))
            self._objects[id(known)] = known, before, count + 1

    def _check_unchanged(self) -> None:
        """Raise if the forward has changed what it gave a block: the block would be given the changed one."""
        changed = [type(known).__name__ for known, before, _ in self._objects.values() if outline(known) != before]
        changed += [type(x).__name__ for x, version in self._given.values() if x._version != version]
        if changed:
            raise InputError(f"{UNSUPPORTED} {self._model}: its forward changes a {changed[0]} that a block was given")

    def _note_objects_anew(self) -> None:
        """Note what all objects are like now."""
        self._objects = {key: (known, outline(known), count) for key, (known, _, count) in self._objects.items()}

    def _drop_unused_steps(self, end: set[int]) -> None:
        """Leave only the steps that a block's input, or what lies behind the last block, depends on."""
        needed = set(end)
        for call in reversed(self._calls.values()):
            needed |= self._numbers((call.hidden, call.args, call.kwargs))
            kept = []
            for step in reversed(call.steps):
                if needed.intersection(step.outputs):
                    kept.append(step)
                    needed |= self._numbers((step.args, step.kwargs))
            call.steps = kept[::-1]


class Substitution(Recorder):
    """Puts real tensors in the places of those that are read behind the last block.

    Args:
        names, model, given: as for `Recorder`.
        real: the tensors by their numbers.

    Attributes:
        begun: whether the last block has been called.
    """

    def __init__(self, names: list[str], model: str, given: list[Tensor], real: dict[int, Tensor]) -> None:
        super().__init__(names, model, given)
        self._real, self.begun = real, False

    def _called(self, func: Any, args: tuple, kwargs: dict) -> Any:
        def leaf(x: Tensor) -> Tensor:
            known = self._find(x)
            return self._real.get(known.number, x) if known else x

        return func(*rebuilt(args, leaf), **rebuilt(kwargs, leaf)) if self.begun else func(*args, **kwargs)
