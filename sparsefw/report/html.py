"""report.html: the content of report.json on one page that loads nothing.

Numbers become text, paths and positions here, and page.html lays them out. Names in a checkpoint are not trusted. So
every text is escaped, characters that do not print are spelled out, and nothing is a link. The page's policy lets a
browser run only the one script of the template.
"""

import base64
import hashlib
import math
import shlex
from collections import defaultdict
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from sparsefw.errors import printable
from sparsefw.flags import flag_of
from sparsefw.report import charts, log
from sparsefw.report.charts import LayerAt
from sparsefw.report.content import (
    HIDDEN,
    Argument,
    BlockRecord,
    CalibrationText,
    EvaluationText,
    MemoryRecord,
    Report,
    amount,
    mean,
)
from sparsefw.report.kinds import kept_dense, locate, positions_of
from sparsefw.solver import LayerResult, PruneConfig

TEMPLATE = Path(__file__).with_name("page.html")

# A longer table of layers is left to report.json: a browser would crawl.
MOST_ROWS = 2000

TYPE_COLUMNS = ("type", "method", "layers", "mask only", "relative", "least", "greatest", "seconds")
# The legend of the chart of memory.
MEMORY_NAMES = {
    "host": "host, peak so far",
    "gpu": "GPU, tensors at the peak of the block",
    "reserved": "GPU, taken for them",
}
DENSE_COLUMNS = ("type", "matrices", "blocks")


def page(report: Report) -> str:
    """The page of a run.

    Args:
        report: report of the run.

    Returns:
        An HTML document.

    Raises:
        ValueError: a layer lies in none of the blocks.
    """
    located = _located(report)
    return _template().render(
        model=report.argument("model", str),
        sparsity=report.argument("sparsity", str),
        method=report.method,
        compare=report.compared,
        summary=_summary(report),
        results=_results(report),
        facts=_facts(report),
        dense_columns=DENSE_COLUMNS,
        kept_dense=kept_dense(report),
        command=_command(report),
        **_layers(report, located),
        **_blocks(report, located),
    )


@cache
def _template() -> Template:
    """The template, compiled once a process."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = _sha256
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _layers(report: Report, located: dict[str, list[LayerAt]]) -> dict[str, Any]:
    """The template's variables for the layers: charts and tables of their errors."""
    methods, layers = report.methods, report.layers
    flat = [m for m in methods if all(_is_flat(at.result) for at in located[m])]
    curved = [m for m in methods if m not in flat]
    errors = charts.errors(located, curved, [block.block for block in report.blocks]) if curved else {}
    return {
        "flat": flat,
        "curved": curved,
        # Classes of the style sheet.
        "method_colours": {m: f"m{i}" for i, m in enumerate(reversed(methods))},
        "errors": errors,
        "bands": any(mark["class"] == "band" for chart in errors.values() for mark in chart["marks"]),
        "type_columns": TYPE_COLUMNS,
        "types": _types(located, curved),
        "columns": log.COLUMNS,
        "layers": [log.layer_cells(layer) for layer in layers] if len(layers) <= MOST_ROWS else None,
        "count": len(layers),
    }


def _blocks(report: Report, located: dict[str, list[LayerAt]]) -> dict[str, Any]:
    """The template's variables for the blocks: charts and tables of their time and memory."""
    blocks = report.blocks
    names = [phase for block in blocks for phase in block.seconds] + [span.phase for span in report.timeline]
    phases = charts.ordered(charts.PHASES, names)
    reconstructed = any(block.reconstruction for block in blocks)
    pruned = {blocks[at.block].block for layers in located.values() for at in layers}
    return {
        # Classes of the style sheet.
        "phase_colours": {phase: f"p{[*charts.PHASES, phase].index(phase)}" for phase in phases},
        "time": charts.time(blocks, phases),
        "memory": charts.memory(blocks, report.memory.limits),
        "memory_names": MEMORY_NAMES,
        "block_columns": [
            *("block", "name", *phases, "host GiB", "GPU GiB", "GPU reserved GiB"),
            *(["loss before", "loss after"] if reconstructed else []),
            "calibration",
        ],
        "block_rows": [_block_cells(block, phases, reconstructed) for block in blocks],
        "timeline": charts.timeline(report.timeline, blocks, phases, pruned),
    }


def _printable(value: Any) -> Any:
    """A text with every character that does not print (controls, marks that turn its direction) spelled out."""
    return printable(value) if type(value) is str else value


def _sha256(text: str) -> str:
    """The source expression of an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _located(report: Report) -> dict[str, list[LayerAt]]:
    """All layers by method."""
    located, positions = defaultdict(list), positions_of(report)
    for layer in report.layers:
        located[layer.method].append(LayerAt(*locate(layer.name, positions), layer))
    return located


def _is_flat(layer: LayerResult) -> bool:
    """Whether a layer has the warm start's mask and unchanged weights."""
    return layer.relative_mask == layer.relative_error == 1


def _summary(report: Report) -> str:
    layers = report.layers_of(report.method)
    kept, size = sum(layer.kept for layer in layers), sum(math.prod(layer.shape) for layer in layers)
    dense = f"; {len(report.kept_dense):,} matrices kept dense" if report.kept_dense else ""
    return (
        f"{kept:,} of {size:,} weights kept ({kept / size:.1%}), in {len(layers):,} layers of {len(report.blocks)} "
        f"blocks{dense}"
    )


def _results(report: Report) -> dict[str, list[Any]]:
    """The table that ends a run's log, see `log.summary`."""
    texts = [text.source for text in report.evaluation]
    # The dense model has no errors.
    rows = [(name, cells + [""] * (len(texts) + 2 - len(cells))) for name, cells in log.result_rows(report)]
    return {"texts": texts, "rows": rows}


def _stated(value: Argument) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _facts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Lists of facts, (name, value), by heading."""
    data = report.data
    ranks = [(f"rank {n}", log.rank_line(rank)) for n, rank in enumerate(report.ranks)]
    return {
        "machine": [("device", report.device), *report.versions.items()],
        "texts": [("calibration", _text(data)), ("seed", str(data.seed))]
        + [("evaluation", _text(text)) for text in report.evaluation],
        "memory": _memory(report.memory, report.peak_memory),
        **({"ranks": ranks} if ranks else {}),
        "seconds": [(phase, f"{seconds:.1f}") for phase, seconds in report.seconds.items()],
        "arguments": [(name.replace("_", "-"), _stated(value)) for name, value in report.arguments.items()],
        **({"source": [("note", note) for note in report.notes]} if report.notes else {}),
    }


def _text(text: CalibrationText | EvaluationText) -> str:
    return f"{text.source}: {amount(text.source, text.windows, text.seqlen)}, sha256 {text.hash}"


def _memory(memory: MemoryRecord, peaks: dict[str, int]) -> list[tuple[str, str]]:
    measured = {name.removesuffix("_bytes").replace("_", " "): size for name, size in peaks.items()}
    return [
        *((f"{name} limit", f"{_gib(size)} GiB") for name, size in memory.limits.items()),
        *((f"{name} expected", f"{_gib(size)} GiB") for name, size in memory.expected.items()),
        ("activations", memory.activations),
        ("batch windows", str(memory.batch_windows)),
        ("solver", f"{_gib(memory.solver_bytes)} GiB"),
        ("read ahead", _stated(memory.read_ahead)),
        ("kept inputs", f"up to {memory.kept_width} entries" if memory.kept_width else "none"),
        *((f"peak {name}", f"{_gib(size)} GiB") for name, size in measured.items()),
    ]


def _command(report: Report) -> list[str]:
    """The command line of the run, flag by flag, with all defaults spelled out."""
    # The command line refuses flags that no method of the run uses.
    unused = {f.name for f in fields(PruneConfig) if f.metadata.get("frank_wolfe") and "sparsefw" not in report.methods}
    parts = ["python -m sparsefw.run"]
    for name, value in report.arguments.items():
        if name in unused or value is None or value is False:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            parts.append(flag_of(name) if item is True else f"{flag_of(name)} {shlex.quote(str(item))}")
    return parts


def _types(located: dict[str, list[LayerAt]], methods: list[str]) -> list[list[str]]:
    """By type and method: layers, means, and the range of the relative error."""
    groups: dict[tuple[str, str], list[LayerResult]] = defaultdict(list)
    for method in methods:
        for _, kind, layer in located[method]:
            groups[kind, method].append(layer)
    rows = []
    for (kind, method), layers in groups.items():
        errors = [layer.relative_error for layer in layers]
        numbers = (mean([layer.relative_mask for layer in layers]), mean(errors), min(errors), max(errors))
        seconds = sum(layer.seconds for layer in layers)
        rows.append([kind, method, str(len(layers)), *(f"{number:.4f}" for number in numbers), f"{seconds:.2f}"])
    return rows


def _block_cells(block: BlockRecord, phases: list[str], reconstructed: bool) -> list[str]:
    seconds = [f"{block.seconds[phase]:.2f}" if phase in block.seconds else "-" for phase in phases]
    peaks = block.host_bytes, block.gpu_bytes, block.gpu_reserved_bytes
    return [str(block.block), block.name, *seconds, *map(_gib, peaks), *_losses(block, reconstructed), block.way]


def _losses(block: BlockRecord, reconstructed: bool) -> list[str]:
    """A block's loss before and after its reconstruction, if the model's blocks were reconstructed."""
    if not reconstructed:
        return []
    found = block.reconstruction
    if not found:
        return ["-", "-"]
    notes = [] if found.loss == HIDDEN else [found.loss]
    notes += ["put back"] if found.put_back else []
    return [f"{found.before:.5f}", f"{found.after:.5f}" + (f" ({', '.join(notes)})" if notes else "")]
