"""Memory of a block's reconstruction."""

from sparsefw.estimate.forward_memory import backward_bytes
from sparsefw.estimate.passes import fits_predictions, reconstructed_parameters
from sparsefw.estimate.workload import Workload
from sparsefw.model.predictions import PIECE, tokens_of_pass
from sparsefw.model.shapes import BlockShape, ModelShape
from sparsefw.solver.kept_weights import bytes_of_state
from sparsefw.solver.patterns import Pattern


def reconstruction_bytes(block: BlockShape, shape: ModelShape, workload: Workload, tokens: int) -> int:
    """The state of kept weights, and what a micro-batch leaves inside a block for its gradients.

    Args:
        block, shape: the block and its model.
        workload: the work.
        tokens: tokens of a micro-batch.
    """
    if not workload.config.reconstruct:
        return 0
    return _state_bytes(block, shape, workload.config.pattern) + backward_bytes(block, shape, workload.seqlen, tokens)


def _state_bytes(block: BlockShape, shape: ModelShape, pattern: Pattern) -> int:
    """The state of a block's kept weights."""
    parameters = reconstructed_parameters(block, pattern)
    # One parameter at a time has the places of its kept weights in 8 bytes each, and their new values.
    written = (8 + shape.itemsize) * max((kept for _, kept in parameters), default=0)
    return sum(bytes_of_state(*counts, shape.itemsize) for counts in parameters) + written


def prediction_bytes(shape: ModelShape, workload: Workload, tokens: int) -> int:
    """The last block, and all that its reconstruction takes where predictions are compared.

    Args:
        shape, workload, tokens: as for `reconstruction_bytes`.
    """
    if not fits_predictions(shape, workload.config):
        return 0
    last = shape.blocks[-1]
    backward = backward_bytes(last, shape, workload.seqlen, tokens)
    # Logits of a step are gone when the gradients go back through the block. To measure the loss takes no gradients.
    some = len(range(workload.seqlen)[tokens_of_pass(0, workload.seqlen)])
    of_step, measured = (logits_bytes(shape, n) for n in (some, workload.seqlen))
    state = _state_bytes(last, shape, workload.config.pattern)
    return last.nbytes + shape.outside + state + max(backward, backward // 2 + of_step, measured)


def logits_bytes(shape: ModelShape, tokens: int) -> int:
    """To compare the predictions of so many tokens of a window: all logits three times, and what a piece takes.

    The logits of the dense model lie beside those of the pruned one, and beside what a head that caps its logits makes
    them of, or has kept for their gradients. On the way back the logits are gone, and their gradient takes the place.

    Of a piece there are three distributions in fp32, and a byte for each entry.

    Args:
        shape: shape of the model.
        tokens: the tokens.
    """
    entries = tokens * shape.vocabulary
    return 3 * shape.logits_itemsize * entries + 13 * min(entries, max(PIECE, shape.vocabulary))
