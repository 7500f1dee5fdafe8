"""A model that is run one block at a time: its blocks, their prunable layers, and its hidden states."""

from sparsefw.model.placement import Placement
from sparsefw.model.shapes import shape_of
from sparsefw.model.streamed import StreamedModel

__all__ = [
    "Placement",
    "StreamedModel",
    "shape_of",
]
