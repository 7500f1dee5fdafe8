"""What a run takes, from the shapes of a model alone: memory, flops, bytes, time."""

from sparsefw.estimate.describe import describe
from sparsefw.estimate.memory import Work, place

__all__ = [
    "Work",
    "describe",
    "place",
]
