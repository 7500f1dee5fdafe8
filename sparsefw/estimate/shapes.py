"""Describe the shape of a model, its blocks and its layers: all that an estimate needs to know of it."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from sparsefw.estimate.live_bytes import NOTHING, LinearCount
from sparsefw.model.layers import Role, by_input, kind_of


@dataclass(frozen=True)
class LayerShape:
    """A prunable matrix; in a mixture, the same matrix of all experts.

    Attributes:
        name: inside the block; without an expert's index.
        rows, d: shape of the matrix, (out, in).
        gram: name of its Gram matrix, see `Layer`. The layers of one Gram matrix are a stage of the pruning.
        experts: number of these matrices, each with a Gram matrix of its own; 0 for a layer that is no expert.
        role: the layer's part in the block.
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
    """A block.

    Attributes:
        nbytes: bytes of the parameters.
        layers: the layers that are pruned, in the order of use; `experts` counts the pruned ones only.
        all_layers: all layers that the windows run through, with those that stay dense.
        seen: names of all matrices that were seen in products, layers or not, without an expert's index.
        predicts: whether next tokens are predicted from its output: the last block of a language model.
        experts: names of modules that may be experts, see `experts_of`.
        live: bytes that its forward takes at once, after each of its operations.
        made: bytes of all tensors that its forward makes.
    """

    nbytes: int
    layers: tuple[LayerShape, ...]
    all_layers: tuple[LayerShape, ...]
    seen: frozenset[str] = frozenset()
    predicts: bool = False
    expert_names: frozenset[str] = frozenset()
    live: tuple[LinearCount, ...] = ()
    allocated: LinearCount = NOTHING

    @cached_property
    def stages(self) -> list[list[LayerShape]]:
        """Return the layers that are pruned, by stage."""
        return [*by_input(self.layers).values()]


@dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        blocks: in their order.
        outside: bytes of the parameters outside of the blocks that are loaded.
        hidden: width of the residual stream.
        vocabulary: number of the tokens that it embeds, and about the entries of a logit vector; 0: it has no logits.
        heads: attention heads, if attention holds all scores at once; else 0.
        itemsize: bytes of an entry of an activation.
        logits_itemsize: bytes of an entry of the logits, which some heads return in fp32.
        parameters: number of parameters.
        pieces: bytes of the pieces in which all tensors outside of the blocks are written.
        between: the tensors that a window has between two blocks: the hidden states; the tensors that blocks hand on,
            where they take most; and those that the model's forward makes of the tokens, for later blocks. Of each, the
            bytes of an entry and the sizes of its dimensions.
        names_by_block: the name of each block, and the names of its layers inside the block, every expert by itself.
        by_window: whether logits are made of one window at a time, and not of a micro-batch.
        divisible: whether some windows of a micro-batch can be run by themselves, see `Trace.divisible`.
        quantized: most bytes of tensors as they are stored that are in memory at once. 0: they are used as they are.
        joined: bytes of the largest parameter that is made of several tensors of the checkpoint, such as one of stacked
            experts. All of these are in memory until it is made.
        written: bytes that are written for each byte of a block's parameters in memory.
        modules: names of all modules.
        cache: bytes of the keys and values that a token has in all blocks, where the model writes text.
        whole: bytes of the weights that are loaded to run all blocks at once; 0: they are there.
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
        """Return the blocks that differ. Most blocks of a model are alike."""
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
        """Count the bytes of each tensor that a window has between two blocks."""
        return [math.ceil(math.prod(line.at(seqlen) for line in sizes)) for sizes in self.between]

    def selected(self, selects: Callable[[str], bool]) -> "ModelShape":
        """Return the same model with fewer layers; blocks stay even if they have none.

        Args:
            selects: called with the full name of a layer; each expert has a name of its own.
        """
        blocks, names = [], []
        for shape, (block, every) in zip(self.blocks, self.names_by_block, strict=True):
            layers = tuple(layer for layer in every if selects(f"{block}.{layer}"))
            counts = Counter(kind_of(layer, shape.expert_names) for layer in layers)
            left = (replace(x, experts=counts[x.name] if x.experts else 0) for x in shape.layers if counts[x.name])
            blocks.append(replace(shape, layers=tuple(left)))
            names.append((block, layers))
        return replace(self, blocks=tuple(blocks), names_by_block=tuple(names))
