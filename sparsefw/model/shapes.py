"""The shapes of a model's layers, without its weights.

One block of each kind is run on a few tokens with weights of zero, which take no memory: pages that nobody has written
to are all the same page. So layers are found as the pruning finds them, whatever the architecture.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sparsefw.checkpoint.source import Checkpoint, TensorInfo
from sparsefw.errors import InputError
from sparsefw.model.layers import found, kind_of, stages
from sparsefw.model.streamed import StreamedModel

# Enough for every kind of attention, little beside a block.
TOKENS = 8


@dataclass(frozen=True)
class LayerShape:
    """A prunable matrix, or as many alike as a mixture has experts.

    Attributes:
        name: inside the block.
        rows, d: its shape, (out, in).
        gram: name of the layer whose Gram matrix it shares. The layers of one are a stage of the pruning.
        experts: how many of them there are, each with a Gram matrix of its own; 0 for a layer that is no expert.
    """

    name: str
    rows: int
    d: int
    gram: str
    experts: int = 0


@dataclass(frozen=True)
class BlockShape:
    """A block.

    Attributes:
        nbytes: of its parameters.
        layers: in the order of use.
        ahead: whether the dense model's windows move on one stage before the last, see `layers.Stage`.
    """

    nbytes: int
    layers: tuple[LayerShape, ...]
    ahead: bool = False


@dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        blocks: in their order.
        outside: bytes of the parameters outside of the blocks.
        hidden: width of the residual stream.
        vocabulary: entries of a logit vector.
        heads: of attention, where its scores are held whole; else 0.
        itemsize: bytes of an activation.
        parameters: in all.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    hidden: int
    vocabulary: int
    heads: int
    itemsize: int
    parameters: int


def zeros(tensors: dict[str, TensorInfo], pin: bool = False) -> dict[str, Tensor]:
    """Tensors of zeros that take no memory as long as they are only read; as `reader.read_tensors` gives them."""
    return {
        name: torch.from_numpy(np.zeros(info.nbytes, np.uint8)).view(info.dtype).view(info.shape)
        for name, info in tensors.items()
    }


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """The shape of a checkpoint's model; of its files nothing is read.

    Raises:
        InputError: as `StreamedModel`.
    """
    model = StreamedModel(checkpoint, torch.device("cpu"), zeros)
    # Tied ones once.
    parameters = list(model.model.parameters())
    stream = model.start(torch.zeros(1, TOKENS, dtype=torch.int64), 1)
    hidden = stream.hidden[0].shape[-1]
    known: dict[tuple, BlockShape] = {}
    blocks = []
    for i, block in enumerate(model.blocks):
        kind = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
        if kind not in known:
            model.open(i, ahead=False)
            known[kind] = _block(model, i, stream)
            model.close(i)
        blocks.append(known[kind])
    config = model.model.config.get_text_config()
    eager = model.model.config._attn_implementation == "eager"
    inside = sum(block.nbytes for block in blocks)
    return ModelShape(
        blocks=tuple(blocks),
        outside=sum(p.nbytes for p in parameters) - inside,
        hidden=hidden,
        vocabulary=config.vocab_size,
        heads=getattr(config, "num_attention_heads", 0) if eager else 0,
        itemsize=checkpoint.dtype.itemsize,
        parameters=sum(p.numel() for p in parameters),
    )


def _block(model: StreamedModel, i: int, stream) -> BlockShape:
    block, run = model.blocks[i], partial(model.output, i, stream, 0)
    parameters = dict(block.named_parameters())
    layers: dict[str, LayerShape] = {}
    for layer in found(block, run):
        whole, _, slice_of = layer.name.partition("[")
        experts = len(parameters[whole]) if slice_of else 0
        name = kind_of(layer.name)
        gram = kind_of(layer.gram)
        layers.setdefault(name, LayerShape(name, *layer.weight.shape, gram, experts))
    if not layers:
        raise InputError(f"{model.names[i]}: unsupported model: no matrix of this block was seen in a product")
    ahead = not stages(block, run)[-1].moves
    return BlockShape(sum(p.nbytes for p in parameters.values()), tuple(layers.values()), ahead)
