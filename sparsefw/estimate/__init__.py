"""Memory, flops, bytes and time of a run, from the shapes of a model alone."""

from sparsefw.estimate.describe import describe
from sparsefw.estimate.limits import first_that_fits, memory_limits
from sparsefw.estimate.memory import MemoryNeeds, disk_space, memory_needs
from sparsefw.estimate.placing import place
from sparsefw.estimate.workload import Workload, pruned_shape

__all__ = [
    "MemoryNeeds",
    "Workload",
    "describe",
    "disk_space",
    "first_that_fits",
    "memory_limits",
    "memory_needs",
    "place",
    "pruned_shape",
]
