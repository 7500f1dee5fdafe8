"""Find the shape of a model before it is pruned.

One block of each kind runs on a few tokens. So its layers are found as in a run, whatever the architecture. All weights
are zero and take no memory, because the system maps pages that were never written to a single page of zeros. A model in
memory runs on one of its batches, with its own weights. The bytes of each forward are counted.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.checkpoint.source import Checkpoint
from sparsefw.checkpoint.tensors import Infos, Tensors
from sparsefw.data.batches import Batch
from sparsefw.errors import InputError
from sparsefw.estimate.live_bytes import FEW, MORE, LinearCount, count_forward
from sparsefw.estimate.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.model.block_model import BlockModel, ResidentModel
from sparsefw.model.experts import choose_all_over, experts_of, find_no_layers, without_sequential_parts
from sparsefw.model.find_layers import record_block
from sparsefw.model.forward import embed, embed_batches
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.model.layers import Experts, Layer, is_expert, kind_of, slices_of
from sparsefw.model.partial_forward import INPUT
from sparsefw.model.skeleton import attention_implementation
from sparsefw.model.stages import survey_tape, without_failed_split
from sparsefw.model.streamed import StreamedModel
from sparsefw.model.tape import Calls
from sparsefw.selection import without_index


def zeros(tensors: Infos, pin: bool = False) -> Tensors:
    """Make tensors of zeros in place of `checkpoint.read_tensors`. They take no memory until they are written to."""
    return {
        name: torch.from_numpy(np.zeros(info.nbytes, np.uint8)).view(info.dtype).view(info.shape)
        for name, info in tensors.items()
    }


def without_weights(checkpoint: Checkpoint, in_fp32: bool) -> StreamedModel:
    """Make a checkpoint's model on the host with zeros for weights. No tensor is read.

    Args:
        checkpoint: the checkpoint.
        in_fp32: as for `BlockModel`.

    Raises:
        InputError: as for `StreamedModel`.
    """
    return StreamedModel(checkpoint, torch.device("cpu"), zeros, in_fp32)


def shape_of(checkpoint: Checkpoint, in_fp32: bool = False) -> ModelShape:
    """Find the shape of a checkpoint's model; arguments and errors are those of `without_weights`."""
    with without_weights(checkpoint, in_fp32) as model:
        return shape_of_text(model)


def shape_of_text(model: BlockModel) -> ModelShape:
    """Find the shape of a model that reads text, including the bytes of generating text.

    Raises:
        InputError: a block has no layers, or tensors that it passes to later blocks cannot be traced.
    """
    # Weights need no check for NaN: those of a model in memory were checked before, and all others are zero.
    with model.outside_loaded(checked=False):
        walks = [_Walk(embed(model, torch.zeros(1, tokens, dtype=torch.int64), 1)) for tokens in (FEW, MORE)]
    shape = _shape_of(model, walks)
    by_window = model.flow.by_window and not model.flow.batch_after
    # A model without logits predicts no tokens.
    vocabulary = (model.vocabulary or 0) if model.logits_itemsize else 0
    return replace(
        shape,
        vocabulary=vocabulary,
        by_window=by_window,
        whole_bytes=0 if model.is_whole else shape.outside + sum(block.nbytes for block in shape.blocks),
        cache=len(shape.blocks) * shape.itemsize * _cached_entries(model.model),
    )


def _cached_entries(model: Any) -> int:
    """Count, at most, the entries of a token's keys and values in a block, by the usual names of sizes in configs."""
    config = model.config.get_text_config()
    # If each block has a config, the model's own config raises an error when a size is read.
    configs = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]

    def size(name: str) -> int:
        # Some configs have a value for each block.
        return int(max(np.max(getattr(one, name, None) or 0) for one in configs))

    heads = size("num_attention_heads")
    if size("qk_nope_head_dim"):
        return heads * sum(map(size, ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")))
    return 2 * (size("num_key_value_heads") or heads) * (size("head_dim") or size("hidden_size") // max(1, heads))


def shape_of_resident(model: ResidentModel, batch: Batch) -> tuple[ModelShape, int]:
    """Find the shape of a model in memory, and the largest number of vectors of the batch between two blocks.

    The vectors stand for tokens, patches or other positions. The batch takes the place of a window, so sizes in the
    shape do not grow with the number of tokens.

    Args:
        model: the model.
        batch: the largest batch.

    Raises:
        InputError: a block has no layers, or tensors that it passes to later blocks cannot be traced.
    """
    walk = _Walk(embed_batches(model, [batch]), every_block=True)
    shape = _shape_of(model, [walk])
    # The count of scores is for one sample, and a batch has several.
    return replace(shape, heads=-(-shape.heads // walk.between[0].shape[0])), walk.most_tokens


class _Walk:
    """One micro-batch on its way through the blocks.

    Args:
        states: the micro-batch before the first block.
        every_block: whether the micro-batch has to pass every block, even if blocks pass on hidden states only.

    Attributes:
        states: the micro-batch, before the next block.
        most_tokens: the largest number of vectors in a block's input.
        between: the largest set of tensors between two blocks, the hidden states first.
        every_block: whether the micro-batch has to pass every block; always if a block may pass more than hidden
            states to later blocks.
    """

    def __init__(self, states: HiddenStates, every_block: bool = False) -> None:
        self.states, self.between, self.most_tokens = states, list[Tensor](), 0
        self.every_block = every_block or any(states.model.flow.live.values()) or bool(states.batches[0].objects)
        self._measure()

    def _measure(self) -> None:
        hidden = self.states.hidden[0]
        self.most_tokens = max(self.most_tokens, hidden.numel() // hidden.shape[-1])
        self.between = max(self.between, self.states.between(), key=lambda tensors: sum(x.nbytes for x in tensors))

    def pass_block(self, i: int) -> None:
        """Run the micro-batch through block i, whose weights are loaded."""
        # The check for NaN is skipped: weights of zero may give NaN in a sound model.
        self.states.leave(i, 0, self.states.output(i, 0))
        self.states.unchecked = None
        self.states.arrive(INPUT)
        self._measure()


def _shape_of(model: BlockModel, walks: list[_Walk]) -> ModelShape:
    """Find the shape of a model without its logits, from walks through as many blocks as necessary."""
    # Counted before blocks are opened, which replaces parameters. A tied parameter counts once.
    parameters = sum(parameter.numel() for parameter in model.model.parameters())
    known: dict[tuple, tuple[BlockShape, tuple[str, ...]]] = {}
    blocks, names = [], []
    for i, block in enumerate(model.blocks):
        prefix = f"{model.names[i]}."
        shared = {name.removeprefix(prefix) for name in model.shared.names if name.startswith(prefix)}
        kind = tuple((name, parameter.shape, name in shared) for name, parameter in block.named_parameters())
        if kind not in known or walks[0].every_block:
            # Opened without a check for NaN: it would read all weights, which are zeros that take no memory.
            model.open_alone(i)
            if kind not in known:
                shape, layers = _find(walks[0].states, i, shared)
                live, allocated = count_forward(partial(walk.states.output, i, 0) for walk in walks)
                known[kind] = replace(shape, live=live, allocated=allocated), layers
            if walks[0].every_block:
                for walk in walks:
                    walk.pass_block(i)
            model.close(i)
        shape, layers = known[kind]
        blocks.append(shape)
        names.append((model.names[i], layers))
    few, more = walks[0].between, walks[-1].between
    return ModelShape(
        blocks=tuple(blocks),
        outside=model.outside_bytes,
        hidden=few[0].shape[-1],
        vocabulary=0,
        heads=_heads(model.model),
        itemsize=few[0].itemsize,
        logits_itemsize=model.logits_itemsize,
        parameters=parameters,
        pieces=tuple(model.piece_bytes),
        between=tuple(
            (LinearCount(a.itemsize), *map(LinearCount.through, a.shape, b.shape))
            for a, b in zip(few, more, strict=True)
        ),
        names_by_block=tuple(names),
        by_window=False,
        divisible=model.flow.divisible,
        quantized_bytes=model.quantized_bytes,
        written_ratio=0.5 if model.in_fp32 else 1,
        joined_bytes=model.joined_bytes,
        modules=tuple(name for name, _ in model.model.named_modules()),
    )


def _heads(model: nn.Module) -> int:
    """Return the number of attention heads if attention holds the scores of all pairs of tokens; else 0."""
    if not isinstance(model, PreTrainedModel) or attention_implementation(model) != "eager":
        return 0
    return getattr(model.config.get_text_config(), "num_attention_heads", 0)


def _find(states: HiddenStates, i: int, shared: set[str]) -> tuple[BlockShape, tuple[str, ...]]:
    """Find the shape of block i, and the names of its layers; every expert has its own name.

    Args:
        states: one micro-batch before the block.
        i: number of the block.
        shared: names of the block's matrices that other modules use as well.
    """
    block, run = states.model.blocks[i], states.run_of(i, 0)
    parameters, hidden = dict(block.named_parameters()), states.hidden[0]
    with Calls(choose_all_over):
        tape, output = record_block(block, run, hidden, lambda _: states.handed_on(i, run), modules=experts_of(block))
        experts = without_sequential_parts(experts_of(block), tape)
        no_layers = shared | find_no_layers(tape)

        def may_be_layer(name: str) -> bool:
            # A shared parameter of stacked experts has one name, without an index.
            return name not in no_layers and without_index(name) not in shared

        surveyed = survey_tape(tape, experts, may_be_layer)
        if uneven := _cut_unevenly(surveyed.layers):
            no_layers |= uneven
            surveyed = survey_tape(tape, experts, may_be_layer)
        surveyed = without_failed_split(surveyed, run, hidden, output, {})
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
            inputs_per_token=len(names[kind]) if layer.at_once else 1,
        )
        for kind, layer in first.items()
    )
    seen = frozenset(kind_of(name, experts) for name in (*surveyed.roles, *surveyed.ignored))
    nbytes = sum(parameter.nbytes for parameter in parameters.values())
    layers = tuple(name for of_kind in names.values() for name in of_kind if may_be_layer(name))
    return BlockShape(nbytes, shapes, shapes, seen=seen, expert_names=experts), layers


def _cut_unevenly(layers: list[Layer]) -> set[str]:
    """Name the layers that are slices of different sizes of one parameter: an index does not identify such a slice."""
    sizes: dict[str, set[int]] = {}
    for layer in layers:
        sizes.setdefault(without_index(layer.name), set()).add(layer.weight.numel())
    return {layer.name for layer in layers if len(sizes[without_index(layer.name)]) > 1}


def _names_by_kind(block: nn.Module, first: dict[str, Layer], experts: Experts) -> dict[str, list[str]]:
    """List the names of all layers of each kind, including experts that no token has reached.

    Args:
        block: the block.
        first: the first layer of each kind.
        experts: as for `kind_of`.
    """
    names = {kind: list[str]() for kind in first}
    for name, parameter in block.named_parameters():
        sliced = first.get(kind_of(f"{name}[0]", experts))
        for layer in slices_of(name, parameter, sliced.weight.numel() if sliced else None) or [name]:
            if (kind := kind_of(layer, experts)) in names:
                names[kind].append(layer)
    return names
