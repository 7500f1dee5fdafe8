"""The tables that README.md and docs/results.md have of the quality study."""

import texts
from document_render import (
    DENSE,
    Column,
    Table,
    changes_of_perplexity,
    perplexities,
    relative_error,
    render,
    seconds,
    tflop,
)
from document_tasks import tasks_table
from quality_baselines import BASELINES
from quality_cells import (
    ADMM,
    DEFAULT,
    FURTHER_SEEDS,
    LAYERWISE,
    MASKS,
    MEASURED_AT,
    METHODS_OF_TABLE,
    MORE_WINDOWS,
    OF_LAYER,
    ONE_SWAPS,
    PAPER,
    PAPER_SHORT,
    PATTERN_OF_WINDOWS,
    PATTERN_ON_REFERENCE,
    PATTERNS,
    PATTERNS_OF_SEEDS,
    REFERENCE,
    ROWS_OF_SEEDS,
    ROWS_OF_WINDOWS,
    ROWS_ON_REFERENCE,
    SEED,
    SPARSEGPT,
    UNRECONSTRUCTED,
    WANDA,
    cells_of_everything,
)
from quality_results import commit_of
from quality_tables import line

# Names of the texts in the results.
WIKIPEDIA, NEWS = "wiki_test.txt", "news.txt"
TEXTS = {"Wikipedia": WIKIPEDIA, "news": NEWS, "language reference": texts.TEST}

# Options that are no more were compared with masks only of the same version. Its cells are kept beside later ones.
MASKS_THEN = f"{MASKS}, of version 0.1.0"


def label(method: str) -> str:
    """The label of a row: its name, with its flags or the place of its code."""
    flags = METHODS_OF_TABLE.get(method, [])
    if "`" in method or not flags:
        return method
    in_bench = flags[0] == "--method" and flags[1] in BASELINES
    return f"{method} (in `bench/`)" if in_bench else f"{method} (`{' '.join(flags)}`)"


def percent(pattern: str) -> str:
    """The head of a column: 60 % for 0.6."""
    return pattern if ":" in pattern else f"{100 * float(pattern):.0f} %"


ALL_ROWS = {label(method): method for method in METHODS_OF_TABLE}
BOTH = perplexities(WIKIPEDIA, NEWS)

TABLES = {
    "readme": Table(
        {label(method): method for method in (WANDA, SPARSEGPT, ADMM, MASKS, UNRECONSTRUCTED, DEFAULT)},
        {percent(pattern): Column(pattern, BOTH) for pattern in PATTERNS},
        strong=(DEFAULT,),
    ),
    "perplexity": Table(
        {DENSE: DENSE} | ALL_ROWS,
        {percent(pattern): Column(pattern, BOTH) for pattern in PATTERNS},
        strong=(MASKS, UNRECONSTRUCTED, DEFAULT),
    ),
    "seeds": Table(
        {label(method): method for method in ROWS_OF_SEEDS},
        {
            f"{percent(pattern)}, {name}": Column(pattern, perplexities(text), seeds=(SEED, *FURTHER_SEEDS))
            for pattern in PATTERNS_OF_SEEDS
            for name, text in TEXTS.items()
        },
    ),
    "reference": Table(
        {DENSE: DENSE} | ALL_ROWS,
        {percent(pattern): Column(pattern, perplexities(texts.TEST)) for pattern in PATTERNS},
        strong=(DEFAULT,),
    ),
    "calibrated-on-reference": Table(
        {DENSE: DENSE} | {label(method): method for method in ROWS_ON_REFERENCE},
        {
            name: Column(PATTERN_ON_REFERENCE, perplexities(text), calibrated_on=REFERENCE)
            for name, text in TEXTS.items()
        },
        strong=(DEFAULT,),
    ),
    "windows": Table(
        {label(method): method for method in ROWS_OF_WINDOWS},
        {name: Column(PATTERN_OF_WINDOWS, perplexities(text), nsamples=MORE_WINDOWS) for name, text in TEXTS.items()},
        strong=(DEFAULT,),
    ),
    "cost": Table(
        ALL_ROWS,
        {
            "Tflop": Column("0.6", tflop()),
            "Tflop, solves": Column("0.6", tflop("solve")),
            "seconds": Column("0.6", seconds()),
            "seconds, solves": Column("0.6", seconds("solve")),
        },
        strong=(DEFAULT,),
    ),
    "errors": Table(
        {label(method): method for method in (ONE_SWAPS, PAPER_SHORT, PAPER, MASKS, SPARSEGPT, ADMM, LAYERWISE)},
        {percent(pattern): Column(pattern, relative_error) for pattern in (*PATTERNS, OF_LAYER)},
    ),
    "paper": Table(
        {label(method): method for method in (WANDA, PAPER, MASKS)},
        {percent(pattern): Column(pattern, BOTH) for pattern in MEASURED_AT[PAPER]},
    ),
    "allocation": Table(
        {
            "the same in all blocks": MASKS_THEN,
            "by outliers (OWL)": f"{MASKS}, allocation owl",
            "by errors": f"{MASKS}, allocation error",
        },
        {"Wikipedia": Column("0.6", perplexities(WIKIPEDIA)), "news": Column("0.6", perplexities(NEWS))},
    ),
    "alpha": Table(
        {"Wikipedia / news": f"{MASKS}, alpha auto"},
        {
            percent(pattern): Column(pattern, changes_of_perplexity(WIKIPEDIA, NEWS), against=MASKS_THEN)
            for pattern in PATTERNS
        },
    ),
}


def document_tables(results: dict, tasks: dict) -> dict[str, str]:
    """Markdown of every table by its name; "" for one without any number.

    Args:
        results: the quality study's, from `quality_results.load`.
        tasks: those of bench/evaluation/study.py.
    """
    rendered = {name: render(table, results) for name, table in TABLES.items()}
    return rendered | {"code": code_table(results), "tasks": tasks_table(tasks)}


def code_table(results: dict) -> str:
    """Markdown of the code, versions and threads that made the cells of the tables, and how many cells each made."""
    versions = ("python", "torch", "transformers")
    rows: dict[tuple[str, ...], int] = {}
    for run in (results["cells"].get(cell.key) for cell in cells_of_everything()):
        if run:
            made = commit_of(run), *(run["versions"][name] for name in versions), str(run.get("threads", ""))
            rows[made] = rows.get(made, 0) + 1
    lines = [line(["commit", *versions, "threads", "cells"]), line(["---"] * 6)]
    lines += [line([*made, str(count)]) for made, count in rows.items()]
    return "\n".join(lines) + "\n" if rows else ""
