"""The record of a finished block. It is on the disk with the block, so that a run that goes on can report it."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparsefw.checkpoint.files import convert
from sparsefw.report import BlockRecord, Reconstruction
from sparsefw.solver import LayerResult


@dataclass(frozen=True)
class FinishedBlock:
    """A block that was pruned by every method.

    Attributes:
        block: its name, seconds and memory.
        layers: a result for each layer and method.
        kept_dense: names of the matrices that the method whose weights are written left dense.
    """

    block: BlockRecord
    layers: list[LayerResult] = field(default_factory=list)
    kept_dense: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, i: int, name: str) -> "FinishedBlock":
        """Block i before it is pruned."""
        return cls(BlockRecord(i, name, "", {}, 0, 0))

    def with_kept_dense(self, names: list[str]) -> "FinishedBlock":
        """A copy that names the matrices that were left dense."""
        return replace(self, kept_dense=names)

    def with_way(self, way: str) -> "FinishedBlock":
        """A copy that says how the calibration windows ran through the block."""
        return replace(self, block=replace(self.block, way=way))

    def with_reconstruction(self, found: Reconstruction) -> "FinishedBlock":
        """A copy that says how the block's weights were fitted together."""
        return replace(self, block=replace(self.block, reconstruction=found))

    def measured(self, seconds: dict[str, float], peaks: dict[str, Any], sent: dict[str, int]) -> "FinishedBlock":
        """A copy with the block's seconds by phase, the peak memory of `memory.peak_memory`, and the bytes sent."""
        return replace(self, block=replace(self.block, seconds=seconds, sent=sent, **peaks))

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values, for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any) -> "FinishedBlock":
        """The record of the values from `to_json`.

        Raises:
            InputError: the values are none.
        """
        return convert(cls, record, "the record of a finished block: ")
