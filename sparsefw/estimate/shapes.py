"""Describe the shapes of a model, its blocks and its layers: everything that an estimate needs of a model."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from sparsefw.estimate.live_bytes import NOTHING, LinearCount
from sparsefw.model.layers import Experts, Role, by_input, kind_of


@dataclass(frozen=True)
class LayerShape:
    """A prunable matrix; in a mixture of experts, the same matrix of all experts.

    Attributes:
        name: name of the layer inside its block, without an expert's index.
        rows, d: shape of the matrix, (out, in).
        gram: name of the layer's Gram matrix, see `Layer`. Layers with the same Gram matrix form a stage.
        experts: number of experts, each with a matrix and a Gram matrix; 0 for a layer outside of experts.
        role: how the layer's target is measured, see `Role`.
        inputs_per_token: number of inputs that the block multiplies by this layer for each token: the number of
            experts if one call runs all experts, pruned or not; else 1.
    """

    name: str
    rows: int
    d: int
    gram: str
    experts: int = 0
    role: Role = field(default_factory=Role)
    inputs_per_token: int = 1

    @property
    def count(self) -> int:
        """Return the number of matrices."""
        return self.experts or 1


@dataclass(frozen=True)
class BlockShape:
    """A block of the model.

    Attributes:
        nbytes: bytes of the parameters.
        layers: the layers that are pruned, in the order of use. Their `experts` counts pruned experts only.
        all_layers: all prunable layers, pruned or not.
        seen: names, without an expert's index, of all matrices that occur in products, prunable or not.
        expert_names: names of modules that may be experts, see `experts_of`.
        live: live bytes of the forward, see `count_forward`.
        allocated: bytes of all tensors that the forward allocates.
    """

    nbytes: int
    layers: tuple[LayerShape, ...]
    all_layers: tuple[LayerShape, ...]
    seen: frozenset[str] = frozenset()
    expert_names: Experts = frozenset()
    live: tuple[LinearCount, ...] = ()
    allocated: LinearCount = NOTHING

    @cached_property
    def stages(self) -> list[list[LayerShape]]:
        """Return the layers that are pruned, grouped by stage."""
        return [*by_input(self.layers).values()]


@dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        blocks: the blocks, in order.
        outside: bytes of the loaded parameters outside of the blocks.
        hidden: width of the residual stream.
        vocabulary: number of embedded tokens, about the length of a vector of logits; 0: the model has no logits.
        heads: number of attention heads if attention holds the scores of all pairs of tokens; else 0.
        itemsize: bytes of an entry of an activation.
        logits_itemsize: bytes of an entry of the logits. Some heads return them in fp32.
        parameters: number of parameters.
        pieces: all tensors outside of the blocks are written in these pieces; bytes of each.
        between: the tensors of a window between two blocks, at the place where they take most: the hidden states, the
            tensors that blocks pass to later blocks, and tensors that the model's forward prepares for the blocks. For
            each tensor the bytes of an entry, and the sizes of its dimensions.
        names_by_block: (name of a block, names of its layers inside the block); every expert has its own name.
        by_window: whether logits are computed for one window at a time; else for a micro-batch.
        divisible: whether part of a micro-batch's windows can be run alone, see `Trace.divisible`.
        quantized_bytes: peak bytes of stored tensors that wait to be dequantized; 0: tensors are not quantized.
        joined_bytes: bytes of the largest parameter that is joined from several tensors of the checkpoint, such as
            stacked experts. These tensors are in memory until the parameter is complete.
        written_ratio: bytes written per byte of a block's parameters in memory: 0.5 if a model in half precision
            computes in fp32.
        modules: names of all modules.
        cache: bytes of a token's keys and values in all blocks, for generating text.
        whole_bytes: bytes of the weights to load for running all blocks together; 0: the model is in memory already.
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
    between: tuple[tuple[LinearCount, ...], ...]
    names_by_block: tuple[tuple[str, tuple[str, ...]], ...] = ()
    by_window: bool = True
    divisible: bool = True
    quantized_bytes: int = 0
    joined_bytes: int = 0
    written_ratio: float = 1
    modules: tuple[str, ...] = ()
    cache: int = 0
    whole_bytes: int = 0

    @cached_property
    def kinds(self) -> list[BlockShape]:
        """Return one block of each kind. Most blocks of a model are alike."""
        return [*dict.fromkeys(self.blocks)]

    @property
    def largest(self) -> int:
        """Return the bytes of the largest block."""
        return max(block.nbytes for block in self.blocks)

    @property
    def layer_names(self) -> list[str]:
        """Return the full names of all prunable layers, as a run reports them."""
        return [f"{block}.{layer}" for block, layers in self.names_by_block for layer in layers]

    def window_bytes(self, seqlen: int) -> list[int]:
        """Count the bytes of each tensor of `between` for one window."""
        return [math.ceil(math.prod(line.at(seqlen) for line in sizes)) for sizes in self.between]

    def selected(self, selects: Callable[[str], bool]) -> "ModelShape":
        """Return the shape with the selected layers only. A block stays even if no layer of it is selected.

        Args:
            selects: called with the full name of a layer, with an expert's index.
        """
        blocks, names = [], []
        for shape, (block, every) in zip(self.blocks, self.names_by_block, strict=True):
            layers = tuple(layer for layer in every if selects(f"{block}.{layer}"))
            counts = Counter(kind_of(layer, shape.expert_names) for layer in layers)
            left = (replace(x, experts=counts[x.name] if x.experts else 0) for x in shape.layers if counts[x.name])
            blocks.append(replace(shape, layers=tuple(left)))
            names.append((block, layers))
        return replace(self, blocks=tuple(blocks), names_by_block=tuple(names))
