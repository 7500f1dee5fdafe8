"""The shapes of a model's layers, without its weights.

One block of each kind is run on a few tokens, so that layers are found as the pruning finds them, whatever the
architecture. All its weights are zero, and take no memory: pages that nobody has written to are all the same page.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sparsefw.checkpoint.source import Checkpoint
from sparsefw.checkpoint.tensors import TensorInfo
from sparsefw.errors import InputError
from sparsefw.model.hidden_states import HiddenStates, embed
from sparsefw.model.layers import UNKNOWN_ROLE, Role, kind_of, slices_of, survey
from sparsefw.model.streamed import StreamedModel
from sparsefw.model.transformers_private import attention_implementation

# Tokens that the blocks are run on: enough for every kind of attention, little beside a block.
TOKENS = 8


@dataclass(frozen=True)
class LayerShape:
    """A prunable matrix; in a mixture, the same matrix of all experts.

    Attributes:
        name: inside the block; without an expert's index.
        rows, d: shape of the matrix, (out, in).
        gram: name of its Gram matrix, see `layers.Layer`. The layers of one Gram matrix are a stage of the pruning.
        experts: number of these matrices, each with a Gram matrix of its own; 0 for a layer that is no expert.
        role: the layer's part in the block.
    """

    name: str
    rows: int
    d: int
    gram: str
    experts: int = 0
    role: Role = UNKNOWN_ROLE


@dataclass(frozen=True)
class BlockShape:
    """A block.

    Attributes:
        nbytes: bytes of the parameters.
        layers: the layers that are pruned, in the order of use; `experts` counts the pruned ones only.
        all_layers: all layers that the windows run through, with those that stay dense. By default `layers`.
        attention: number of `all_layers` that are used before attention is.
    """

    nbytes: int
    layers: tuple[LayerShape, ...]
    all_layers: tuple[LayerShape, ...] = ()
    attention: int = 0

    def __post_init__(self) -> None:
        if not self.all_layers:
            object.__setattr__(self, "all_layers", self.layers)


@dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        blocks: in their order.
        outside: bytes of the parameters outside of the blocks that are loaded.
        hidden: width of the residual stream.
        vocabulary: entries of a logit vector.
        heads: attention heads, if attention holds all scores at once; else 0.
        itemsize: bytes of an entry of an activation.
        parameters: number of parameters.
        names_by_block: the name of each block, and the names of its layers inside the block, every expert by itself.
        pieces: bytes of the pieces in which all tensors outside of the blocks are written; by default `outside`.
        quantized: bytes of the quantized tensors of a block as they are stored, at most. They are in memory beside the
            block while it is loaded; 0 if the checkpoint is not quantized.
        stored: bytes of the checkpoint for each byte of the parameters.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    hidden: int
    vocabulary: int
    heads: int
    itemsize: int
    parameters: int
    names_by_block: tuple[tuple[str, tuple[str, ...]], ...] = ()
    pieces: tuple[int, ...] = ()
    quantized: int = 0
    stored: float = 1

    def __post_init__(self) -> None:
        if not self.pieces:
            object.__setattr__(self, "pieces", (self.outside,))

    @property
    def layer_names(self) -> list[str]:
        """Full names of all prunable layers, as a run reports them."""
        return [f"{block}.{layer}" for block, layers in self.names_by_block for layer in layers]

    def selected(self, selects: Callable[[str], bool]) -> "ModelShape":
        """The same model with fewer layers; blocks stay even if they have none.

        Args:
            selects: called with the full name of a layer; each expert has a name of its own.
        """
        names = tuple(
            (block, tuple(layer for layer in layers if selects(f"{block}.{layer}")))
            for block, layers in self.names_by_block
        )
        blocks = tuple(
            _with_layers(shape, Counter(kind_of(layer) for layer in layers))
            for shape, (_, layers) in zip(self.blocks, names, strict=True)
        )
        return replace(self, blocks=blocks, names_by_block=names)


def zeros(tensors: dict[str, TensorInfo], pin: bool = False) -> dict[str, Tensor]:
    """Stands for `checkpoint.read_tensors`: tensors of zeros that take no memory as long as they are only read."""
    return {
        name: torch.from_numpy(np.zeros(info.nbytes, np.uint8)).view(info.dtype).view(info.shape)
        for name, info in tensors.items()
    }


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """The shape of a checkpoint's model; its tensors are not read.

    Raises:
        InputError: as `StreamedModel`.
    """
    with StreamedModel(checkpoint, torch.device("cpu"), zeros) as model:
        # Each tied parameter is counted once.
        count = sum(parameter.numel() for parameter in model.model.parameters())
        states = embed(model, torch.zeros(1, TOKENS, dtype=torch.int64), 1)
        known: dict[tuple, tuple[BlockShape, tuple[str, ...]]] = {}
        blocks = []
        for i, block in enumerate(model.blocks):
            kind = tuple((name, parameter.shape) for name, parameter in block.named_parameters())
            if kind not in known:
                model.open(i, ahead=False)
                known[kind] = _shape_of_block(states, i)
                model.close(i)
            blocks.append(known[kind])
    config = model.model.config.get_text_config()
    eager = attention_implementation(model.model) == "eager"
    share = checkpoint.quantization.share(checkpoint.dtype) if checkpoint.quantization else 0
    return ModelShape(
        blocks=tuple(shape for shape, _ in blocks),
        outside=model.outside_bytes,
        hidden=states.hidden[0].shape[-1],
        vocabulary=config.vocab_size,
        heads=getattr(config, "num_attention_heads", 0) if eager else 0,
        itemsize=checkpoint.dtype.itemsize,
        parameters=count,
        names_by_block=tuple((name, layers) for name, (_, layers) in zip(model.names, blocks, strict=True)),
        pieces=tuple(sum(checkpoint.tensors[name].nbytes for name in piece) for piece in model.pieces),
        quantized=int(share * max(shape.nbytes for shape, _ in blocks)) if share else 0,
        stored=checkpoint.stored_nbytes / checkpoint.nbytes,
    )


def _shape_of_block(states: HiddenStates, i: int) -> tuple[BlockShape, tuple[str, ...]]:
    """The shape of block i, and the names of its layers, every expert by itself."""
    block = states.model.blocks[i]
    parameters = dict(block.named_parameters())
    surveyed = survey(block, partial(states.call, i, 0), states.hidden[0], arguments=states.calls[0][i])
    layers: dict[str, LayerShape] = {}
    for layer in surveyed.layers:
        rows, d = layer.weight.shape
        stacked, _, index = layer.name.partition("[")
        name = kind_of(layer.name)
        shape = LayerShape(
            name=name,
            rows=rows,
            d=d,
            gram=kind_of(layer.gram),
            experts=len(parameters[stacked]) if index else 0,
            role=surveyed.roles[layer.name],
        )
        layers.setdefault(name, shape)
    if not layers:
        raise InputError(f"{states.model.names[i]}: unsupported model: no matrix of this block was seen in a product")
    nbytes, shapes = sum(p.nbytes for p in parameters.values()), tuple(layers.values())
    return BlockShape(nbytes, shapes, attention=surveyed.attention), _names_of_layers(block, layers)


def _names_of_layers(block: nn.Module, kinds: dict[str, LayerShape]) -> tuple[str, ...]:
    """Names of all layers of these kinds, with the experts that no token has reached."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name, parameter in block.named_parameters():
        for layer in slices_of(name, parameter) or [name]:
            if kind_of(layer) in by_kind:
                by_kind[kind_of(layer)].append(layer)
    return tuple(layer for layers in by_kind.values() for layer in layers)


def _with_layers(shape: BlockShape, counts: Counter[str]) -> BlockShape:
    """The shape of a block with `counts` matrices of each kind left to prune."""
    layers = tuple(
        replace(layer, experts=counts[layer.name] if layer.experts else 0)
        for layer in shape.layers
        if counts[layer.name]
    )
    return replace(shape, layers=layers)
