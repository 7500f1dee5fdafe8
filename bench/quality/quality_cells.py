"""The cells of the quality study: which rows its tables have, and which runs they need."""

from dataclasses import dataclass

PATTERNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
# The pattern of the paper's claims: rows of a matrix share one budget.
OF_LAYER = "layer:0.6"
WANDA, SPARSEGPT, DEFAULT = "Wanda", "SparseGPT", "the default"
ONE_SWAPS, ADMM = "best 1-swaps from Wanda", "ADMM"
PAPER = "the paper's (`--preset paper`)"
PAPER_SHORT = "the paper's (`--preset paper --steps 100`)"
MASKS = "masks only (`--refit 0`)"
MASKS_OF_TARGETS = "masks only, of the dense model's outputs (`--refit 0 --target dense`)"
LAYERWISE = "layer by layer (`--target layer --reconstruct 0`)"
UNRECONSTRUCTED = "without reconstruction (`--reconstruct 0`)"
WANDA_RECONSTRUCTED = "Wanda, reconstructed (`--method wanda --reconstruct 2`)"

# Name in the tables and the results: flags of the run. A line here is a row of every table that has all rows.
METHODS = {
    "magnitude": ("--method", "magnitude"),
    WANDA: ("--method", "wanda"),
    "RIA": ("--method", "ria"),
    ONE_SWAPS: ("--method", "one-swaps"),
    PAPER_SHORT: ("--preset", "paper", "--steps", "100"),
    PAPER: ("--preset", "paper"),
    MASKS: ("--refit", "0"),
    MASKS_OF_TARGETS: ("--refit", "0", "--target", "dense"),
    SPARSEGPT: ("--method", "sparsegpt"),
    ADMM: ("--method", "admm"),
    LAYERWISE: ("--target", "layer", "--reconstruct", "0"),
    UNRECONSTRUCTED: ("--reconstruct", "0"),
    WANDA_RECONSTRUCTED: ("--method", "wanda", "--reconstruct", "2"),
    "SparseGPT, reconstructed (`--method sparsegpt --reconstruct 2`)": ("--method", "sparsegpt", "--reconstruct", "2"),
    "masks only, reconstructed (`--refit 0 --reconstruct 2`)": ("--refit", "0", "--reconstruct", "2"),
    DEFAULT: (),
}

# Rows that explain others, or take hours a cell, are measured at some patterns.
ONE_OF_EACH_KIND = ("0.6", "2:4")
MEASURED_AT = {
    **{method: ONE_OF_EACH_KIND for method in METHODS if "reconstructed" in method},
    ONE_SWAPS: ONE_OF_EACH_KIND,
    PAPER_SHORT: ("0.6",),
    PAPER: ("0.5", "0.6", OF_LAYER, "2:4"),
    MASKS_OF_TARGETS: ("0.6",),
    LAYERWISE: ONE_OF_EACH_KIND,
}

# Calibration windows of the tables, their tokens, and seed of their drawing. Which rows have further seeds.
NSAMPLES, SEQLEN, EVAL_WINDOWS, SEEDS = 64, 512, 20, (0, 1, 2)
ROWS_OF_SEEDS = (WANDA, MASKS, SPARSEGPT, UNRECONSTRUCTED, DEFAULT)

# The texts that a cell may be calibrated on: the study's calibration text, and the reference's calibration part.
OWN, REFERENCE = "own", "reference"
ROWS_ON_REFERENCE = (WANDA, SPARSEGPT, DEFAULT)

# Rows of the cells that are calibrated on more windows, too, and on how many.
ROWS_OF_WINDOWS, MORE_WINDOWS = (SPARSEGPT, UNRECONSTRUCTED, WANDA_RECONSTRUCTED, DEFAULT), 256


@dataclass(frozen=True)
class Cell:
    """One run of the study: a row of the tables, at a pattern, with calibration windows of a seed and a text."""

    method: str
    pattern: str
    seed: int = 0
    nsamples: int = NSAMPLES
    calibrated_on: str = OWN

    @property
    def key(self) -> str:
        """Its name in the results."""
        on = "" if self.calibrated_on == OWN else f" | calibrated on {self.calibrated_on}"
        return f"{self.method} | {self.pattern} | seed {self.seed} | {self.nsamples} windows{on}"


def cells() -> list[Cell]:
    """Every cell that the tables of the documents are made of."""
    patterns = (*PATTERNS, OF_LAYER)
    found = [Cell(method, p) for p in patterns for method in METHODS if p in MEASURED_AT.get(method, PATTERNS)]
    found += [Cell(method, p, seed) for seed in SEEDS[1:] for p in ONE_OF_EACH_KIND for method in ROWS_OF_SEEDS]
    found += [Cell(method, "0.6", calibrated_on=REFERENCE) for method in ROWS_ON_REFERENCE]
    return found + [Cell(method, "0.6", nsamples=MORE_WINDOWS) for method in ROWS_OF_WINDOWS]
