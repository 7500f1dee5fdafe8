"""A model that is run one block at a time: its blocks, their prunable layers, and the hidden states between them."""

from sparsefw.model.block_model import BlockModel
from sparsefw.model.forward import embed, embed_batches
from sparsefw.model.head import check_losses, logits, loss, perplexity
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.placement import Placement
from sparsefw.model.resident import ResidentModel, resident
from sparsefw.model.shape_of import shape_of, shape_of_resident, shape_of_text
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.model.skeleton import max_seqlen, read_config
from sparsefw.model.streamed import StreamedModel

__all__ = [
    "BlockModel",
    "BlockShape",
    "HiddenStates",
    "LayerShape",
    "ModelShape",
    "Placement",
    "ResidentModel",
    "StreamedModel",
    "check_losses",
    "embed",
    "embed_batches",
    "logits",
    "loss",
    "max_seqlen",
    "perplexity",
    "read_config",
    "resident",
    "shape_of",
    "shape_of_resident",
    "shape_of_text",
]
