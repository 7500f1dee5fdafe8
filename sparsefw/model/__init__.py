"""A model that is run one block at a time: its blocks, their prunable layers, and the hidden states between them."""

from sparsefw.model.activations import Placement
from sparsefw.model.block_model import resident
from sparsefw.model.forward import embed
from sparsefw.model.head import perplexity
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.streamed import StreamedModel

__all__ = ["HiddenStates", "Placement", "StreamedModel", "embed", "perplexity", "resident"]
