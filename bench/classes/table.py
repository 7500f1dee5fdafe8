"""docs/models.md, made of the results of the sweep."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from classes.answers import WITHIN
from classes.examine import NOT_RUN, OUTCOMES, REFUSED, TRACEBACK, WORKS, WRONG

MEANING = {
    WORKS: "pruned, verified, loaded by plain transformers; perplexities are those of plain transformers",
    REFUSED: "one line says why, and nothing is written",
    TRACEBACK: "a mistake in this package",
    WRONG: "a mistake in this package: the run ends well, and a comparison fails",
    NOT_RUN: "transformers itself does not build, run or reload the class on token ids alone",
}
SHARED = {
    "BRANCHES": "the beginnings of requests, such as a question with several answers, are computed once",
    "BEGINNINGS": "a request that another one begins with costs nothing, and rows are padded",
    "NOTHING": "equal requests are computed once",
}
KINDS = {"text": "text", "image": "image and text", "audio": "audio and text"}
GIB = 2**30

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

ANSWERED = """\
`python bench/sweep.py --answers` has each class answer requests, one block at a time: questions with several answers,
a single token, more tokens than are read. Plain transformers answers one request after the other. In fp32 all
log-likelihoods are the same within {within:g} nats; the largest difference is {largest:.2g}. What requests share is
found by trial, and is the same in bf16.
"""


def page(results: dict[str, Any], layers: int, tolerance: float, answers: dict[str, Any]) -> str:
    """The content of docs/models.md.

    Args:
        results: content of the results file.
        layers: layers of a tiny model.
        tolerance: relative tolerance of perplexities.
        answers: rows of the classes that have answered requests.
    """
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))
    rows = sorted(results["rows"].values(), key=lambda row: (row["model_type"].lower(), row["class"]))
    parts = [HEAD.format(layers=layers, tolerance=tolerance, versions=versions)]
    parts += ["\n".join(_summary(rows)), "\n".join(_answers(list(answers.values())))]
    parts.append("\n".join(_plans(results.get("plans", []))))
    parts.append("\n".join(_classes(rows)))
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


def _answers(rows: list[dict[str, Any]]) -> Iterator[str]:
    works = [row for row in rows if row["outcome"] == WORKS]
    if not works:
        return
    yield "## Evaluation"
    yield ""
    largest = max(row["difference"] for row in works)
    yield ANSWERED.format(within=WITHIN, largest=largest)
    yield from _head(["shared", "classes", "what it means"])
    counts = Counter(row["sharing"] for row in works)
    for sharing, meaning in SHARED.items():
        yield _line([sharing.lower(), str(counts[sharing]), meaning])
    for row in rows:
        if row["outcome"] in (REFUSED, TRACEBACK, WRONG):
            yield ""
            yield f"{row['class']} ({row['model_type']}) is {row['outcome']}: {_escaped(row['reason'])}"


def _plans(plans: list[dict[str, Any]]) -> Iterator[str]:
    if not plans:
        return
    yield "## Models of real size"
    yield ""
    yield "What `sparsefw.plan` says of a `config.json`, for 256 windows of 2048 tokens on one H100, or on an H200"
    yield "where that is too small, and there without a reconstruction, which has no room beside hundreds of experts."
    yield "**Not measured.**"
    yield ""
    yield from _head(["model", "class", "parameters, 10^9", "peak GPU, GiB", "peak host, GiB", "Pflop", "output, GB"])
    for plan in plans:
        if "refused" in plan:
            yield _line([plan["model"], f"refused: {_escaped(plan['refused'])}", *[""] * 5])
            continue
        numbers = [
            f"{plan['parameters'] / 1e9:.1f}",
            f"{plan['gpu_bytes'] / GIB:.1f}",
            f"{plan['host_bytes'] / GIB:.1f}",
            f"{plan['pflop']:,.0f}",
            f"{plan['output_bytes'] / 1e9:.0f}",
        ]
        yield _line([plan["model"], plan["class"], *numbers])
    yield ""
    yield "```sh"
    yield from (plan["command"] for plan in plans)
    yield "```"


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
