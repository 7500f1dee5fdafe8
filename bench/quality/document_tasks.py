"""The table that docs/results.md has of bench/evaluation/study.py."""

from pathlib import Path

from quality_tables import line

TASKS_RESULTS = Path(__file__).parents[1] / "results" / "evaluation-smollm2.json"

# Name of the column in the results, by its head.
COLUMNS = {
    "next sentence of four": "next_sentence acc_norm",
    "word of four": "word_choice acc",
    "sentence of two": "true_sentence acc",
    "last word": "word_cloze acc",
    "last word, perplexity": "word_cloze perplexity",
    "documents, word perplexity": "docs_rolling word_perplexity",
}
DENSE, STRONG = "dense", "the default"


def tasks_table(results: dict) -> str:
    """Markdown: accuracies in %; of pruned models differences from the dense one in brackets; pairs of models."""
    lines = [line(["", *COLUMNS]), line(["---"] * (len(COLUMNS) + 1))]
    for row, of_model in results["models"].items():
        cells = []
        for name in COLUMNS.values():
            value = _number(name, of_model[name]["value"])
            stderr = of_model[name]["stderr"] if row == DENSE else None
            change = f" ({_difference(name, *of_model[name]['difference'])})" if row != DENSE else ""
            cells.append(value + (f" ± {_number(name, stderr)}" if stderr is not None else "") + change)
        row = row.replace("%", " %")
        lines.append(line([f"**{row}**" if row.startswith(STRONG) else row, *cells]))
    for pair, of_pair in results["pairs"].items():
        lines.append(line([pair.replace("%", " %"), *(_difference(name, *of_pair[name]) for name in COLUMNS.values())]))
    return "\n".join(lines) + "\n"


def _difference(name: str, value: float, stderr: float) -> str:
    return f"{_number(name, value, '+')} ± {_number(name, stderr)}"


def _number(name: str, value: float, sign: str = "") -> str:
    scale, digits = (1, 0) if "perplexity" in name else (100, 1)
    return f"{scale * value:{sign}.{digits}f}"
