"""The prunable layers of a block: found where they are used, in stages, with Gram and cross matrices."""

from sparsefw.model.layers.block_tape import BlockTape, record_block
from sparsefw.model.layers.capture import Captured, DenseOutputs, capture, dense_outputs
from sparsefw.model.layers.experts import experts_of, without_parts_in_turn
from sparsefw.model.layers.finding import Confirmed, Survey, confirm, stages, survey, survey_tape
from sparsefw.model.layers.measure import Pair, measure
from sparsefw.model.layers.names import Layer, is_expert, kind_of, layer_of, not_pruned, slices_of
from sparsefw.model.layers.routers import choose_all_over, find_no_layers
from sparsefw.model.layers.stage import UNKNOWN_ROLE, Role, Stage, first_segments, is_watched
from sparsefw.model.layers.watch import Selector, everything

__all__ = [
    "UNKNOWN_ROLE",
    "BlockTape",
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
    "choose_all_over",
    "confirm",
    "dense_outputs",
    "everything",
    "experts_of",
    "find_no_layers",
    "first_segments",
    "is_expert",
    "is_watched",
    "kind_of",
    "layer_of",
    "measure",
    "not_pruned",
    "record_block",
    "slices_of",
    "stages",
    "survey",
    "survey_tape",
    "without_parts_in_turn",
]
