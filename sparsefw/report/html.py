"""report.html: what report.json holds, on one page that loads nothing.

Numbers become text, paths and positions here; page.html lays them out. Charts are 1000 wide and 1000 high, whatever
their size on the screen. Names in a checkpoint are not trusted: every text is escaped, characters that do not print are
spelled out, nothing is a link, and the page's own policy lets a browser run only the one script of the template.
"""

import base64
import hashlib
import math
import re
import shlex
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from sparsefw.report import charts
from sparsefw.report.charts import Placed, mean
from sparsefw.solver.methods import Settings

TEMPLATE = Path(__file__).with_name("page.html")

# A longer table of layers is left to report.json: a browser would crawl.
MOST_ROWS = 2000

COLUMNS = ("layer", "shape", "method", "steps", "error", "mask only", "relative", "gap", "seconds")
TYPE_COLUMNS = ("type", "method", "layers", "mask only", "relative", "least", "greatest", "seconds")

# A slice of a stacked parameter, or the place in a list of modules.
_EXPERT = re.compile(r"(?<![^.\[])\d+(?![^.\]])")


def page(content: dict) -> str:
    """The page of a run.

    Args:
        content: what report.json holds.

    Returns:
        An HTML document.

    Raises:
        ValueError: a layer lies in none of the blocks.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = _sha256
    arguments, blocks = content["arguments"], content["blocks"]
    numbers = [block["block"] for block in blocks]
    methods = [*arguments["compare"], arguments["method"]]
    rows = _placed(content["layers"], {block["name"]: i for i, block in enumerate(blocks)})
    flat = [m for m in methods if all(row["relative_mask"] == row["relative_error"] == 1 for *_, row in rows[m])]
    curved = [m for m in methods if m not in flat]
    errors = charts.errors(rows, curved, numbers) if curved else {}
    found = [phase for block in blocks for phase in block["seconds"]] + [span["phase"] for span in content["timeline"]]
    phases = charts.ordered(charts.PHASES, found)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        arguments=arguments,
        summary=_summary(content["layers"], arguments["method"], len(blocks)),
        results=_results(content, methods),
        method=arguments["method"],
        compare=arguments["compare"],
        facts=_facts(content),
        flat=flat,
        curved=curved,
        # Classes of the style sheet.
        method_colours={m: f"m{i}" for i, m in enumerate(reversed(methods))},
        phase_colours={phase: f"p{[*charts.PHASES, phase].index(phase)}" for phase in phases},
        errors=errors,
        bands=any(mark["class"] == "band" for chart in errors.values() for mark in chart["marks"]),
        type_columns=TYPE_COLUMNS,
        types=_types(rows, curved),
        columns=COLUMNS,
        layers=[_cells(row) for row in content["layers"]] if len(content["layers"]) <= MOST_ROWS else None,
        count=len(content["layers"]),
        time=charts.time(blocks, phases),
        memory=charts.memory(blocks, content.get("memory", {})),
        block_columns=["block", "name", *phases, "host GiB", "GPU GiB"],
        block_rows=[_block_cells(block, phases) for block in blocks],
        timeline=charts.timeline(content["timeline"], blocks, phases),
        kept_dense=_kept_dense(content["kept_dense"], [block["name"] for block in blocks]),
        command=_command(arguments, methods),
    )


def _printable(value: Any) -> Any:
    """A text with every character that does not print (controls, marks that turn its direction) spelled out."""
    if type(value) is not str or value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def _sha256(text: str) -> str:
    """The source expression of an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _place(name: str, blocks: dict[str, int]) -> tuple[int, str]:
    """The position of a tensor's block, and its type: its name in there, with the number of an expert left open."""
    for dot in re.finditer(r"\.", name):
        if (prefix := name[: dot.start()]) in blocks:
            return blocks[prefix], _EXPERT.sub("*", name[dot.end() :].removesuffix(".weight"))
    raise ValueError(f"{name}: in none of the blocks")


def _placed(layers: list[dict], blocks: dict[str, int]) -> dict[str, Placed]:
    """By method: (position of the block, type, row) of every layer."""
    placed = defaultdict(list)
    for row in layers:
        placed[row["method"]].append((*_place(row["name"], blocks), row))
    return placed


def _summary(layers: list[dict], method: str, blocks: int) -> str:
    own = [row for row in layers if row["method"] == method]
    kept, size = sum(row["kept"] for row in own), sum(math.prod(row["shape"]) for row in own)
    return f"{kept:,} of {size:,} weights kept ({kept / size:.1%}), in {len(own):,} layers of {blocks} blocks"


def _results(content: dict, methods: list[str]) -> dict[str, list]:
    """The table that ends a run's log, see `report.summary`."""
    evaluation = content["evaluation"]
    rows = []
    for name in (["dense"] if evaluation else []) + methods:
        cells = [f"{text['perplexity'][name]:.3f}" for text in evaluation]
        own = [row for row in content["layers"] if row["method"] == name]
        cells += [f"{mean([row[what] for row in own]):.4f}" if own else "" for what in charts.RELATIVE]
        rows.append((name, cells))
    return {"texts": [text["source"] for text in evaluation], "rows": rows}


def _stated(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_stated, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sized(name: str, value: Any) -> tuple[str, str]:
    """A fact about memory; bytes as GiB."""
    stated = f"{_gib(value)} GiB" if name.endswith("_bytes") and value is not None else _stated(value)
    return name.removesuffix("_bytes").replace("_", " "), stated


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _facts(content: dict) -> dict[str, list[tuple[str, str]]]:
    """Lists of facts by heading."""

    def text(one: dict) -> str:
        return f"{one['source']}: {one['windows']} windows of {one['seqlen']} tokens, sha256 {one['hash']}"

    memory = {**content.get("memory", {}), **{f"peak_{name}": n for name, n in content["peak_memory"].items()}}
    data = content["data"]
    return {
        "machine": [("device", content["device"]), *content["versions"].items()],
        "texts": [("calibration", text(data)), ("seed", str(data["seed"]))]
        + [("evaluation", text(one)) for one in content["evaluation"]],
        "memory": [_sized(name, value) for name, value in memory.items()],
        "seconds": [(phase, f"{seconds:.1f}") for phase, seconds in content["seconds"].items()],
        "arguments": [(name.replace("_", "-"), _stated(value)) for name, value in content["arguments"].items()],
    }


def _command(arguments: dict, methods: list[str]) -> list[str]:
    """The command line that these arguments came from, flag by flag, with all defaults spelled out."""
    # Refused beside methods that do not use them.
    unused = {field.name for field in fields(Settings)} - {"precision"} if "sparsefw" not in methods else set()
    parts = ["python -m sparsefw.run"]
    for name, value in arguments.items():
        if name in unused or value is None or value is False:
            continue
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            parts.append(flag if one is True else f"{flag} {shlex.quote(str(one))}")
    return parts


def _cells(row: dict) -> list[str]:
    """A layer's row as in the log, see `report.layer_row`."""
    return [
        row["name"],
        "x".join(map(str, row["shape"])),
        row["method"],
        str(row["steps"]),
        f"{row['error']:.4e}",
        f"{row['relative_mask']:.4f}",
        f"{row['relative_error']:.4f}",
        "-" if row["gap"] is None else f"{row['gap']:.4e}",
        f"{row['seconds']:.2f}",
    ]


def _types(rows: dict[str, list], methods: list[str]) -> list[list[str]]:
    """By type and method: layers, means, and the range of the relative error."""
    found = defaultdict(list)
    for m in methods:
        for _, kind, row in rows[m]:
            found[kind, m].append(row)
    table = []
    for (kind, m), layers in found.items():
        mask, error = ([row[what] for row in layers] for what in charts.RELATIVE)
        numbers = (mean(mask), mean(error), min(error), max(error))
        seconds = sum(row["seconds"] for row in layers)
        table.append([kind, m, str(len(layers)), *(f"{number:.4f}" for number in numbers), f"{seconds:.2f}"])
    return table


def _block_cells(block: dict, phases: list[str]) -> list[str]:
    seconds = [f"{block['seconds'][phase]:.2f}" if phase in block["seconds"] else "-" for phase in phases]
    return [str(block["block"]), block["name"], *seconds, _gib(block["host_bytes"]), _gib(block["gpu_bytes"])]


def _kept_dense(names: list[str], blocks: list[str]) -> dict[str, int]:
    """How many matrices of each type."""
    positions, counts = {name: i for i, name in enumerate(blocks)}, defaultdict(int)
    for name in names:
        counts[_place(name, positions)[1]] += 1
    return counts
