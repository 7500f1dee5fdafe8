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
from sparsefw.model.extents import Between, Extent
from sparsefw.model.hidden_states import HiddenStates, embed
from sparsefw.model.layers import (
    UNKNOWN_ROLE,
    ArbitraryChoices,
    Layer,
    Role,
    find_no_layers,
    kind_of,
    slices_of,
    survey,
)
from sparsefw.model.streamed import StreamedModel
from sparsefw.model.transformers_private import attention_implementation
from sparsefw.solver.selection import without_index

# Tokens that the blocks are run on: enough for every kind of attention, little beside a block.
TOKENS = 8
# Tokens of a second window, which shows what grows with the first.
MORE_TOKENS = 12


@dataclass(frozen=True)
class LayerShape:
    """A prunable matrix; in a mixture, the same matrix of all experts.

    Attributes:
        name: inside the block; without an expert's index.
        rows, d: shape of the matrix, (out, in).
        gram: name of its Gram matrix, see `layers.Layer`. The layers of one Gram matrix are a stage of the pruning.
        experts: number of these matrices, each with a Gram matrix of its own; 0 for a layer that is no expert.
        role: the layer's part in the block.
        parts: number of inputs that the block multiplies for every token. Where it multiplies with all experts in one
            call, whether pruned or not, each has one.
    """

    name: str
    rows: int
    d: int
    gram: str
    experts: int = 0
    role: Role = UNKNOWN_ROLE
    parts: int = 1


@dataclass(frozen=True)
class BlockShape:
    """A block.

    Attributes:
        nbytes: bytes of the parameters.
        layers: the layers that are pruned, in the order of use; `experts` counts the pruned ones only.
        all_layers: all layers that the windows run through, with those that stay dense. By default `layers`.
        attention: number of `all_layers` that are used before attention is.
        seen: names of all matrices that were seen in products, layers or not, without an expert's index.
    """

    nbytes: int
    layers: tuple[LayerShape, ...]
    all_layers: tuple[LayerShape, ...] = ()
    attention: int = 0
    seen: frozenset[str] = frozenset()

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
        between: what a window has between two blocks; None: hidden states of that width.
        by_window: whether logits are made of one window at a time, and not of a micro-batch.
        names_by_block: the name of each block, and the names of its layers inside the block, every expert by itself.
        pieces: bytes of the pieces in which all tensors outside of the blocks are written; by default `outside`.
        quantized: bytes of quantized tensors as they are stored, at most: those that are in memory at once beside what
            is made of them. 0 if the checkpoint is not quantized.
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
    between: Between | None = None
    by_window: bool = True
    pieces: tuple[int, ...] = ()
    quantized: int = 0
    stored: float = 1

    def __post_init__(self) -> None:
        if not self.pieces:
            object.__setattr__(self, "pieces", (self.outside,))

    def of_stream(self, tokens: int) -> list[int]:
        """Bytes of each tensor that a window of every stream has between two blocks, the hidden states first."""
        return self.between.of_stream(tokens) if self.between else [tokens * self.hidden * self.itemsize]

    def of_text(self, tokens: int) -> list[int]:
        """Bytes of each tensor that a window has between all blocks, and that all streams share."""
        return self.between.of_text(tokens) if self.between else []

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
        walks = [_Walk(model, TOKENS), _Walk(model, MORE_TOKENS)]
        states = walks[0].states
        known: dict[tuple, tuple[BlockShape, tuple[str, ...]]] = {}
        blocks = []
        for i, block in enumerate(model.blocks):
            prefix = f"{model.names[i]}."
            own = {name.removeprefix(prefix) for name in model.shared.names if name.startswith(prefix)}
            kind = tuple((name, parameter.shape, name in own) for name, parameter in block.named_parameters())
            if kind not in known or walks[0].moves:
                model.open(i, ahead=False)
                if kind not in known:
                    known[kind] = _find(states, i, own)
                for walk in walks:
                    walk.pass_block(i)
                model.close(i)
            blocks.append(known[kind])
    config = model.model.config.get_text_config()
    eager = attention_implementation(model.model) == "eager"
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
        quantized=model.quantized_bytes,
        stored=checkpoint.stored_nbytes / checkpoint.nbytes,
        between=_between(*walks),
        by_window=states.flow.by_window and states.hidden[0].shape[:2] == (1, TOKENS),
    )


class _Walk:
    """One window on its way through the blocks, as far as they hand something on.

    Args:
        model: the model.
        tokens: tokens of the window.

    Attributes:
        hidden: the input of the first block.
        most: what was handed on between two blocks, where it was most.
        moves: whether blocks may hand something on, so that every one of them has to be run.
    """

    def __init__(self, model: StreamedModel, tokens: int) -> None:
        self.tokens = tokens
        self.states = embed(model, torch.zeros(1, tokens, dtype=torch.int64), 1)
        self.hidden, self.most = self.states.hidden[0], list[Tensor]()
        self.moves = any(self.states.flow.live.values()) or bool(self.states.carried.held(0).boxes)

    def pass_block(self, i: int) -> None:
        """Run the window through block i, which is open."""
        if not self.moves:
            return
        # Zeros may become NaN, which says nothing of the model.
        self.states.leave(i, 0, self.states.output(i, 0))
        self.states.unchecked = None
        tensors = self.states.carried.tensors()
        if sum(x.nbytes for x in tensors) > sum(x.nbytes for x in self.most):
            self.most = tensors
        self.states.carried.settle()


def _between(few: _Walk, more: _Walk) -> Between:
    """What lies between two blocks, from windows of two lengths."""

    def extents(of_few: list[Tensor], of_more: list[Tensor]) -> tuple[Extent, ...]:
        pairs = zip(of_few, of_more, strict=True)
        return tuple(Extent.of(a, b, few.tokens, more.tokens) for a, b in pairs)

    (hidden,) = extents([few.hidden], [more.hidden])
    before = extents(few.states.constants.made_of_tokens(), more.states.constants.made_of_tokens())
    return Between(hidden, extents(few.most, more.most), before)


def _find(states: HiddenStates, i: int, shared: set[str]) -> tuple[BlockShape, tuple[str, ...]]:
    """The shape of block i, and the names of its layers, every expert by itself.

    Args:
        states: one micro-batch before the block.
        i: number of the block.
        shared: names of matrices inside the block that are others' as well.
    """
    block, inputs = states.model.blocks[i], states.inputs(i, 0)
    run = partial(states.call, i, 0, inputs=inputs)
    parameters = dict(block.named_parameters())
    look = partial(survey, block, run, states.hidden[0], handed_on=partial(states.handed_on, i, inputs))
    with ArbitraryChoices():
        no_layers = shared | find_no_layers(block, partial(run, states.hidden[0]))
        surveyed = look(lambda name: name not in no_layers)
        if uneven := _cut_unevenly(surveyed.layers):
            no_layers |= uneven
            surveyed = look(lambda name: name not in no_layers)
    layers: dict[str, LayerShape] = {}
    for layer in surveyed.layers:
        rows, d = layer.weight.shape
        parameter = parameters[without_index(layer.name)]
        count = parameter.numel() // (rows * d)
        shape = LayerShape(
            name=kind_of(layer.name),
            rows=rows,
            d=d,
            gram=kind_of(layer.gram),
            experts=count if layer.name not in parameters else 0,
            role=surveyed.roles[layer.name],
            parts=count if layer.at_once else 1,
        )
        layers.setdefault(shape.name, shape)
    if not layers:
        raise InputError(f"{states.model.names[i]}: unsupported model: no matrix of this block was seen in a product")
    nbytes, shapes = sum(p.nbytes for p in parameters.values()), tuple(layers.values())
    names = tuple(name for name in _names_of_layers(block, layers) if name not in no_layers)
    seen = frozenset(map(kind_of, (*surveyed.roles, *surveyed.ignored)))
    return BlockShape(nbytes, shapes, attention=surveyed.attention, seen=seen), names


def _cut_unevenly(layers: list[Layer]) -> set[str]:
    """Names of layers that are slices of one parameter, of different sizes: an index does not tell which."""
    sizes: dict[str, set[int]] = {}
    for layer in layers:
        sizes.setdefault(without_index(layer.name), set()).add(layer.weight.numel())
    return {layer.name for layer in layers if len(sizes[without_index(layer.name)]) > 1}


def _names_of_layers(block: nn.Module, kinds: dict[str, LayerShape]) -> tuple[str, ...]:
    """Names of all layers of these kinds, with the experts that no token has reached."""
    by_kind: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name, parameter in block.named_parameters():
        stacked = kinds.get(kind_of(f"{name}[0]"))
        for layer in slices_of(name, parameter, stacked.rows * stacked.d if stacked else None) or [name]:
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
