"""Memory of the solve of a stage, beside its Gram matrix."""

from collections.abc import Sequence

from sparsefw.estimate.passes import cross_rows
from sparsefw.estimate.sharing import approximates_dense
from sparsefw.estimate.workload import Workload, largest_share
from sparsefw.model import Placement
from sparsefw.model.shapes import LayerShape
from sparsefw.solver import METHODS, PruneConfig
from sparsefw.solver.methods import OF_MATRIX
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT, cpu_rows

# Memory of a solve per entry of a chunk, where no mask is chosen again for refitted weights; measured on a CPU.
BYTES_WITHOUT_ROUNDS = 56

# The same for an entry of a layer, beside its weight and its saliency, where rows cannot be solved apart: by
# Frank-Wolfe, and by SparseGPT when it has decomposed the Gram matrix.
BYTES_OF_WHOLE, BYTES_OF_SWEEP = 48, 20

# The same before the first chunk: to share the budget of a matrix out over its rows, where many weights are equally
# good; and to compute a saliency, which depends on a row alone or on the whole matrix.
BYTES_OF_BUDGETS, BYTES_OF_SALIENCY, BYTES_OF_WHOLE_SALIENCY = 23, 4, 12


def cross_bytes(stage: Sequence[LayerShape], config: PruneConfig, method: str) -> int:
    """Cross matrices of a stage."""
    return sum(4 * rows * stage[0].d for rows in cross_rows(stage)) if approximates_dense(config, method) else 0


def rows_of_rank(stage: Sequence[LayerShape], workload: Workload, method: str) -> int:
    """The most rows of a stage that a rank solves at once, padded."""
    rows = -(-sum(layer.rows for layer in stage) // ROW_UNIT) * ROW_UNIT
    if stage[0].experts or not workload.config.rows_shared(method):
        return rows
    return largest_share(rows, workload.ranks, ROW_UNIT)


def stage_bytes(stage: Sequence[LayerShape], workload: Workload, placement: Placement, method: str) -> int:
    """The solve of a stage by a method, beside its Gram matrix."""
    config, d = workload.config, stage[0].d
    stacked_layers = config.rows_independent(method)
    rows = rows_of_rank(stage, workload, method) if stacked_layers else max(layer.rows for layer in stage)
    weight = 2 if workload.gpu else 4
    rounded = workload.gpu and config.precision == "bf16"
    uses_damping = METHODS[method].uses_damping
    damped = (2 if rounded and config.refit else 4) * d * d if uses_damping and (config.damp or rounded) else 0
    # Without a refit the damped matrix is rounded for each chunk.
    operand = 2 * d * d if rounded and not config.refit else 0
    # The Gram matrix as two bf16 terms, for exact products.
    terms = 4 * d * d if workload.gpu and config.precision in ("tf32", "bf16") else 0
    # Weights, and saliencies when the cross matrices have gone: those of other layers have not where none are stacked.
    gone = cross_bytes(stage, config, method) if stacked_layers else 0
    stacked = rows * d * weight + max(0, 4 * rows * d - gone)
    if approximates_dense(config, method) and not config.refit:
        # The gap between the weights and their targets.
        stacked += 4 * rows * d
    if config.keep_zeros:
        # The mask of weights that may be nonzero.
        stacked += rows * d
    state = _state_bytes(rows, d, workload, placement, method)
    before = _bytes_before(min(rows, max(layer.rows for layer in stage)), d, config, method)
    if workload.gpu:
        # Saliencies are stacked one after the other. A CPU has no memory for what is not yet written.
        before = max(before, 4 * rows * d)
    return damped + operand + terms + stacked + max(state, before)


def _state_bytes(rows: int, d: int, workload: Workload, placement: Placement, method: str) -> int:
    """The state of the rows that are solved at once."""
    if workload.config.rows_independent(method):
        return _chunk_bytes(rows, d, workload, placement)
    if method == "sparsegpt":
        # The Gram matrix is decomposed and inverted, and the factor is there while weights are removed.
        return max(12 * d * d, 4 * d * d + BYTES_OF_SWEEP * rows * d)
    return BYTES_OF_WHOLE * rows * d


def _bytes_before(rows: int, d: int, config: PruneConfig, method: str) -> int:
    """What the budgets and the saliencies of a rank's rows of the largest layer take before they are solved."""
    of_whole = (METHODS[method].saliency or config.warm_start) in OF_MATRIX
    of_entry = BYTES_OF_WHOLE_SALIENCY if of_whole else BYTES_OF_SALIENCY
    if config.pattern.scope == "layer" and not (method == "sparsefw" and config.whole_matrix):
        of_entry = BYTES_OF_BUDGETS
    return of_entry * rows * d


def _chunk_bytes(rows: int, d: int, workload: Workload, placement: Placement) -> int:
    """The most state of rows that are solved at once. The solver sizes its chunks by BYTES_PER_ENTRY in any case.

    On a GPU chunks may be lower, to fill whole waves.
    """
    rows = min(rows, max(ROW_UNIT, placement.solver // (BYTES_PER_ENTRY * d) // ROW_UNIT * ROW_UNIT))
    if not workload.gpu:
        rows = min(rows, workload.threads * cpu_rows(d))
    most = BYTES_PER_ENTRY if workload.config.refit and workload.config.rounds else BYTES_WITHOUT_ROUNDS
    return most * rows * d
