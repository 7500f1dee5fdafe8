"""Stages: the layers that are pruned together, and how far through the block a stage has to be watched."""

from dataclasses import dataclass

from sparsefw.model.layers.names import kind_of


@dataclass(frozen=True)
class Stage:
    """Layers that read one input. They are pruned before the inputs of later layers are measured.

    The same layers of all experts are one stage, too.

    Attributes:
        key: name of their Gram matrix, without an expert's index.
        last: name of the layer that a micro-batch uses last; None for experts, where any may be the last.
        final: whether no stage follows. Its micro-batches run through to the end of the block.
        moves: whether the dense model's micro-batches run through to the end of the block in this stage, and move on to
            the next block. That is the final stage, or the one before it if the outputs of the final stage's layers are
            the block's. Then the final stage compares with the dense block's output, which is there already.
    """

    key: str
    last: str | None
    final: bool = False
    moves: bool = False


class StageIsOver(Exception):
    """Ends a block's forward after the layers of a stage."""


class Progress:
    """How far a micro-batch has come on its way through a stage.

    Args:
        stage: None watches the whole block.
        run_on: after the stage, let the micro-batch run on unwatched instead of ending its forward.

    Attributes:
        over: whether the rest of the block goes unwatched.
    """

    def __init__(self, stage: Stage | None, run_on: bool) -> None:
        self._stage, self._run_on = stage, run_on
        self.restart()

    def restart(self) -> None:
        """Begin with another micro-batch."""
        self._complete = self.over = False

    def includes(self, layer: str, *, input_known: bool) -> bool:
        """Whether a layer belongs to the stage; asked before the layer is used.

        Args:
            layer: its name inside the block.
            input_known: whether a layer of the stage has read the same input before.

        Raises:
            StageIsOver: the stage is complete, and this layer reads another input.
        """
        if self._stage is None or input_known or self._stage.key == kind_of(layer):
            return True
        if self._complete and not self._stage.final:
            if not self._run_on:
                raise StageIsOver
            self.over = True
        return False

    def passed(self, layer: str) -> None:
        """Note that a layer of the stage is being used."""
        self._complete = self._complete or (self._stage is not None and self._stage.last == layer)
