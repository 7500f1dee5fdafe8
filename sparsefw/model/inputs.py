"""What one micro-batch gives a block beside the hidden states, and what the block makes of it."""

from typing import Any

from torch import Tensor, nn

from sparsefw.model.carried import Carried, Constants, Held, Stored
from sparsefw.model.flow import Call, Step
from sparsefw.model.values import Box, Constant, Value, leaves_of, rebuilt, tensors_of


class BlockInputs:
    """The arguments of a block for one micro-batch. Every run begins with the objects as they were before the block.

    Args:
        j: number of the micro-batch.
        call: what the model's forward gives the block.
        constants: the tensors from before the first block.
        carried: the tensors and objects from the blocks before.

    Attributes:
        known: what stands for the tensors that are stored already, by their ids.
    """

    def __init__(self, j: int, call: Call, constants: Constants, carried: Carried) -> None:
        self._j, self._call, self._constants, self._carried = j, call, constants, carried
        self._tensors: dict[Constant, Tensor] = {}
        self.known: dict[int, Constant] = {}
        held = carried.held(j)
        self._values = {n: self.tensor(x) for n, x in held.values.items()}
        self._given = rebuilt((held.boxes, call.args, call.kwargs), self.tensor)
        self._boxes: list[Any] = []

    def tensor(self, leaf: Any) -> Any:
        """The tensor that something stands for."""
        if isinstance(leaf, Value):
            return self._values[leaf.number]
        if not isinstance(leaf, Constant):
            return leaf
        if leaf not in self._tensors:
            if isinstance(leaf, Stored):
                tensor = self._carried.tensor(self._j, leaf)
            else:
                tensor = self._constants[self._j, leaf.number]
            self._tensors[leaf] = tensor
            self.known[id(tensor)] = leaf
        return self._tensors[leaf]

    def run(self, block: nn.Module, hidden: Tensor) -> Any:
        """Run the block, or another module in its place. No torch function is called but by the block."""
        boxes, args, kwargs = rebuilt(self._given, lambda leaf: leaf)
        args, kwargs = rebuilt((args, kwargs), lambda leaf: boxes[leaf.number] if isinstance(leaf, Box) else leaf)
        self._boxes = boxes
        return block(hidden, *args, **kwargs)

    def versions(self) -> list[int]:
        """How often each of the given tensors has been written to."""
        return [x._version for x in tensors_of(self._given)]

    def handed_on(self, returned: Any, live: list[int]) -> Held:
        """What later blocks are given after the last run.

        Args:
            returned: what the block has returned.
            live: numbers of the tensors that are needed.
        """
        outputs = dict(zip(self._call.outputs, leaves_of(returned), strict=False))
        values = self._values | outputs
        return Held({number: values[number] for number in live if number in values}, self._boxes)

    def made_by(self, steps: list[Step], values: dict[int, Tensor]) -> dict[int, Tensor]:
        """The tensors by their numbers, with those that steps between this block and the next make of them."""
        values = dict(values)

        def leaf(x: Any) -> Tensor:
            return values[x.number] if isinstance(x, Value) else self.tensor(x)

        for step in steps:
            values |= step.run(leaf)
        return values
