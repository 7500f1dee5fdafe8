"""The prunable layers of a block: found where they are used, in stages, with Gram and cross matrices."""

from sparsefw.model.layers.block_tape import record_block
from sparsefw.model.layers.experts import experts_of, without_parts_in_turn
from sparsefw.model.layers.measure import Captured, Pair, capture, dense_outputs, measure
from sparsefw.model.layers.names import Layer, is_expert, kind_of, layer_of, not_pruned, slices_of
from sparsefw.model.layers.routers import choose_all_over, find_no_layers
from sparsefw.model.layers.stage import UNKNOWN_ROLE, Role, Stage, Write, is_watched
from sparsefw.model.layers.survey import Confirmed, Survey, confirm, stages, survey, survey_tape

__all__ = ["UNKNOWN_ROLE", "Captured", "Confirmed", "Layer", "Pair", "Role", "Stage", "Survey", "Write", "capture"]
__all__ += ["choose_all_over", "confirm", "dense_outputs", "experts_of", "find_no_layers"]
__all__ += ["is_expert", "is_watched", "kind_of", "layer_of", "measure", "not_pruned", "record_block", "slices_of"]
__all__ += ["stages", "survey", "survey_tape", "without_parts_in_turn"]
