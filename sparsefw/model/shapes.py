"""Shapes of a model, its blocks and its layers: all that an estimate needs to know of it, found before it is pruned.

One block of each kind is run on a few tokens, so that layers are found as the pruning finds them, whatever the
architecture. All its weights are zero, and take no memory: pages that nobody has written to are all the same page.
A model in memory runs on one of its batches, with its own weights.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.checkpoint.source import Checkpoint
from sparsefw.checkpoint.tensors import TensorInfo
from sparsefw.data.batches import Batch
from sparsefw.errors import InputError
from sparsefw.model.block_model import BlockModel, ResidentModel
from sparsefw.model.experts import choose_all_over, experts_of, find_no_layers, without_parts_in_turn
from sparsefw.model.forward import embed, embed_batches
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.layers import Layer, Role, is_expert, kind_of, record_block, slices_of
from sparsefw.model.live_bytes import ForwardBytes, count_forward
from sparsefw.model.parts import INPUT
from sparsefw.model.skeleton import attention_implementation
from sparsefw.model.stages import confirm, survey_tape
from sparsefw.model.streamed import StreamedModel
from sparsefw.model.tape import Calls
from sparsefw.solver.patterns import without_index

# Tokens that the blocks are run on: enough for every kind of attention, little beside a block.
TOKENS = 8
# Tokens of a second window, which shows what grows with the first.
MORE_TOKENS = 12


@dataclass(frozen=True)
class Extent:
    """The size of a tensor that belongs to one window.

    Attributes:
        sizes: by dimension, its size without tokens, and what each token adds.
        itemsize: bytes of an entry.
    """

    sizes: tuple[tuple[float, float], ...]
    itemsize: int

    @classmethod
    def of(cls, few: Tensor, more: Tensor, few_tokens: int, more_tokens: int) -> "Extent":
        """The extent of a tensor, from windows of two lengths."""
        slopes = [(b - a) / (more_tokens - few_tokens) for a, b in zip(few.shape, more.shape, strict=True)]
        sizes = [(a - slope * few_tokens, slope) for a, slope in zip(few.shape, slopes, strict=True)]
        return cls(tuple(sizes), few.element_size())

    def nbytes(self, tokens: int) -> int:
        """Bytes of the tensor for a window of this many tokens."""
        return math.ceil(math.prod(max(0.0, size + slope * tokens) for size, slope in self.sizes)) * self.itemsize


@dataclass(frozen=True)
class Between:
    """What a window has between two blocks.

    Attributes:
        hidden: the hidden states.
        handed_on: what blocks hand on beside them, where it is most.
        before: what the model's forward makes of the tokens before its first block, for later ones.
    """

    hidden: Extent
    handed_on: tuple[Extent, ...] = ()
    before: tuple[Extent, ...] = ()

    def of_stream(self, tokens: int) -> list[int]:
        """Bytes of each tensor that a window of every stream has, the hidden states first."""
        return [extent.nbytes(tokens) for extent in (self.hidden, *self.handed_on)]

    def of_text(self, tokens: int) -> list[int]:
        """Bytes of each tensor that a window has, and that all streams share."""
        return [extent.nbytes(tokens) for extent in self.before]


@dataclass(frozen=True)
class LayerShape:
    """A prunable matrix; in a mixture, the same matrix of all experts.

    Attributes:
        name: inside the block; without an expert's index.
        rows, d: shape of the matrix, (out, in).
        gram: name of its Gram matrix, see `Layer`. The layers of one Gram matrix are a stage of the pruning.
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
    role: Role = field(default_factory=Role)
    parts: int = 1


@dataclass(frozen=True)
class BlockShape:
    """A block.

    Attributes:
        nbytes: bytes of the parameters.
        layers: the layers that are pruned, in the order of use; `experts` counts the pruned ones only.
        all_layers: all layers that the windows run through, with those that stay dense.
        seen: names of all matrices that were seen in products, layers or not, without an expert's index.
        predicts: whether next tokens are predicted from what it puts out: the last block of a language model.
        experts: names of modules that may be experts, see `experts_of`.
        forward: bytes that its forward takes.
    """

    nbytes: int
    layers: tuple[LayerShape, ...]
    all_layers: tuple[LayerShape, ...]
    seen: frozenset[str] = frozenset()
    predicts: bool = False
    experts: frozenset[str] = frozenset()
    forward: ForwardBytes = field(default_factory=ForwardBytes)


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
        logits_itemsize: bytes of an entry of the logits, which some heads return in fp32.
        parameters: number of parameters.
        pieces: bytes of the pieces in which all tensors outside of the blocks are written.
        between: what a window has between two blocks.
        by_window: whether logits are made of one window at a time, and not of a micro-batch.
        names_by_block: the name of each block, and the names of its layers inside the block, every expert by itself.
        quantized: bytes of tensors as they are stored, at most: those that are in memory at once beside what is made of
            them. 0 if they are used as they are.
        joined: bytes of the largest parameter that is made of several tensors of the checkpoint, such as one of stacked
            experts. Both are in memory until it is made.
        written: bytes that are written for each byte of a block's parameters in memory.
    """

    blocks: tuple[BlockShape, ...]
    outside: int
    hidden: int
    vocabulary: int
    heads: int
    itemsize: int
    logits_itemsize: int
    parameters: int
    pieces: tuple[int, ...]
    between: Between
    names_by_block: tuple[tuple[str, tuple[str, ...]], ...] = ()
    by_window: bool = True
    quantized: int = 0
    joined: int = 0
    written: float = 1

    def __post_init__(self) -> None:
        *blocks, last = self.blocks
        last = replace(last, predicts=self.by_window and self.vocabulary > 0)
        object.__setattr__(self, "blocks", (*blocks, last))

    @property
    def loading(self) -> int:
        """Bytes in memory beside a block while it is loaded. Tensors are dequantized before they are joined."""
        return max(self.quantized, self.joined)

    @property
    def layer_names(self) -> list[str]:
        """Full names of all prunable layers, as a run reports them."""
        return [f"{block}.{layer}" for block, layers in self.names_by_block for layer in layers]

    @property
    def widths(self) -> Iterator[tuple[str, int]]:
        """Full name and number of inputs of every layer that is pruned."""
        for shape, (block, layers) in zip(self.blocks, self.names_by_block, strict=True):
            widths = {layer.name: layer.d for layer in shape.layers}
            for layer in layers:
                yield f"{block}.{layer}", widths[kind_of(layer, shape.experts)]

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
            _with_layers(shape, Counter(kind_of(layer, shape.experts) for layer in layers))
            for shape, (_, layers) in zip(self.blocks, names, strict=True)
        )
        return replace(self, blocks=blocks, names_by_block=names)


def _with_layers(shape: BlockShape, counts: Counter[str]) -> BlockShape:
    """The shape of a block with `counts` matrices of each kind left to prune."""
    layers = tuple(
        replace(layer, experts=counts[layer.name] if layer.experts else 0)
        for layer in shape.layers
        if counts[layer.name]
    )
    return replace(shape, layers=layers)


def zeros(tensors: dict[str, TensorInfo], pin: bool = False) -> dict[str, Tensor]:
    """Stands for `checkpoint.read_tensors`: tensors of zeros that take no memory as long as they are only read."""
    return {
        name: torch.from_numpy(np.zeros(info.nbytes, np.uint8)).view(info.dtype).view(info.shape)
        for name, info in tensors.items()
    }


def shape_of(checkpoint: Checkpoint, in_fp32: bool = False) -> ModelShape:
    """The shape of a checkpoint's model; its tensors are not read. `in_fp32` is as for `BlockModel`.

    Raises:
        InputError: as `StreamedModel`.
    """
    with StreamedModel(checkpoint, torch.device("cpu"), zeros, in_fp32) as model:
        shape, config = shape_of_text(model), model.config
    return replace(
        shape,
        vocabulary=config.get_text_config().vocab_size,
        itemsize=4 if in_fp32 else checkpoint.dtype.itemsize,
        pieces=tuple(sum(checkpoint.tensors[name].nbytes for name in piece) for piece in model.pieces),
    )


def shape_of_text(model: BlockModel) -> ModelShape:
    """The shape of a model that reads text.

    Raises:
        InputError: a block has no layers, or what it hands on cannot be followed.
    """
    windows = (torch.zeros(1, tokens, dtype=torch.int64) for tokens in (TOKENS, MORE_TOKENS))
    walks = [_Walk(embed(model, ids, 1)) for ids in windows]
    shape = _shape_of(
        model,
        walks,
        # Without logits nothing is predicted.
        vocabulary=(model.vocabulary or 0) if model.logits_itemsize else 0,
        by_window=model.flow.by_window and not model.flow.batch_behind,
    )
    return replace(shape, logits_itemsize=model.logits_itemsize or shape.itemsize)


def shape_of_resident(model: ResidentModel, batch: Batch) -> tuple[ModelShape, int]:
    """The shape of a model in memory, and the most tokens, or other vectors, that a batch has between two blocks.

    A batch takes the place of a window: sizes do not depend on the number of tokens.

    Args:
        model: the model.
        batch: the largest of the batches.

    Raises:
        InputError: a block has no layers, or what it hands on cannot be followed.
    """
    walk = _Walk(embed_batches(model, [batch]), every_block=True)
    shape = _shape_of(model, [walk], vocabulary=0, by_window=False)
    # Scores are of one sample at a time.
    return replace(shape, heads=-(-shape.heads // walk.hidden.shape[0])), walk.most_tokens


def _shape_of(model: BlockModel, walks: list["_Walk"], vocabulary: int, by_window: bool) -> ModelShape:
    """The shape of a model; the walks go through the blocks that they have to."""
    # Each tied one is counted once; before blocks are opened.
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    known: dict[tuple, tuple[BlockShape, tuple[str, ...]]] = {}
    blocks = []
    for i, block in enumerate(model.blocks):
        prefix = f"{model.names[i]}."
        own = {name.removeprefix(prefix) for name in model.shared.names if name.startswith(prefix)}
        kind = tuple((name, parameter.shape, name in own) for name, parameter in block.named_parameters())
        if kind not in known or walks[0].moves:
            # Unchecked: most weights are zeros here that take up address space alone, and a check would read them all.
            model.open_alone(i)
            if kind not in known:
                shape, layers = _find(walks[0].states, i, own)
                runs = [(walk.tokens, partial(walk.states.output, i, 0)) for walk in walks]
                known[kind] = replace(shape, forward=count_forward(runs)), layers
            for walk in walks:
                walk.pass_block(i)
            model.close(i)
        blocks.append(known[kind])
    hidden = walks[0].hidden
    return ModelShape(
        blocks=tuple(shape for shape, _ in blocks),
        outside=model.outside_bytes,
        hidden=hidden.shape[-1],
        vocabulary=vocabulary,
        heads=_heads(model.model),
        itemsize=hidden.element_size(),
        logits_itemsize=0,
        parameters=parameters,
        pieces=(0,),
        between=_between(walks[0], walks[-1]),
        names_by_block=tuple((name, layers) for name, (_, layers) in zip(model.names, blocks, strict=True)),
        by_window=by_window,
        quantized=model.quantized_bytes,
        written=0.5 if model.in_fp32 else 1,
        joined=model.joined_bytes,
    )


def _heads(model: nn.Module) -> int:
    """Attention heads, if attention holds all scores at once; else 0."""
    if not isinstance(model, PreTrainedModel) or attention_implementation(model) != "eager":
        return 0
    return getattr(model.config.get_text_config(), "num_attention_heads", 0)


class _Walk:
    """One micro-batch on its way through the blocks, as far as it has to go.

    Args:
        states: it, before the first block.
        every_block: whether it has to go through every block.

    Attributes:
        tokens: vectors of the input of the first block.
        hidden: the input of a block that takes most bytes.
        most_tokens: the most vectors that a block's input has.
        most: what was handed on between two blocks, where it was most.
        moves: whether every block has to be run, because blocks may hand something on.
    """

    def __init__(self, states: HiddenStates, every_block: bool = False) -> None:
        self.states, self.hidden = states, states.hidden[0]
        self.tokens = self.most_tokens = _vectors(self.hidden)
        self.most = list[Tensor]()
        self.moves = every_block or any(states.flow.live.values()) or bool(states.carried[0].boxes)

    def pass_block(self, i: int) -> None:
        """Run the window through block i, which is open."""
        if not self.moves:
            return
        # Zeros may become NaN, which says nothing of the model.
        self.states.leave(i, 0, self.states.output(i, 0))
        self.states.unchecked = None
        self.states.arrive(INPUT)
        hidden = self.states.hidden[0]
        self.hidden = max(self.hidden, hidden, key=lambda x: x.nbytes)
        self.most_tokens = max(self.most_tokens, _vectors(hidden))
        tensors, _ = self.states.beside()
        if sum(x.nbytes for x in tensors) > sum(x.nbytes for x in self.most):
            self.most = tensors


def _vectors(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1]


def _between(few: _Walk, more: _Walk) -> Between:
    """What lies between two blocks, from windows of two lengths; with a single one, nothing depends on the tokens."""
    lengths = (0, 1) if few is more else (TOKENS, MORE_TOKENS)

    def extents(of_few: list[Tensor], of_more: list[Tensor]) -> tuple[Extent, ...]:
        return tuple(Extent.of(a, b, *lengths) for a, b in zip(of_few, of_more, strict=True))

    before = extents(few.states.beside()[1], more.states.beside()[1])
    (hidden,) = extents([few.hidden], [more.hidden])
    return Between(hidden, extents(few.most, more.most), before)


def _find(states: HiddenStates, i: int, shared: set[str]) -> tuple[BlockShape, tuple[str, ...]]:
    """The shape of block i, and the names of its layers, every expert by itself.

    Args:
        states: one micro-batch before the block.
        i: number of the block.
        shared: names of matrices inside the block that are others' as well.
    """
    block, run = states.model.blocks[i], states.run_of(i, 0)
    parameters, hidden = dict(block.named_parameters()), states.hidden[0]
    with Calls(choose_all_over):
        tape, output = record_block(block, run, hidden, lambda _: states.handed_on(i, run), modules=experts_of(block))
        experts = without_parts_in_turn(experts_of(block), tape)
        no_layers = shared | find_no_layers(tape)

        def may_be_layer(name: str) -> bool:
            # Experts are slices of a parameter that may be shared as a whole.
            return name not in no_layers and without_index(name) not in shared

        surveyed = survey_tape(tape, experts, may_be_layer)
        if uneven := _cut_unevenly(surveyed.layers):
            no_layers |= uneven
            surveyed = survey_tape(tape, experts, may_be_layer)
        surveyed = confirm(surveyed, run, hidden, output, {})
    first: dict[str, Layer] = {}
    for layer in surveyed.layers:
        first.setdefault(kind_of(layer.name, experts), layer)
    if not first and not shared.issuperset(parameters):
        raise InputError(f"{states.model.names[i]}: unsupported model: no matrix of this block was seen in a product")
    names = _names_by_kind(block, first, experts)
    shapes = tuple(
        LayerShape(
            name=kind,
            rows=layer.weight.shape[0],
            d=layer.weight.shape[1],
            gram=kind_of(layer.gram, experts),
            experts=len(names[kind]) if is_expert(layer.name, experts) else 0,
            role=surveyed.roles[layer.name],
            parts=len(names[kind]) if layer.at_once else 1,
        )
        for kind, layer in first.items()
    )
    seen = frozenset(kind_of(name, experts) for name in (*surveyed.roles, *surveyed.ignored))
    nbytes = sum(parameter.nbytes for parameter in parameters.values())
    layers = tuple(name for of_kind in names.values() for name in of_kind if may_be_layer(name))
    return BlockShape(nbytes, shapes, shapes, seen=seen, experts=experts), layers


def _cut_unevenly(layers: list[Layer]) -> set[str]:
    """Names of layers that are slices of one parameter, of different sizes: an index does not tell which."""
    sizes: dict[str, set[int]] = {}
    for layer in layers:
        sizes.setdefault(without_index(layer.name), set()).add(layer.weight.numel())
    return {layer.name for layer in layers if len(sizes[without_index(layer.name)]) > 1}


def _names_by_kind(block: nn.Module, first: dict[str, Layer], experts: frozenset[str]) -> dict[str, list[str]]:
    """Names of all layers of these kinds, with the experts that no token has reached.

    Args:
        block: the block.
        first: a layer of each kind.
        experts: as for `kind_of`.
    """
    names = {kind: list[str]() for kind in first}
    for name, parameter in block.named_parameters():
        sliced = first.get(kind_of(f"{name}[0]", experts))
        for layer in slices_of(name, parameter, sliced.weight.numel() if sliced else None) or [name]:
            if (kind := kind_of(layer, experts)) in names:
                names[kind].append(layer)
    return names
