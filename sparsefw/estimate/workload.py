"""The input of an estimate: a model, the work of a run on it, and the placement."""

from dataclasses import dataclass

from sparsefw.flags import set_field
from sparsefw.model.shapes import ModelShape
from sparsefw.ranks import shares
from sparsefw.solver import PruneConfig, patterns
from sparsefw.solver.selection import check_used

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
        config: how the model is pruned. Defaults that depend on the calibration become those of this one, for good:
            `replace` with other windows or ranks keeps them.
        gpu: whether the model is pruned on a GPU.
        threads: threads of torch, if the model is pruned on a CPU.
        process: bytes of host memory that the process has before the run begins, with the tokens of all windows.
        peak: the most that it has had until then, while texts were read; 0: not known.
        held: bytes of the GPU that the process has taken before the run begins: a model in memory may be there.
        ranks: processes that share the work; process, held and peak are those of one of them.
        machines: machines that the ranks are on, as many on each.
    """

    windows: int
    evaluation: tuple[int, ...]
    seqlen: int
    config: PruneConfig
    gpu: bool
    threads: int
    process: int = PROCESS
    held: int = 0
    peak: int = 0
    ranks: int = 1
    machines: int = 1

    def __post_init__(self) -> None:
        set_field(self, "config", self.config.for_calibration(self.windows, self.seqlen, self.ranks))

    @property
    def windows_of_rank(self) -> int:
        """The most calibration windows that one rank has."""
        return largest_share(self.windows, self.ranks)

    @property
    def evaluation_of_rank(self) -> tuple[int, ...]:
        """The most windows of each evaluation text that one rank has."""
        return tuple(largest_share(windows, self.ranks) for windows in self.evaluation)

    @property
    def ranks_here(self) -> int:
        """The ranks on a machine, which share its memory and its disk."""
        return self.ranks // self.machines


def largest_share(total: int, ranks: int, unit: int = 1) -> int:
    """The most of things in a row that one rank has, see `ranks.shares`."""
    return max(share.stop - share.start for share in shares(total, ranks, unit))
