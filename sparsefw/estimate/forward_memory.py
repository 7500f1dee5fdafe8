"""Memory of a model's own forward, a block at a time, and of the libraries that run it."""

from collections.abc import Iterable

from sparsefw.memory import pinned_bytes
from sparsefw.model.shapes import BlockShape, ModelShape

# oneDNN generates code for every shape of a product in bf16 or fp16, and keeps that of so many. Its bytes, for few
# tokens and for more, are a mean, as measured: by shape and processor it takes half of it to 2.5 times as much.
CODE_OF_FEW, CODE_OF_MORE, FEW_TOKENS = 640 * 2**10, 1280 * 2**10, 256
PRODUCTS_KEPT = 1024

# Code of a CPU's libraries that is loaded when it is used, and buffers that they keep: in all, and of each thread. As
# measured, they take up to 26 MiB with one thread, and up to 50 with two.
LIBRARIES, LIBRARIES_OF_THREAD = 16 * 2**20, 16 * 2**20

# The largest piece that the C library takes from its heap, bytes. What is freed there leaves holes: together up to two
# such pieces, and not the same in every run, as measured on a CPU.
LARGEST_PIECE, HOLES = 32 * 2**20, 2

# Share of the tensors' bytes at the peak that allocators hold beside them.
SLACK = 0.05


def page_locked_of_block(block: BlockShape, shape: ModelShape) -> int:
    """Page-locked memory that the tensors of a block are read into, each by itself."""
    sizes = [layer.rows * layer.d * shape.itemsize for layer in block.all_layers for _ in range(layer.experts or 1)]
    # The other tensors, such as norms, are small: SLACK has room for their rounding.
    return sum(map(pinned_bytes, sizes)) + max(0, block.nbytes - sum(sizes))


def outside_page_locked(shape: ModelShape) -> int:
    """Page-locked memory that the tensors outside of the blocks are read into: embeddings, a head, and little else."""
    table = shape.vocabulary * shape.hidden * shape.itemsize or shape.outside or 1
    return shape.outside // table * pinned_bytes(table) + shape.outside % table


def libraries_bytes(
    shape: ModelShape, threads: int, tokens: int, batches: Iterable[int], differentiated: bool = False
) -> int:
    """What a CPU's libraries load and keep: code, buffers, holes, and code that is generated for products.

    The latter is made in half precision, for every number of tokens. Experts are sent any number of them, other layers
    those of a micro-batch.

    Args:
        shape: shape of the model.
        threads: threads of torch.
        tokens: most tokens of a micro-batch.
        batches: the different numbers of tokens, or of windows, that micro-batches have.
        differentiated: whether gradients are computed: products of two further shapes for each.
    """
    widest = max((layer.d for block in shape.blocks for layer in block.all_layers), default=0)
    kept = LIBRARIES + LIBRARIES_OF_THREAD * threads + HOLES * min(LARGEST_PIECE, 4 * widest**2)
    return kept + (_generated_bytes(shape, tokens, {*batches} - {0}, differentiated) if shape.itemsize == 2 else 0)


def _generated_bytes(shape: ModelShape, tokens: int, batches: set[int], differentiated: bool) -> int:
    """Code of products in half precision; the arguments are those of `libraries_bytes`."""
    every = [layer for block in shape.blocks for layer in block.all_layers]
    experts, others = ({(x.rows, x.d) for x in every if bool(x.experts) == sent} for sent in (True, False))
    few, more = len(experts) * min(tokens, FEW_TOKENS), len(experts) * max(0, tokens - FEW_TOKENS)
    # The head is one of the others.
    of_batches = (len(others) + 1) * len(batches)
    few, more = (few + of_batches, more) if tokens <= FEW_TOKENS else (few, more + of_batches)
    gradients = 3 if differentiated else 1
    more = min(PRODUCTS_KEPT, gradients * more)
    return CODE_OF_MORE * more + CODE_OF_FEW * min(PRODUCTS_KEPT - more, gradients * few)


def forward_bytes(block: BlockShape, shape: ModelShape, seqlen: int, tokens: int) -> int:
    """One micro-batch inside a block: the residual stream and what is made of it, three times the widest output.

    Args:
        block, shape: the block and its model.
        seqlen: tokens of a window.
        tokens: tokens of the micro-batch.
    """
    widest = max((layer.rows * layer.parts for layer in block.all_layers), default=0)
    scores = shape.heads * seqlen * tokens * (4 + shape.itemsize)
    stream = 4 * tokens * shape.of_stream(seqlen)[0] // seqlen
    return stream + 3 * tokens * shape.itemsize * widest + scores


def backward_bytes(block: BlockShape, shape: ModelShape, seqlen: int, tokens: int) -> int:
    """One micro-batch inside a block whose gradients are computed: inputs and outputs of its layers, twice, and scores.

    Args:
        block, shape, seqlen, tokens: as for `forward_bytes`.
    """
    widths = sum((layer.rows + layer.d) * layer.parts for layer in block.all_layers)
    # Norms and the loss work in fp32.
    stream = 16 * 4 * tokens * shape.of_stream(seqlen)[0] // (seqlen * shape.itemsize)
    scores = 3 * shape.heads * seqlen * tokens * (4 + shape.itemsize)
    return 2 * tokens * shape.itemsize * widths + stream + scores
