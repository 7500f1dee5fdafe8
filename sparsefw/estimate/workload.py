"""The input of an estimate: a model, and the work of a run on it."""

from collections.abc import Iterable
from dataclasses import dataclass

from sparsefw.model.shapes import LayerShape, ModelShape
from sparsefw.ranks import shares
from sparsefw.solver import patterns
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.patterns import check_used

# Bytes of a Python process with torch and transformers loaded and a text tokenized, as measured.
PROCESS = 570 * 2**20


def pruned_shape(whole: ModelShape, config: PruneConfig) -> ModelShape:
    """The shape of a model with the layers that a run prunes.

    A layer that does not fit the pattern is found here: one of a late block would end the run after hours.

    Args:
        whole: the same with all prunable layers.
        config: selects the layers.

    Raises:
        InputError: as `check_used`; or the rows of a layer do not divide into the pattern's groups.
    """
    check_used(whole.layer_names, config.include, config.ignore)
    shape = whole.selected(config.selects)
    for name, d in shape.widths:
        patterns.check_width(config.pattern, d, name)
    return shape


@dataclass(frozen=True)
class Workload:
    """The work of a run.

    Attributes:
        windows: number of calibration windows.
        evaluation: number of windows of each evaluation text.
        seqlen: tokens in a window.
        config: how the model is pruned, resolved for the calibration, see `PruneConfig.for_calibration`.
        gpu: whether the model is pruned on a GPU.
        threads: threads of torch, if the model is pruned on a CPU.
        process: bytes of host memory that the process has before the run begins, with the tokens of all windows.
        held: bytes of the GPU that the process has taken before the run begins: a model in memory may be there.
        ranks: processes that share the work; process and held are those of one of them.
        ranks_here: those of them that share the memory of a machine.
    """

    windows: int
    evaluation: tuple[int, ...]
    seqlen: int
    config: PruneConfig
    gpu: bool
    threads: int
    process: int = PROCESS
    held: int = 0
    ranks: int = 1
    ranks_here: int = 1

    @property
    def windows_of_rank(self) -> int:
        """The most calibration windows that one rank has."""
        return largest_share(self.windows, self.ranks)

    @property
    def evaluation_of_rank(self) -> tuple[int, ...]:
        """The most windows of each evaluation text that one rank has."""
        return tuple(largest_share(windows, self.ranks) for windows in self.evaluation)


def largest_share(total: int, ranks: int, unit: int = 1) -> int:
    """The most of things in a row that one rank has, see `ranks.shares`."""
    return max(share.stop - share.start for share in shares(total, ranks, unit))


def stages(layers: Iterable[LayerShape]) -> list[list[LayerShape]]:
    """The layers by stage, in the order of use: layers that read one input, whatever is used between them."""
    by_gram: dict[str, list[LayerShape]] = {}
    for layer in layers:
        by_gram.setdefault(layer.gram, []).append(layer)
    return list(by_gram.values())
