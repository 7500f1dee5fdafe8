"""Describe the work of a run: the layers to prune, the windows, and the memory that the process takes already."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsefw.data.text import takes_library
from sparsefw.data.windows import window_bytes
from sparsefw.estimate.shapes import ModelShape
from sparsefw.inputs import Inputs
from sparsefw.selection import check_used
from sparsefw.solver import patterns
from sparsefw.solver.config import PruneConfig

# Measured bytes of host memory. PROCESS: Python with torch and transformers after tokenizing a text. READERS: the
# libraries that read texts from the Hub or from parquet.
PROCESS, READERS = 500 * 2**20, 100 * 2**20


@dataclass(frozen=True)
class Workload:
    """The work of a run.

    Attributes:
        windows: number of calibration windows; with several ranks, of the rank that has most.
        evaluation: number of windows of each evaluation text, counted in the same way.
        seqlen: tokens in a window.
        config: how the model is pruned, resolved for the calibration, see `PruneConfig.for_calibration`.
        gpu: whether the model is pruned on a GPU.
        process: bytes of host memory of a rank before the first block, including the tokens of all windows.
        held: bytes of GPU memory of a rank before the first block, such as a caller's model.
        ranks: number of processes that share the work.
        ranks_here: number of ranks on one machine, which share its memory.
        generated: batch size in windows if the dense model generates its calibration text; else 0.
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
    """Count the bytes of a run's process before the first block, with all windows. Plan and run get about the same.

    Args:
        inputs: names the texts that the run reads.
        evaluation: number of windows of each evaluation text.
        seqlen: tokens in a window.
        taken: bytes that this process takes now.
    """
    readers = READERS * any(map(takes_library, (*inputs.shares, *inputs.evaluate)))
    return max(PROCESS, taken) + readers + window_bytes(inputs.nsamples, evaluation, seqlen)


def pruned_shape(whole: ModelShape, config: PruneConfig) -> ModelShape:
    """Return the shape of a model with the layers that a run prunes.

    A layer that does not fit the pattern is refused here. If it were found in its block, the run might end after hours.

    Args:
        whole: the shape with all prunable layers.
        config: selects the layers.

    Raises:
        InputError: as for `check_used`; or the rows of a layer do not divide into the pattern's groups.
    """
    check_used(whole.layer_names, config.include, config.ignore, whole.modules)
    shape = whole.selected(config.selects)
    for block, (name, _) in zip(shape.blocks, shape.names_by_block, strict=True):
        for layer in block.layers:
            patterns.check_width(config.pattern, layer.d, f"{name}.{layer.name}")
    return shape
