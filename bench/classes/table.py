"""Make docs/models.md of the results of the sweep."""

from collections import Counter
from typing import Any

from report import plain

from classes.examine import NOT_RUN, OUTCOMES, REFUSED, TOLERANCE, TRACEBACK, WORKS, WRONG
from classes.tiny_config import LAYERS

MEANING = {
    WORKS: "pruned, verified, packed, loaded by plain transformers; perplexities are those of plain transformers",
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
The output is packed and compared once more; {not_packed} of the classes that work are refused there, in a line.

A tiny checkpoint shows that the mechanism fits the class. It shows nothing about quality.

Versions: {versions}.
"""
CLASSES = """\
## All classes

Pruned: share of the weights in the blocks' matrices. Dense: matrices of which not all are pruned.
Of experts with `[*]` some are dense: the few windows send no token to them.
"""


def page(results: dict[str, Any]) -> str:
    """Make the content of docs/models.md of the content of the results file."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    rows = sorted(results["rows"].values(), key=lambda row: (row["model_type"].lower(), row["class"]))
    counts = Counter((row["kind"], row["outcome"]) for row in rows)
    summary = [["outcome", *KINDS.values(), "what it means"]]
    summary += [[end, *(str(counts[kind, end]) for kind in KINDS), MEANING[end]] for end in OUTCOMES]
    classes = [["model type", "class", "outcome", "pruned", "dense, or the reason"]]
    for row in rows:
        works = row["outcome"] == WORKS
        dense = ", ".join(f"`{name}`" for name in row.get("dense", []))
        pruned = f"{100 * row['fraction']:.1f} %" if works else ""
        classes.append([row["model_type"], row["class"], row["outcome"], pruned, dense if works else _escaped(row)])
    not_packed = sum(row.get("packed") is False for row in rows)
    head = HEAD.format(layers=LAYERS, tolerance=TOLERANCE, versions=versions, not_packed=not_packed)
    return f"{head}\n{plain(summary)}\n{CLASSES}\n{plain(classes)}"


def _escaped(row: dict[str, Any]) -> str:
    """Escape the reason of a row: no sign in it has a meaning in Markdown."""
    text = "".join(f"\\{char}" if char in r"\|<>*_[]`" else char for char in row["reason"])
    return text if len(text) <= 240 else f"{text[:240].rstrip(chr(92))}..."
