"""docs/models.md, made of the results of the sweep."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from classes.examine import NOT_RUN, OUTCOMES, REFUSED, TRACEBACK, WORKS, WRONG

MEANING = {
    WORKS: "pruned, verified, loaded by plain transformers; perplexities are those of plain transformers",
    REFUSED: "one line says why, and nothing is written",
    TRACEBACK: "a mistake in this package",
    WRONG: "a mistake in this package: the run ends well, and a comparison fails",
    NOT_RUN: "transformers itself does not build, run or reload the class on token ids alone",
}
KINDS = {"text": "text", "image": "image and text", "audio": "audio and text"}

HEAD = """\
# Which models can be pruned

`python bench/sweep.py` makes this page; do not edit it. It tries every class of transformers that generates text. A
class gets a tiny random checkpoint: its own default config, with {layers} layers and small sizes. `sparsefw.run` prunes
it with few steps and otherwise default settings, and `sparsefw.verify` checks it. Then plain transformers loads it by
the class that its config names, and everything is compared: the names of the weights, the dense and the pruned
perplexity within {tolerance:g}, the zeros of every layer, all other weights bit for bit, and the routers of experts.

A tiny checkpoint shows that the mechanism fits the class. It shows nothing about quality.

Versions: {versions}.
"""


def page(results: dict[str, Any], layers: int, tolerance: float) -> str:
    """The content of docs/models.md.

    Args:
        results: content of the results file.
        layers: layers of a tiny model.
        tolerance: relative tolerance of perplexities.
    """
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    rows = sorted(results["rows"].values(), key=lambda row: (row["model_type"].lower(), row["class"]))
    parts = [HEAD.format(layers=layers, tolerance=tolerance, versions=versions)]
    parts += ["\n".join(_summary(rows)), "\n".join(_classes(rows))]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: list[str]) -> Iterator[str]:
    yield _line(cells)
    yield _line(["---"] * len(cells))


def _summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    counts = Counter((row["kind"], row["outcome"]) for row in rows)
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    yield from _head(["outcome", *(KINDS[kind] for kind in kinds), "what it means"])
    for outcome in OUTCOMES:
        yield _line([outcome, *(str(counts[kind, outcome]) for kind in kinds), MEANING[outcome]])


def _classes(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "## All classes"
    yield ""
    yield "Pruned: share of the weights in the blocks' matrices. Dense: matrices of which not all are pruned."
    yield "Of experts with `[*]` some are dense: the few windows send no token to them."
    yield ""
    yield from _head(["model type", "class", "outcome", "pruned", "dense, or the reason"])
    for row in rows:
        dense = ", ".join(f"`{name}`" for name in row.get("dense", []))
        pruned = f"{100 * row['fraction']:.1f} %" if row["outcome"] == WORKS else ""
        why = dense if row["outcome"] == WORKS else _escaped(row["reason"])
        yield _line([row["model_type"], row["class"], row["outcome"], pruned, why])


def _escaped(text: str) -> str:
    """Text for a cell: no sign in it has a meaning in Markdown."""
    text = "".join(f"\\{char}" if char in r"\|<>*_[]`" else char for char in text)
    return text if len(text) <= 240 else f"{text[:240].rstrip(chr(92))}..."
