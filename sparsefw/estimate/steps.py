"""Count the steps of a block's reconstruction.

A pass makes a step of each micro-batch that is not held out, or of each piece of it. The last block of a language model
is fitted to predictions, for which the head runs in every step. The head of a small model costs more than its last
block, up to thirty times as much with a large vocabulary. So a step compares the predictions of some tokens only, and
there are more steps. Where the head costs most, a first round fits hidden states, and few steps compare predictions.
"""

from typing import Any

from sparsefw.errors import counted
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.model import Placement
from sparsefw.model.activations import split_batches

# A step compares one token in EVERY where a window has EVERY * MIN_TOKENS or more, and there are TIMES the passes.
# Where a head of more than SMALL_HEAD weights still costs over twice what the block does, a round that fits hidden
# states comes first. The steps after it compare MIN_TOKENS tokens: to read the head's weights costs as much as this
# number of tokens. Together they cost SHARE times as much as the first round.
EVERY, MIN_TOKENS, SMALL_HEAD, TIMES, SHARE = 8, 64, 2**24, 2, 1.5


def tokens_and_steps(shape: ModelShape, seqlen: int, steps: int) -> tuple[int, list[int]]:
    """Choose how the last block is fitted to predictions.

    Args:
        shape: shape of the model.
        seqlen: tokens in a window.
        steps: steps of a round that fits hidden states.

    Returns:
        n, where a step compares one token in n; and the steps of each round. Further rounds have the steps of the last
        one. All rounds but the last one fit hidden states.
    """
    every = EVERY if seqlen >= EVERY * MIN_TOKENS else 1
    head = shape.vocabulary * shape.hidden
    block = sum(layer.rows * layer.d * layer.inputs_per_token for layer in shape.blocks[-1].all_layers)
    ratio = head / max(1, block)
    if head > SMALL_HEAD and ratio > 2 * every:
        every = max(1, seqlen // MIN_TOKENS)
        return every, [steps, max(1, round(steps * SHARE / (1 + ratio / every)))]
    return every, [steps * TIMES if every > 1 else steps]


def reconstruction_steps(shape: ModelShape, workload: Workload, placement: Placement) -> dict[str, Any]:
    """Count the steps of a round of a block's reconstruction.

    Returns:
        "steps" of a block; and, where the last block is fitted to predictions, "last", the steps of each of its first
        rounds. Empty if no block is reconstructed.
    """
    passes, last = workload.config.reconstruct, shape.blocks[-1]
    if not passes:
        return {}
    batch, windows = placement.batch, workload.windows
    of_step = placement.step or batch
    learned, _ = split_batches(-(-windows // batch))
    steps = passes * sum(-(-min(batch, windows - j * batch) // of_step) for j in learned)
    if not (last.predicts and last.layers):
        return {"steps": steps}
    _, rounds = tokens_and_steps(shape, workload.seqlen, steps)
    return {"steps": steps, "last": rounds}


def reconstruction_line(found: dict[str, Any]) -> str:
    """Write `reconstruction_steps` as a line of the plan and of the log."""
    line = f"reconstruction: {counted(found['steps'], 'step')} a round, two rounds in most blocks"
    rounds = " + ".join(map(str, found.get("last", ())))
    return f"{line}; {rounds} in the last block" if rounds else line
