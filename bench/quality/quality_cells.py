"""The cells of the quality study: which rows its tables have, and which runs they need."""

from collections.abc import Sequence
from dataclasses import Field, dataclass, fields

from sparsefw.cli import inputs_and_config, run_parser
from sparsefw.solver import PruneConfig

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
SPARSEGPT_RECONSTRUCTED = "SparseGPT, reconstructed (`--method sparsegpt --reconstruct 2`)"
MASKS_RECONSTRUCTED = "masks only, reconstructed (`--refit 0 --reconstruct 2`)"

# Name in the tables and the results: flags of the run. A line here is a row of every table that has all rows.
METHODS_OF_TABLE = {
    "magnitude": ["--method", "magnitude"],
    WANDA: ["--method", "wanda"],
    "RIA": ["--method", "ria"],
    ONE_SWAPS: ["--method", "one-swaps"],
    PAPER_SHORT: ["--preset", "paper", "--steps", "100"],
    PAPER: ["--preset", "paper"],
    MASKS: ["--refit", "0"],
    MASKS_OF_TARGETS: ["--refit", "0", "--target", "dense"],
    SPARSEGPT: ["--method", "sparsegpt"],
    ADMM: ["--method", "admm"],
    LAYERWISE: ["--target", "layer", "--reconstruct", "0"],
    UNRECONSTRUCTED: ["--reconstruct", "0"],
    WANDA_RECONSTRUCTED: ["--method", "wanda", "--reconstruct", "2"],
    SPARSEGPT_RECONSTRUCTED: ["--method", "sparsegpt", "--reconstruct", "2"],
    MASKS_RECONSTRUCTED: ["--refit", "0", "--reconstruct", "2"],
    DEFAULT: [],
}

# Rows that explain others, or take hours a cell, are measured at some patterns.
ONE_OF_EACH_KIND = ("0.6", "2:4")
MEASURED_AT = {
    ONE_SWAPS: ONE_OF_EACH_KIND,
    PAPER_SHORT: ("0.6",),
    PAPER: ("0.5", "0.6", OF_LAYER, "2:4"),
    MASKS_OF_TARGETS: ("0.6",),
    LAYERWISE: ONE_OF_EACH_KIND,
    WANDA_RECONSTRUCTED: ONE_OF_EACH_KIND,
    SPARSEGPT_RECONSTRUCTED: ONE_OF_EACH_KIND,
    MASKS_RECONSTRUCTED: ONE_OF_EACH_KIND,
}

# Settings that are varied alone, at 0.6, from masks only and from the default without a reconstruction.
SETTINGS = {"alpha": (0.0, 0.25, 0.5, 0.75, 0.9), "penalty": (0.0, 1.0), "steps": (20, 30, 60)}

# Calibration windows of the tables, their tokens, and seed of their drawing. Which rows have further seeds, and where.
NSAMPLES, SEQLEN, SEED = 64, 512, 0
FURTHER_SEEDS, PATTERNS_OF_SEEDS = (1, 2), ONE_OF_EACH_KIND
ROWS_OF_SEEDS = (WANDA, MASKS, SPARSEGPT, UNRECONSTRUCTED, DEFAULT)

# The texts that a cell may be calibrated on: the study's calibration text, and the reference's calibration part.
OWN, REFERENCE = "own", "reference"
# Rows and pattern of the cells that are calibrated on the reference.
ROWS_ON_REFERENCE, PATTERN_ON_REFERENCE = (WANDA, SPARSEGPT, DEFAULT), "0.6"

# Rows and pattern of the cells that are calibrated on more windows, too, and on how many.
ROWS_OF_WINDOWS = (SPARSEGPT, UNRECONSTRUCTED, WANDA_RECONSTRUCTED, DEFAULT)
PATTERN_OF_WINDOWS, MORE_WINDOWS = "0.6", 256


@dataclass(frozen=True)
class Cell:
    """One run of the study.

    Attributes:
        method, flags: name and flags of the row.
        pattern: its sparsity.
        seed, nsamples: seed of the calibration windows, and their number.
        calibrated_on: OWN or REFERENCE.
        tuning: whether it is there to choose a setting. Such a cell is not evaluated on the reference.
    """

    method: str
    flags: tuple[str, ...]
    pattern: str
    seed: int = SEED
    nsamples: int = NSAMPLES
    calibrated_on: str = OWN
    tuning: bool = False

    @property
    def key(self) -> str:
        """Its name in the results."""
        on = "" if self.calibrated_on == OWN else f" | calibrated on {self.calibrated_on}"
        return f"{self.method} | {self.pattern} | seed {self.seed} | {self.nsamples} windows{on}"


def config_of(flags: Sequence[str]) -> PruneConfig:
    """The config of these flags of the run."""
    return inputs_and_config(run_parser(None).parse_args(list(flags)))[1]


def resolved(flags: Sequence[str], nsamples: int = NSAMPLES) -> dict:
    """The settings that a method's flags stand for, with defaults; only those that the method uses.

    A switch that is off and a number that is 0 are left out unless they are Frank-Wolfe's. So a cell that was made
    before there was such a setting is still the same cell.
    """
    config = config_of(flags).for_calibration(nsamples, SEQLEN)
    names = ["method"]
    for f in _fields_of(config.method):
        value = getattr(config, f.name)
        if f.metadata.get("frank_wolfe") or (isinstance(value, int | float) and value):
            names.append(f.name)
    return {name: getattr(config, name) for name in names}


def same_settings(runs: Sequence[dict]) -> bool:
    """Whether runs of a method differ in nothing that it uses. What older code did not know is not compared.

    Args:
        runs: entries of the results.
    """
    first, *others = (run["arguments"] for run in runs)
    names = {f.name for f in _fields_of(first["method"])}
    return all(first[name] == other[name] for other in others for name in names & first.keys() & other.keys())


def _fields_of(method: str) -> list[Field]:
    """The settings that a method may use: those of Frank-Wolfe's steps are for sparsefw alone."""
    return [f for f in fields(PruneConfig) if method == "sparsefw" or not f.metadata.get("frank_wolfe")]


def cells_of_everything() -> list[Cell]:
    """Every cell that the tables and figures of the documents are made of."""
    rows = [(method, tuple(flags)) for method, flags in METHODS_OF_TABLE.items()]
    patterns = (*PATTERNS, OF_LAYER)
    cells = [Cell(*row, pattern) for pattern in patterns for row in rows if _is_measured(row[0], pattern)]
    of_seeds = [row for row in rows if row[0] in ROWS_OF_SEEDS]
    cells += [Cell(*row, pattern, seed) for seed in FURTHER_SEEDS for pattern in PATTERNS_OF_SEEDS for row in of_seeds]
    on_reference = [row for row in rows if row[0] in ROWS_ON_REFERENCE]
    cells += [Cell(*row, PATTERN_ON_REFERENCE, calibrated_on=REFERENCE) for row in on_reference]
    of_windows = [row for row in rows if row[0] in ROWS_OF_WINDOWS]
    return cells + [Cell(*row, PATTERN_OF_WINDOWS, nsamples=MORE_WINDOWS) for row in of_windows]


def _is_measured(method: str, pattern: str) -> bool:
    return pattern in MEASURED_AT.get(method, PATTERNS)


def rows_of_table(settings: bool) -> list[tuple[str, list[str], tuple[str, ...]]]:
    """Method, flags and patterns of each row: of the methods, or of the study of settings."""
    if not settings:
        return [(name, flags, PATTERNS) for name, flags in METHODS_OF_TABLE.items()]
    rows = [(SPARSEGPT, METHODS_OF_TABLE[SPARSEGPT], (OF_LAYER,))]
    for base in (MASKS, UNRECONSTRUCTED):
        flags = METHODS_OF_TABLE[base]
        rows.append((base, flags, ("0.6", OF_LAYER)))
        for name, values in SETTINGS.items():
            # The row of the base has the value that the base has by itself.
            for value in (v for v in values if v != resolved(flags)[name]):
                rows.append((f"{base}, {name} {value:g}", [*flags, f"--{name}", f"{value:g}"], ("0.6",)))
    return rows


def named(name: str, methods: Sequence[str]) -> set[str]:
    """The method of this name; if there is none, the methods whose names contain it."""
    return {name} if name in methods else {method for method in methods if name in method}


def select(
    *,
    settings: bool = False,
    only: str = "",
    wanted: Sequence[str] | None = None,
    seeds: Sequence[int] = (SEED,),
    nsamples: Sequence[int] = (NSAMPLES,),
) -> list[Cell]:
    """The cells of a selection, pattern by pattern.

    Args:
        settings: whether to select the study of settings instead of the methods.
        only: a method, or text that the names of methods contain.
        wanted: patterns; None takes the study's own. Methods are run at any pattern, settings only at the study's.
        seeds, nsamples: seeds of the calibration, and numbers of its windows.
    """
    rows = rows_of_table(settings)
    chosen = named(only, [method for method, _, _ in rows])
    rows = [row for row in rows if row[0] in chosen]
    known = list(dict.fromkeys(pattern for _, _, where in rows for pattern in where))
    return [
        Cell(method, tuple(flags), pattern, seed, n, tuning=settings)
        for n in nsamples
        for seed in seeds
        for pattern in wanted or known
        for method, flags, where in rows
        if pattern in where or not settings
    ]
