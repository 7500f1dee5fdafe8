"""How a table of the documents is made of the results of the quality study: rows, columns, and formats of numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quality_cells import NSAMPLES, OWN, SEED, Cell, same_settings
from quality_tables import line, mean_and_spread

# The row of the unpruned model. Every cell has its perplexities.
DENSE = "dense"

# Makes the text of a table's cell from the runs of its row, and of the row that it is compared with; "" if it cannot.
Number = Callable[[list[dict], list[dict]], str]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        pattern: sparsity of its cells.
        number: format of a row's runs.
        seeds: seeds of these runs; all of them must be there.
        nsamples: their calibration windows.
        calibrated_on: what they are calibrated on.
        against: method that `number` compares with; "" for none.
    """

    pattern: str
    number: Number
    seeds: tuple[int, ...] = (SEED,)
    nsamples: int = NSAMPLES
    calibrated_on: str = OWN
    against: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the documents.

    Attributes:
        rows: methods by the labels of their rows.
        columns: columns by their heads.
        strong: methods whose rows are bold.
    """

    rows: Mapping[str, str]
    columns: Mapping[str, Column]
    strong: Sequence[str] = ()


def render(table: Table, results: dict) -> str:
    """Markdown of a table. Rows and columns without any number are left out; "" if there is no number at all."""
    found = {
        label: {head: _number(results, method, column) for head, column in table.columns.items()}
        for label, method in table.rows.items()
    }
    heads = [head for head in table.columns if any(row[head] for row in found.values())]
    lines = [line(["", *heads]), line(["---"] * (len(heads) + 1))]
    for label, row in found.items():
        if any(row.values()):
            strong = table.rows[label] in table.strong
            cells = [label, *(row[head] for head in heads)]
            lines.append(line([f"**{cell}**" if strong and cell else cell for cell in cells]))
    return "\n".join(lines) + "\n" if heads else ""


def _number(results: dict, method: str, column: Column) -> str:
    """The text of a cell of the table; "" if there are no runs for it."""
    runs, others = _runs(results, method, column), _runs(results, column.against, column)
    return column.number(runs, others) if runs and (others or not column.against) else ""


def _runs(results: dict, method: str, column: Column) -> list[dict]:
    """The runs of a row for a column; none if a seed is missing, or seeds have been run with several settings."""
    if method == DENSE:
        # A run may lack a text that the study has got since.
        every = [run["dense"] for run in results["cells"].values() if _is_of(run, column)]
        return [{"perplexity": {text: value for dense in every for text, value in dense.items()}}] if every else []
    cells = [Cell(method, (), column.pattern, seed, column.nsamples, column.calibrated_on) for seed in column.seeds]
    runs = [results["cells"].get(cell.key) for cell in cells]
    return runs if all(runs) and (len(runs) == 1 or same_settings(runs)) else []


def _is_of(run: dict, column: Column) -> bool:
    return run["pattern"] == column.pattern and run.get("calibrated_on", OWN) == column.calibrated_on


def perplexities(*texts: str) -> Number:
    """Perplexity on each of these texts."""

    def number(runs: list[dict], _: list[dict]) -> str:
        values = [mean_and_spread([run["perplexity"].get(text) for run in runs], 1) for text in texts]
        return " / ".join(values) if all(values) else ""

    return number


def changes_of_perplexity(*texts: str) -> Number:
    """Change of the perplexity on each of these texts against another row, in %; of one seed."""

    def number(runs: list[dict], others: list[dict]) -> str:
        (run,), (other,) = runs, others
        changes = [run["perplexity"][text] / other["perplexity"][text] - 1 for text in texts]
        return " / ".join(f"{100 * change:+.1f}" for change in changes) + " %"

    return number


def relative_error(runs: list[dict], _: list[dict]) -> str:
    """Mean error of the layers relative to Wanda's mask."""
    return mean_and_spread([run["relative_error"] for run in runs], 3)


def tflop(*phases: str) -> Number:
    """Work of these phases as the plan counts it; without any, of all but the evaluation."""

    def number(runs: list[dict], _: list[dict]) -> str:
        plans = [run.get("plan") for run in runs]
        return mean_and_spread([_total(plan["tflop"], phases) for plan in plans], 1) if all(plans) else ""

    return number


def seconds(*phases: str) -> Number:
    """Seconds of these phases; without any, of all but the evaluation."""

    def number(runs: list[dict], _: list[dict]) -> str:
        # Cells that do not say their threads shared the processor with each other.
        alone = all("threads" in run for run in runs)
        return mean_and_spread([_total(run["seconds"], phases) for run in runs], 0) if alone else ""

    return number


def _total(by_phase: dict[str, float], phases: Sequence[str]) -> float:
    names = phases or [name for name in by_phase if name not in ("evaluate", "all")]
    return sum(by_phase.get(name, 0) for name in names)
