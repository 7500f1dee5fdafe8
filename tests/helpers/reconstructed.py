"""Runs that fit the kept weights of each block together, and what they do seen from outside."""

from pathlib import Path

import pytest
from helpers import commands

from sparsefw.driver import prune as driver
from sparsefw.driver import reconstruct
from sparsefw.model.activations import BATCH_TOKENS
from sparsefw.report.content import Report, read_report
from sparsefw.solver.kept_weights import KeptWeights

SEQLEN, WINDOWS = 48, 8
SMALL = f"--nsamples {WINDOWS} --seqlen {SEQLEN} --seed 1 --kernel torch --precision ieee".split()
# The default with few steps, and without a reconstruction and a recovery unless a test asks for one.
# The damping is that of neither kind of run, so that runs with a reconstruction and without one can be compared.
QUICK = ["--steps", "2", "--refit", "1", "--rounds", "0", "--damp", "0.3", "--reconstruct", "0", "--recover", "0"]
METHODS = {
    "dense targets": QUICK,
    "masks only": ["--steps", "2", "--refit", "0"],
    "wanda": ["--method", "wanda"],
    "sparsegpt": ["--method", "sparsegpt"],
    "compared with sparsefw": ["--method", "wanda", "--compare", "sparsefw", *QUICK],
}

# Few steps, on models that are made of noise, gain by low rates only.
RATE = 0.02


def set_constants(patch: pytest.MonkeyPatch) -> None:
    """A low rate, and one window a micro-batch, so that runs without a reconstruction give the same bits."""
    for device in BATCH_TOKENS:
        patch.setitem(BATCH_TOKENS, device, SEQLEN)
    patch.setattr(reconstruct, "RATE", RATE)


class Seen:
    """Observations of a run from outside.

    Attributes:
        weights: by block, the tensors of the block before it is reconstructed.
        rates: the rates of all steps.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.weights = {}

        def spy(run, i, *args):
            self.weights[i] = {name: x.detach().cpu().clone() for name, x in run.model.blocks[i].named_parameters()}
            return reconstruct.reconstruct(run, i, *args)

        patch.setattr(driver, "reconstruct", spy)
        self.rates, step = [], KeptWeights.step
        patch.setattr(KeptWeights, "step", lambda weights, rate: self.rates.append(rate) or step(weights, rate))


def run(folder: Path, output: Path, *flags: str) -> tuple[Report, Seen]:
    """Prune the model of a folder on few windows; the report, and what was seen."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Seen(patch)
        assert commands.run(folder / "model", folder / "text.txt", output, *SMALL, *flags) == 0
    return read_report(output / "report.json"), seen
