"""Find the shapes of a model's layers before it is pruned.

One block of each kind is run on a few tokens, so that layers are found as the pruning finds them, whatever the
architecture. All its weights are zero, and take no memory: pages that nobody has written to are all the same page.
A model in memory runs on one of its batches, with its own weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.checkpoint.source import Checkpoint
from sparsefw.checkpoint.tensors import TensorInfo
from sparsefw.data import Batch
from sparsefw.errors import InputError
from sparsefw.model.block_model import BlockModel, ResidentModel
from sparsefw.model.forward import embed, embed_batches
from sparsefw.model.hf import attention_implementation
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.layers import (
    Layer,
    choose_all_over,
    confirm,
    experts_of,
    find_no_layers,
    is_expert,
    kind_of,
    record_block,
    slices_of,
    survey_tape,
    without_parts_in_turn,
)
from sparsefw.model.live_bytes import count_forward
from sparsefw.model.parts import INPUT
from sparsefw.model.shapes import Between, BlockShape, Extent, LayerShape, ModelShape
from sparsefw.model.stand_ins import hidden_of
from sparsefw.model.streamed import StreamedModel
from sparsefw.model.tape import Calls
from sparsefw.solver.patterns import without_index

# Tokens that the blocks are run on: enough for every kind of attention, little beside a block.
TOKENS = 8
# Tokens of a second window, which shows what grows with the first.
MORE_TOKENS = 12


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
        shape, config = shape_of_text(model), model.config
    return replace(
        shape,
        vocabulary=config.get_text_config().vocab_size,
        itemsize=checkpoint.dtype.itemsize,
        pieces=tuple(sum(checkpoint.tensors[name].nbytes for name in piece) for piece in model.pieces),
        stored=checkpoint.stored_nbytes / checkpoint.nbytes,
    )


def shape_of_text(model: BlockModel) -> ModelShape:
    """The shape of a model that reads text.

    Raises:
        InputError: a block has no layers, or what it hands on cannot be followed.
    """
    windows = (torch.zeros(1, tokens, dtype=torch.int64) for tokens in (TOKENS, MORE_TOKENS))
    few, more = (_Walk(embed(model, ids, 1)) for ids in windows)
    shape = _shape_of(model, few, more)
    by_window = model.flow.by_window and not model.flow.batch_behind
    return replace(
        shape,
        # Without logits nothing is predicted.
        vocabulary=(model.vocabulary or 0) if model.logits_itemsize else 0,
        logits_itemsize=model.logits_itemsize or shape.itemsize,
        heads=_heads(model.model),
        quantized=model.quantized_bytes,
        joined=model.joined_bytes,
        by_window=by_window and few.hidden.shape[:2] == (1, TOKENS),
    )


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
    shape, hidden = _shape_of(model, walk), walk.widest
    shape = replace(
        shape,
        hidden=hidden.shape[-1],
        itemsize=hidden.element_size(),
        # Scores are of one sample at a time.
        heads=-(-_heads(model.model) // hidden.shape[0]),
        between=replace(shape.between, hidden=Extent.of(hidden, hidden, 0, 1)),
    )
    return shape, walk.most_tokens


def _shape_of(model: BlockModel, *walks: "_Walk") -> ModelShape:
    """What is found alike of all models; without logits."""
    # Each tied one is counted once; before blocks are opened.
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    blocks, hidden = _shapes_of_blocks(model, walks), walks[0].hidden
    return ModelShape(
        blocks=tuple(shape for shape, _ in blocks),
        outside=model.outside_bytes,
        hidden=hidden.shape[-1],
        vocabulary=0,
        heads=0,
        itemsize=hidden.element_size(),
        logits_itemsize=0,
        parameters=parameters,
        names_by_block=tuple((name, layers) for name, (_, layers) in zip(model.names, blocks, strict=True)),
        pieces=(0,),
        between=_between(walks[0], walks[-1]),
        by_window=False,
    )


def _shapes_of_blocks(model: BlockModel, walks: Sequence["_Walk"]) -> list[tuple[BlockShape, tuple[str, ...]]]:
    """By block its shape, and the names of its layers; the walks go through the blocks that they have to."""
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
    return blocks


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
        hidden: the input of the first block.
        widest: the input of a block that takes most bytes.
        most_tokens: the most vectors that a block's input has.
        most: what was handed on between two blocks, where it was most.
        moves: whether every block has to be run, because blocks may hand something on.
    """

    def __init__(self, states: HiddenStates, every_block: bool = False) -> None:
        self.states = states
        self.hidden = self.widest = states.hidden[0]
        self.tokens = _vectors(self.hidden)
        self.most_tokens, self.most = _vectors(self.hidden), list[Tensor]()
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
        self.widest = max(self.widest, hidden, key=lambda x: x.nbytes)
        self.most_tokens = max(self.most_tokens, _vectors(hidden))
        tensors, _ = self.states.beside()
        if sum(x.nbytes for x in tensors) > sum(x.nbytes for x in self.most):
            self.most = tensors


def _between(few: _Walk, more: _Walk) -> Between:
    """What lies between two blocks, from windows of two lengths; with a single one, nothing depends on the tokens."""
    lengths = (0, 1) if few is more else (TOKENS, MORE_TOKENS)

    def extents(of_few: list[Tensor], of_more: list[Tensor]) -> tuple[Extent, ...]:
        return tuple(Extent.of(a, b, *lengths) for a, b in zip(of_few, of_more, strict=True))

    before = extents(few.states.beside()[1], more.states.beside()[1])
    (hidden,) = extents([few.hidden], [more.hidden])
    return Between(hidden, extents(few.most, more.most), before)


def _vectors(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1]


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
        tape, returned = record_block(block, run, hidden, lambda _: states.handed_on(i, run), modules=experts_of(block))
        experts = without_parts_in_turn(experts_of(block), tape)
        no_layers = shared | find_no_layers(tape)

        def may_be_layer(name: str) -> bool:
            # Experts are slices of a parameter that may be shared as a whole.
            return name not in no_layers and without_index(name) not in shared

        surveyed = survey_tape(tape, experts, may_be_layer)
        if uneven := _cut_unevenly(surveyed.layers):
            no_layers |= uneven
            surveyed = survey_tape(tape, experts, may_be_layer)
        surveyed = confirm(surveyed, run, hidden, hidden_of(returned), {})
    layers: dict[str, LayerShape] = {}
    for layer in surveyed.layers:
        rows, d = layer.weight.shape
        parameter = parameters[without_index(layer.name)]
        count, kind = parameter.numel() // (rows * d), kind_of(layer.name, experts)
        alike = count if layer.name not in parameters else sum(kind_of(x, experts) == kind for x in parameters)
        shape = LayerShape(
            name=kind,
            rows=rows,
            d=d,
            gram=kind_of(layer.gram, experts),
            experts=alike if is_expert(layer.name, experts) else 0,
            role=surveyed.roles[layer.name],
            parts=count if layer.at_once else 1,
        )
        layers.setdefault(shape.name, shape)
    if not layers and not shared.issuperset(parameters):
        raise InputError(f"{states.model.names[i]}: unsupported model: no matrix of this block was seen in a product")
    nbytes, shapes = sum(p.nbytes for p in parameters.values()), tuple(layers.values())
    names = tuple(name for name in _names_of_layers(block, layers, experts) if may_be_layer(name))
    seen = frozenset(kind_of(name, experts) for name in (*surveyed.roles, *surveyed.ignored))
    return BlockShape(nbytes, shapes, shapes, seen=seen, experts=experts), names


def _cut_unevenly(layers: list[Layer]) -> set[str]:
    """Names of layers that are slices of one parameter, of different sizes: an index does not tell which."""
    sizes: dict[str, set[int]] = {}
    for layer in layers:
        sizes.setdefault(without_index(layer.name), set()).add(layer.weight.numel())
    return {layer.name for layer in layers if len(sizes[without_index(layer.name)]) > 1}


def _names_of_layers(block: nn.Module, kinds: dict[str, LayerShape], experts: frozenset[str]) -> tuple[str, ...]:
    """Names of all layers of these kinds, with the experts that no token has reached; `experts` as for `kind_of`."""
    by_kind = {kind: list[str]() for kind in kinds}
    for name, parameter in block.named_parameters():
        stacked = kinds.get(kind_of(f"{name}[0]", experts))
        for layer in slices_of(name, parameter, stacked.rows * stacked.d if stacked else None) or [name]:
            if (kind := kind_of(layer, experts)) in by_kind:
                by_kind[kind].append(layer)
    return tuple(layer for layers in by_kind.values() for layer in layers)
