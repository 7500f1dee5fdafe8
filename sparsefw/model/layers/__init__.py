"""The prunable layers of a block: found where they are used, in stages, with Gram and cross matrices."""

from sparsefw.model.layers.capture import Captured, DenseOutputs, capture, dense_outputs
from sparsefw.model.layers.finding import Confirmed, Survey, stages, survey
from sparsefw.model.layers.in_turn import find_experts
from sparsefw.model.layers.measure import Pair, measure
from sparsefw.model.layers.names import Layer, experts_of, is_expert, kind_of, layer_of, not_pruned, slices_of
from sparsefw.model.layers.routers import ArbitraryChoices, find_no_layers
from sparsefw.model.layers.stage import UNKNOWN_ROLE, Role, Stage, first_segments, is_watched
from sparsefw.model.layers.watch import Selector, everything

__all__ = [
    "UNKNOWN_ROLE",
    "ArbitraryChoices",
    "Captured",
    "Confirmed",
    "DenseOutputs",
    "Layer",
    "Pair",
    "Role",
    "Selector",
    "Stage",
    "Survey",
    "capture",
    "dense_outputs",
    "everything",
    "experts_of",
    "find_experts",
    "find_no_layers",
    "first_segments",
    "is_expert",
    "is_watched",
    "kind_of",
    "layer_of",
    "measure",
    "not_pruned",
    "slices_of",
    "stages",
    "survey",
]
