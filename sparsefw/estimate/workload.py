"""Describe the work of a run: the layers that it prunes, its windows, and the memory that its process has already."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsefw.data.text import takes_library
from sparsefw.data.windows import window_bytes
from sparsefw.estimate.shapes import ModelShape
from sparsefw.inputs import Inputs
from sparsefw.selection import check_used
from sparsefw.solver import patterns
from sparsefw.solver.config import PruneConfig

# Bytes of a Python process with torch and transformers loaded and a text tokenized, as measured; those that a plan has
# not taken yet; and those of the libraries that read a text of the Hub or of parquet.
PROCESS, BEYOND_PLAN, READERS = 500 * 2**20, 64 * 2**20, 100 * 2**20


@dataclass(frozen=True)
class Workload:
    """The work of a run.

    Attributes:
        windows: number of calibration windows; of several ranks, the most that one has.
        evaluation: the same of each evaluation text.
        seqlen: tokens in a window.
        config: how the model is pruned, resolved for the calibration, see `PruneConfig.for_calibration`.
        gpu: whether the model is pruned on a GPU.
        process: bytes of host memory that the process has before the run begins, with the tokens of all windows.
        held: bytes of the GPU that the process has taken before the run begins: a model in memory may be there.
        ranks: processes that share the work; process and held are those of one of them.
        ranks_here: those of them that share the memory of a machine.
        written: windows that the dense model writes at once, where it writes its own calibration text; else 0.
    """

    windows: int
    evaluation: tuple[int, ...]
    seqlen: int
    config: PruneConfig
    gpu: bool
    process: int = PROCESS
    held: int = 0
    ranks: int = 1
    ranks_here: int = 1
    generated: int = 0

    @property
    def most_windows(self) -> int:
        """Return the number of windows of the longest text."""
        return max(self.windows, *self.evaluation, 0)


def process_bytes(inputs: Inputs, evaluation: Sequence[int], seqlen: int, taken: int) -> int:
    """Count the bytes of a run's process before its first block, with all windows: the same in the plan as in the run.

    Args:
        inputs: names of what the run reads.
        evaluation: number of windows of each evaluation text.
        seqlen: tokens in a window.
        taken: bytes that this process takes now. Libraries that load later are added to them.
    """
    readers = READERS * any(map(takes_library, (*inputs.shares, *inputs.evaluate)))
    return max(PROCESS, taken + BEYOND_PLAN) + readers + window_bytes(inputs.nsamples, evaluation, seqlen)


def pruned_shape(whole: ModelShape, config: PruneConfig) -> ModelShape:
    """Return the shape of a model with the layers that a run prunes.

    A layer that does not fit the pattern is found here: one of a late block would end the run after hours.

    Args:
        whole: the shape with all prunable layers.
        config: selects the layers.

    Raises:
        InputError: as `check_used`; or the rows of a layer do not divide into the pattern's groups.
    """
    check_used(whole.layer_names, config.include, config.ignore, whole.modules)
    shape = whole.selected(config.selects)
    for block, (name, _) in zip(shape.blocks, shape.names_by_block, strict=True):
        for layer in block.layers:
            patterns.check_width(config.pattern, layer.d, f"{name}.{layer.name}")
    return shape
