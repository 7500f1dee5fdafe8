"""A model that is run one block at a time: its blocks, their prunable layers, and the hidden states between them."""

from sparsefw.model.head import logits, loss, perplexity
from sparsefw.model.hidden_states import HiddenStates, embed
from sparsefw.model.placement import Placement
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape, shape_of
from sparsefw.model.streamed import StreamedModel

__all__ = [
    "BlockShape",
    "HiddenStates",
    "LayerShape",
    "ModelShape",
    "Placement",
    "StreamedModel",
    "embed",
    "logits",
    "loss",
    "perplexity",
    "shape_of",
]
