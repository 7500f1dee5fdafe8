"""The tables that the quality study prints: by pattern, number of calibration windows, and calibration text."""

from collections.abc import Sequence

from quality_cells import OWN, Cell
from quality_results import commit_of


def tables(results: dict, cells: Sequence[Cell]) -> str:
    """Markdown of the cells in the results."""
    groups: dict[tuple[str, int, str], dict[str, list[dict]]] = {}
    for cell in (cell for cell in cells if cell.key in results["cells"]):
        rows = groups.setdefault((cell.pattern, cell.nsamples, cell.calibrated_on), {})
        rows.setdefault(cell.method, []).append(results["cells"][cell.key])
    return "\n\n".join(_table(*group, rows) for group, rows in groups.items())


def _table(pattern: str, nsamples: int, calibrated_on: str, rows: dict[str, list[dict]]) -> str:
    every = [run for runs in rows.values() for run in runs]
    # A cell lacks a text that the study has got since.
    dense = {text: perplexity for run in every for text, perplexity in run["dense"].items()}
    head = ["method", *(f"perplexity, {text}" for text in dense), "mask only", "relative error", "seconds", "commit"]
    on = "" if calibrated_on == OWN else f" of the {calibrated_on}"
    lines = [f"Sparsity {pattern}, {nsamples} calibration windows{on}", "", line(head), line(["---"] * len(head))]
    lines.append(line(["dense", *(f"{perplexity:.2f}" for perplexity in dense.values()), "", "", "", ""]))
    for name, runs in rows.items():
        cells = [mean_and_spread([run["perplexity"].get(text) for run in runs]) for text in dense]
        for what in ("relative_mask", "relative_error"):
            # An error relative to another saliency's mask cannot be compared with those relative to Wanda's.
            comparable = runs[0]["warm_start"] == "wanda"
            cells.append(mean_and_spread([run[what] for run in runs], 3) if comparable else "")
        cells.append(mean_and_spread([run["seconds"]["solve"] for run in runs], 0))
        lines.append(line([name, *cells, ", ".join(dict.fromkeys(map(commit_of, runs)))]))
    return "\n".join(lines)


def line(cells: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


def mean_and_spread(values: Sequence[float | None], digits: int = 2) -> str:
    """The mean; of several values also maximum - minimum, in brackets. Nothing if a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    mean = f"{sum(known) / len(known):.{digits}f}"
    return f"{mean} ({max(known) - min(known):.{digits}f})" if len(known) > 1 else mean
