"""Count the bytes of forwards with and without gradients, and of the fit of kept weights: of a block, or of a model."""

from collections.abc import Iterable

from sparsefw.estimate.shapes import BlockShape, ModelShape
from sparsefw.estimate.steps import tokens_and_steps
from sparsefw.model.head import PIECE
from sparsefw.solver.kept_weights import bytes_of_state
from sparsefw.solver.patterns import Pattern


def fit_bytes(blocks: Iterable[BlockShape], itemsize: int, pattern: Pattern, together: bool) -> int:
    """Count the bytes of the state of kept weights, and of the gradients.

    Args:
        blocks: blocks that are in memory.
        itemsize: bytes of a weight.
        pattern: tells which weights are kept.
        together: whether all blocks of a model are fitted together. Then the first values of weights are not kept, and
            gradients are there one by one; but those of experts stay until the backward pass ends.
    """
    state = gradients = largest = written = 0
    for block in blocks:
        # Experts that stay dense are in the parameter of the others; their weights do not move.
        counts = {layer.name: layer.count for layer in block.all_layers}
        for layer in block.layers:
            kept = layer.count * layer.rows * pattern.kept(layer.d)
            weights = counts[layer.name] * layer.rows * layer.d
            state += bytes_of_state(weights, kept, itemsize, undo=not together)
            if layer.experts or not together:
                gradients += itemsize * weights
            if together:
                largest = max(largest, itemsize * weights)
            # The new values of one matrix at a time, and their places in 8 bytes each.
            written = max(written, (8 + itemsize) * kept)
    return state + gradients + largest + written


def forward_bytes(block: BlockShape, shape: ModelShape, seqlen: int, tokens: int) -> int:
    """Count the bytes of a micro-batch of windows inside a block, without gradients."""
    return int(max((line.at(tokens) for line in block.live), default=0)) + _scores(shape, seqlen, tokens)


def backward_bytes(block: BlockShape, shape: ModelShape, seqlen: int, tokens: int) -> int:
    """Count the bytes that a block keeps of a micro-batch for its gradients."""
    return int(block.allocated.at(tokens)) + 2 * _scores(shape, seqlen, tokens)


def reconstruction_bytes(
    block: BlockShape, shape: ModelShape, pattern: Pattern, seqlen: int, tokens: int, loss: int, gpu: bool
) -> int:
    """Count the bytes of a reconstruction besides the block.

    Args:
        block, shape: the block, and the model.
        pattern: tells which weights are kept.
        seqlen, tokens: tokens of a window, and of a step.
        loss: bytes of a loss on what is held out.
        gpu: whether the model is pruned on a GPU.
    """
    fitted = fit_bytes([block], shape.itemsize, pattern, together=False)
    step = backward_bytes(block, shape, seqlen, tokens) + forward_bytes(block, shape, seqlen, tokens)
    if not (block.predicts and block.layers):
        return fitted + max(step, loss)
    # A step compares the predictions of some tokens. The loss is of all tokens, and takes no gradients.
    every, _ = tokens_and_steps(shape, seqlen, 1)
    step += _logits(shape, -(-seqlen // every), gpu)
    return shape.outside + fitted + max(step, _logits(shape, seqlen, gpu), loss)


def recovery_bytes(shape: ModelShape, pattern: Pattern, seqlen: int, gpu: bool) -> int:
    """Count the bytes of a model of which all kept weights are fitted together, in steps of one window."""
    fitted = fit_bytes(shape.blocks, shape.itemsize, pattern, together=True)
    kept = sum(backward_bytes(block, shape, seqlen, seqlen) for block in shape.blocks)
    forward = max(forward_bytes(block, shape, seqlen, seqlen) for block in shape.kinds)
    return shape.whole_bytes + fitted + kept + forward + _logits(shape, seqlen, gpu)


def _scores(shape: ModelShape, seqlen: int, tokens: int) -> int:
    """Count the bytes of scores of attention, where they are held: of each two tokens of a window."""
    return shape.heads * seqlen * tokens * (4 + shape.itemsize)


def _logits(shape: ModelShape, tokens: int, gpu: bool) -> int:
    """Count the bytes of the logits of both models, of those that the head makes them of, and of three distributions.

    The distributions are in fp32, with a mask, and of a piece at a time.
    """
    entries, piece = tokens * shape.vocabulary, max(PIECE["cuda" if gpu else "cpu"], shape.vocabulary)
    return 3 * shape.logits_itemsize * entries + 13 * min(entries, piece)
