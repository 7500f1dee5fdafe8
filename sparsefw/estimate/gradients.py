"""Count the bytes of a forward, of a backward, and of fitting the kept weights of one block or of the whole model."""

from collections.abc import Iterable

from sparsefw.estimate.shapes import BlockShape, ModelShape
from sparsefw.model.head import PIECE
from sparsefw.solver.kept_weights import bytes_of_state
from sparsefw.solver.patterns import Pattern


def fit_bytes(
    blocks: Iterable[BlockShape], itemsize: int, pattern: Pattern, together: bool, reruns: bool = False
) -> int:
    """Count the bytes of the fit of kept weights: the optimizer's state, and the gradients.

    Args:
        blocks: the blocks that are fitted.
        itemsize: bytes of a weight.
        pattern: tells how many weights are kept.
        together: whether all blocks of a model are fitted together. Such a fit stores no copy of the first weights to
            undo it, and holds the gradients of one block at a time.
        reruns: whether blocks run again in the backward. If not, the gradients of all experts are held together.
    """
    state = gradients = largest = written = 0
    for block in blocks:
        # Experts that stay dense are slices of the same parameter as the pruned ones, so they have gradients too.
        counts, of_block = {layer.name: layer.count for layer in block.all_layers}, 0
        for layer in block.layers:
            kept = layer.count * layer.rows * pattern.kept(layer.d)
            weights = counts[layer.name] * layer.rows * layer.d
            state += bytes_of_state(weights, kept, itemsize, undo=not together)
            if layer.experts and together and not reruns:
                gradients += itemsize * weights
            else:
                of_block += itemsize * weights
            # The new values of one matrix at a time, and an index of 8 bytes for each value.
            written = max(written, (8 + itemsize) * kept)
        largest = max(largest, of_block)
    return state + gradients + largest + written


def forward_bytes(block: BlockShape, shape: ModelShape, seqlen: int, tokens: int) -> int:
    """Count the peak bytes of a block's forward on a micro-batch of windows, without gradients."""
    return int(max((line.at(tokens) for line in block.live), default=0)) + _scores(shape, seqlen, tokens)


def backward_bytes(block: BlockShape, shape: ModelShape, seqlen: int, tokens: int) -> int:
    """Count the bytes that a block saves for the backward on a micro-batch: at most all that its forward allocates."""
    return int(block.allocated.at(tokens)) + 2 * _scores(shape, seqlen, tokens)


def reconstruction_bytes(
    block: BlockShape, shape: ModelShape, pattern: Pattern, seqlen: int, tokens: int, loss: int
) -> int:
    """Count the bytes of a reconstruction besides the block.

    Args:
        block, shape: the block, and the model.
        pattern: tells how many weights are kept.
        seqlen, tokens: tokens of a window, and of a step.
        loss: bytes to compute the loss on a held-out micro-batch.
    """
    fitted = fit_bytes([block], shape.itemsize, pattern, together=False)
    step = backward_bytes(block, shape, seqlen, tokens) + forward_bytes(block, shape, seqlen, tokens)
    return fitted + max(step, loss)


def recovery_bytes(shape: ModelShape, pattern: Pattern, seqlen: int, gpu: bool, reruns: bool) -> int:
    """Count the bytes of a recovery, which fits all kept weights of a model together, window by window."""
    fitted = fit_bytes(shape.blocks, shape.itemsize, pattern, together=True, reruns=reruns)
    graphs = [backward_bytes(block, shape, seqlen, seqlen) for block in shape.blocks]
    # Between all blocks lie what a block hands on, its gradient, and a copy.
    kept = (max if reruns else sum)(graphs) + 2 * len(graphs) * sum(shape.window_bytes(seqlen))
    forward = max(forward_bytes(block, shape, seqlen, seqlen) for block in shape.kinds)
    # Between steps, blocks of the dense model run, and the next one is read.
    work = max(kept + _logits(shape, seqlen, gpu), 2 * shape.largest)
    return shape.whole_bytes + fitted + forward + work


def _scores(shape: ModelShape, seqlen: int, tokens: int) -> int:
    """Count the bytes of the attention scores of all pairs of tokens; 0 if attention does not hold all scores."""
    return shape.heads * seqlen * tokens * (4 + shape.itemsize)


def _logits(shape: ModelShape, tokens: int, gpu: bool) -> int:
    """Count the bytes of comparing the predictions of both models.

    These are three tensors of logits: one of each model, and one that the head still holds. A piece of them at a time
    becomes three distributions in fp32 and a mask.
    """
    entries, piece = tokens * shape.vocabulary, max(PIECE["cuda" if gpu else "cpu"], shape.vocabulary)
    return 3 * shape.logits_itemsize * entries + 13 * min(entries, piece)
