"""Count the steps of a block's reconstruction.

A pass makes a step for each micro-batch that is not held out, or for each piece of such a micro-batch. The last block
of a language model is fitted to predictions, so the head runs in every step. In a small model with a large vocabulary
the head costs up to thirty times as much as the block. So a step compares the predictions of some tokens only, and
there are more steps. If the head is still expensive, a first round fits hidden states, and few steps that compare
predictions follow.
"""

from typing import Any

from sparsefw.errors import counted
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.model.activations import Placement, split_batches

# In windows of EVERY * MIN_TOKENS tokens or more, a step compares one token in EVERY, in TIMES times as many passes.
# If a head of more than SMALL_HEAD weights then still costs over twice as much as the block, the first round fits
# hidden states. Each later step compares MIN_TOKENS tokens, since reading the head's weights takes as long as
# multiplying this number of tokens. All later steps together cost SHARE times as much as the first round.
EVERY, MIN_TOKENS, SMALL_HEAD, TIMES, SHARE = 8, 64, 2**24, 2, 1.5


def tokens_and_steps(shape: ModelShape, seqlen: int, steps: int) -> tuple[int, list[int]]:
    """Choose how the last block is fitted to predictions.

    Args:
        shape: shape of the model.
        seqlen: tokens in a window.
        steps: steps of a round that fits hidden states.

    Returns:
        n, if a step compares one token in n; and the number of steps of each round. Further rounds have as many steps
        as the last round in the list. All rounds in the list but the last fit hidden states.
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
        "steps": the steps of a round in a block. "last": if the last block is fitted to predictions, the steps of each
        of its first rounds. Empty if no block is reconstructed.
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
    """Write the result of `reconstruction_steps` as a line for the plan and the log."""
    line = f"reconstruction: {counted(found['steps'], 'step')} a round, two rounds in most blocks"
    rounds = " + ".join(map(str, found.get("last", ())))
    return f"{line}; {rounds} in the last block" if rounds else line
