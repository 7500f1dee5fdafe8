"""The prunable layers of a block: found where they are used, in stages, with Gram and cross matrices."""

from sparsefw.model.layers.capture import Captured, DenseOutputs, capture, dense_outputs
from sparsefw.model.layers.finding import Survey, dense_moves_early, find_layers, stages, survey
from sparsefw.model.layers.names import KEPT_DENSE, Layer, kind_of, not_pruned, slices_of
from sparsefw.model.layers.stage import Stage
from sparsefw.model.layers.watch import Selector, everything

__all__ = [
    "KEPT_DENSE",
    "Captured",
    "DenseOutputs",
    "Layer",
    "Selector",
    "Stage",
    "Survey",
    "capture",
    "dense_moves_early",
    "dense_outputs",
    "everything",
    "find_layers",
    "kind_of",
    "not_pruned",
    "slices_of",
    "stages",
    "survey",
]
