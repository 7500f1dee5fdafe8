"""Runs to be estimated, of small models on a CPU."""

from sparsefw.estimate import Workload, describe
from sparsefw.estimate.workload import PlannedRun
from sparsefw.model import Placement
from sparsefw.solver import PruneConfig

BATCH, SEQLEN = 2, 16


def make_config(**options):
    """In plain torch and fp32, which count alike on every machine, and without a reconstruction."""
    return PruneConfig(**(dict(kernel="torch", precision="ieee", reconstruct=0) | options))


def planned(source, config, windows, evaluation=(), place="gpu", ranks=1):
    """The run of a checkpoint; products of vertices are counted."""
    described = describe(str(source))
    workload = Workload(windows, evaluation, SEQLEN, config, gpu=False, threads=1, ranks=ranks)
    shape = described.shape.selected(config.selects)
    return PlannedRun(shape, described.traits, workload, Placement(BATCH, place))
