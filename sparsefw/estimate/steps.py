"""Count the steps of a block's reconstruction.

A pass makes a step for each micro-batch that is not held out, or for each piece of such a micro-batch.
"""

from typing import Any

from sparsefw.errors import counted
from sparsefw.estimate.workload import Workload
from sparsefw.model.activations import Placement, split_batches


def reconstruction_steps(workload: Workload, placement: Placement) -> dict[str, Any]:
    """Count the steps of a round of a block's reconstruction.

    Returns:
        "steps": the steps of a round in a block. Empty if no block is reconstructed.
    """
    passes = workload.config.reconstruct
    if not passes:
        return {}
    batch, windows = placement.batch, workload.windows
    of_step = placement.step or batch
    learned, _ = split_batches(-(-windows // batch))
    steps = passes * sum(-(-min(batch, windows - j * batch) // of_step) for j in learned)
    return {"steps": steps}


def reconstruction_line(found: dict[str, Any]) -> str:
    """Write the result of `reconstruction_steps` as a line for the plan and the log."""
    return f"reconstruction: {counted(found['steps'], 'step')} a round, two rounds in most blocks"
