"""Bytes that blocks take while they run, and while their kept weights are fitted: block by block, or all together."""

from typing import NamedTuple

from sparsefw.estimate.shapes import BlockShape, ModelShape
from sparsefw.estimate.steps import tokens_and_steps
from sparsefw.model.head import PIECE, tokens_of_pass
from sparsefw.solver.kept_weights import bytes_of_state
from sparsefw.solver.patterns import Pattern


def forward_bytes(block: BlockShape, shape: ModelShape, seqlen: int, tokens: int) -> int:
    """A micro-batch inside a block; scores of attention, where they are held, grow with the square of the tokens."""
    return block.forward.peak(tokens) + shape.heads * seqlen * tokens * (4 + shape.itemsize)


def reconstruction_bytes(
    block: BlockShape, shape: ModelShape, pattern: Pattern, seqlen: int, tokens: int, loss: int, gpu: bool
) -> int:
    """The state of kept weights; what the tokens of a step leave inside a block for its gradients, or a loss takes."""
    fits = _fit_of(block, shape, pattern)
    fitted = sum(x.state + x.gradient for x in fits) + max((x.written for x in fits), default=0)
    backward = _kept(block, shape, seqlen, tokens) + forward_bytes(block, shape, seqlen, tokens)
    if not (block.predicts and block.layers):
        return fitted + max(backward, loss)
    # A step looks at some tokens. To measure the loss takes all, and no gradients.
    every, _ = tokens_and_steps(shape, seqlen, 1)
    of_step = _logits(shape, len(range(seqlen)[tokens_of_pass(0, every)]), gpu)
    return shape.outside + fitted + max(backward + of_step, _logits(shape, seqlen, gpu), loss)


def recovery_bytes(shape: ModelShape, pattern: Pattern, seqlen: int, gpu: bool) -> int:
    """A model of which all kept weights are fitted together, in steps of one window.

    Gradients are there one by one. Those of experts of all blocks stay until the backward pass ends.
    """
    fits = [x for b in shape.blocks for x in _fit_of(b, shape, pattern, undo=False)]
    gradients = max((x.gradient for x in fits), default=0) + sum(x.gradient for x in fits if x.experts)
    written = max((x.written for x in fits), default=0)
    backward = max(forward_bytes(b, shape, seqlen, seqlen) for b in shape.blocks) + _logits(shape, seqlen, gpu)
    kept = sum(_kept(b, shape, seqlen, seqlen) for b in shape.blocks)
    return shape.whole + sum(x.state for x in fits) + gradients + written + backward + kept


class _Fit(NamedTuple):
    """Bytes of the fit of a matrix, or of the same one of all experts.

    Attributes:
        state, gradient: of the kept weights, and of all.
        written: the places of the kept weights in 8 bytes each, and their new values: of one matrix at a time.
        experts: whether it is in a mixture.
    """

    state: int
    gradient: int
    written: int
    experts: bool


def _fit_of(block: BlockShape, shape: ModelShape, pattern: Pattern, undo: bool = True) -> list[_Fit]:
    # Experts that stay dense lie in the parameter of the others; their weights do not move.
    experts = {layer.name: max(1, layer.experts) for layer in block.all_layers}
    fits = []
    for layer in block.layers:
        kept = layer.rows * pattern.kept(layer.d) * max(1, layer.experts)
        weights = layer.rows * layer.d * experts[layer.name]
        state = bytes_of_state(weights, kept, shape.itemsize, undo)
        fits.append(_Fit(state, shape.itemsize * weights, (8 + shape.itemsize) * kept, layer.experts > 0))
    return fits


def _kept(block: BlockShape, shape: ModelShape, seqlen: int, tokens: int) -> int:
    """What a block keeps for its gradients."""
    return block.forward.kept(tokens) + 2 * shape.heads * seqlen * tokens * (4 + shape.itemsize)


def _logits(shape: ModelShape, tokens: int, gpu: bool) -> int:
    """Both models have logits, and a head makes them of others; a piece has three distributions in fp32 and a byte."""
    entries, piece = tokens * shape.vocabulary, max(PIECE["cuda" if gpu else "cpu"], shape.vocabulary)
    return 3 * shape.logits_itemsize * entries + 13 * min(entries, piece)
