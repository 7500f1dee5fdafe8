"""The tables of README.md and docs/results.md in Markdown, from the results of the study."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import quality_cells as study
import texts

# Names of the texts in the results.
TEXTS = {"Wikipedia": "wiki_test.txt", "news": "news.txt", "language reference": texts.TEST}
DENSE = "dense"

# The text of a table's cell, from the entry of a run.
Number = Callable[[dict], str]


def perplexity(*names: str) -> Number:
    """Perplexity on each of these texts."""
    return lambda run: " / ".join(f"{run['perplexity'][TEXTS[name]]:.1f}" for name in names)


def relative_error(run: dict) -> str:
    """Mean error of the layers relative to Wanda's mask."""
    return f"{run['relative_error']:.3f}"


def percent(pattern: str) -> str:
    """The head of a column: 60 % for 0.6."""
    return pattern if ":" in pattern else f"{100 * float(pattern):.0f} %"


def by_pattern(number: Number, patterns: Sequence[str] = study.PATTERNS) -> dict[str, tuple[str, dict, Number]]:
    """A column for each pattern."""
    return {percent(pattern): (pattern, {}, number) for pattern in patterns}


def by_text(**options: object) -> dict[str, tuple[str, dict, Number]]:
    """A column for each text, of cells at 0.6."""
    return {name: ("0.6", options, perplexity(name)) for name in TEXTS}


# By name: rows, and columns by their heads: pattern, other fields of the cells, number.
TABLES: dict[str, tuple[Sequence[str], Mapping[str, tuple[str, dict, Number]]]] = {
    "readme": (
        (study.WANDA, study.SPARSEGPT, study.ADMM, study.MASKS, study.UNRECONSTRUCTED, study.DEFAULT),
        by_pattern(perplexity("Wikipedia", "news")),
    ),
    "perplexity": ((DENSE, *study.METHODS), by_pattern(perplexity("Wikipedia", "news"))),
    "reference": ((DENSE, *study.METHODS), by_pattern(perplexity("language reference"))),
    "calibrated-on-reference": ((DENSE, *study.ROWS_ON_REFERENCE), by_text(calibrated_on=study.REFERENCE)),
    "windows": (study.ROWS_OF_WINDOWS, by_text(nsamples=study.MORE_WINDOWS)),
    "errors": (
        (study.ONE_SWAPS, study.PAPER_SHORT, study.PAPER, study.MASKS, study.SPARSEGPT, study.ADMM, study.LAYERWISE),
        by_pattern(relative_error, (*study.PATTERNS, study.OF_LAYER)),
    ),
}


def tables(results: dict) -> str:
    """All tables, each behind its name."""
    made = {name: table(rows, columns, results) for name, (rows, columns) in TABLES.items()}
    return "\n".join(f"{name}\n\n{text}" for name, text in (made | {"seeds": of_seeds(results)}).items())


def table(rows: Sequence[str], columns: Mapping[str, tuple[str, dict, Number]], results: dict) -> str:
    """One table. A cell that was not measured is empty."""
    lines = []
    for method in rows:
        cells = []
        for pattern, options, number in columns.values():
            # Every run has the dense model's perplexities.
            cell = study.Cell(study.WANDA if method == DENSE else method, pattern, **options)
            run = results["cells"].get(cell.key)
            cells.append(number({"perplexity": run["dense"]} if method == DENSE else run) if run else "")
        lines.append([label(method), *cells])
    return markdown(["", *columns], lines)


def of_seeds(results: dict) -> str:
    """Mean and (maximum - minimum) over the seeds."""
    heads = [(pattern, text) for pattern in study.ONE_OF_EACH_KIND for text in TEXTS]
    lines = []
    for method in study.ROWS_OF_SEEDS:
        cells = []
        for pattern, text in heads:
            runs = [results["cells"].get(study.Cell(method, pattern, seed).key) for seed in study.SEEDS]
            values = [run["perplexity"][TEXTS[text]] for run in runs if run]
            cells.append(f"{fmean(values):.1f} ({max(values) - min(values):.1f})" if all(runs) else "")
        lines.append([label(method), *cells])
    return markdown(["", *(f"{percent(pattern)}, {text}" for pattern, text in heads)], lines)


def label(method: str) -> str:
    """The label of a row: its name with its flags, or the place of its code."""
    if method in (study.ONE_SWAPS, study.ADMM):
        return f"{method} (in `bench/`)"
    flags = study.METHODS.get(method)
    return f"{method} (`{' '.join(flags)}`)" if flags and "`" not in method else method


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|\n" for line in lines)
