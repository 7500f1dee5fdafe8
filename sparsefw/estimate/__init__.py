"""Memory and disk of a run, from the shapes of a model alone, and the placement that fits."""

from sparsefw.estimate.describe import describe
from sparsefw.estimate.memory import MemoryNeeds, disk_space, memory_needs
from sparsefw.estimate.placement import memory_limits, place
from sparsefw.estimate.workload import Workload, pruned_shape

__all__ = [
    "MemoryNeeds",
    "Workload",
    "describe",
    "disk_space",
    "memory_limits",
    "memory_needs",
    "place",
    "pruned_shape",
]
