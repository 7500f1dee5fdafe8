"""report.html: the content of report.json on one page that loads nothing.

Numbers become text, paths and positions here, and page.html lays them out. Names in a checkpoint are not trusted. So
every text is escaped, characters that do not print are spelled out, and nothing is a link.

A chart is 1000 wide and 1000 high, whatever its size on the screen; y points down. Its `marks` are paths, each with
the kind of mark (line, mask, band, dots, fill) and the name that its colour stands for. Its `hits` are the areas that
show a title when they are pointed at, one for each block. Its `x` and `y` are ticks, (position, label).
"""

import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from sparsefw.errors import printable
from sparsefw.flags import flag_of
from sparsefw.report import log
from sparsefw.report.content import HIDDEN, BlockRecord, Report, amount
from sparsefw.solver.config import PruneConfig
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import Span

TEMPLATE = Path(__file__).with_name("page.html")

# A longer table of layers is left to report.json: a browser would crawl.
MOST_ROWS = 2000

# Phases in the order of their colours. Other phases have the last colour.
PHASES = ("solve", "calibrate", "forward", "evaluate", "read", "write", "reconstruct", "embed", "wait")
LANES = ("main", "read", "write")

# Up to this many blocks, the timeline shows the whole run first.
FEW_BLOCKS = 4

# Most dots on a line. More would run into each other.
MOST_DOTS = 48

# Peaks of a block by their names in the chart of memory, and in the table of blocks.
PEAKS = {"host": "host_bytes", "gpu": "gpu_bytes", "reserved": "gpu_reserved_bytes"}
PEAK_COLUMNS = ("host GiB", "GPU GiB", "GPU reserved GiB")

# A chart, or a mark of it, as the template reads it; and values of the y axis by position of the block.
Chart = dict[str, Any]
Values = Mapping[Any, float]


def page(report: Report) -> str:
    """The page of a run.

    Args:
        report: report of the run.

    Returns:
        An HTML document.

    Raises:
        ValueError: a layer lies in none of the blocks.
    """
    blocks = report.blocks
    errors = error_charts(report)
    names = [phase for block in blocks for phase in block.seconds] + [span.phase for span in report.timeline]
    phases = _ordered(PHASES, names)
    return _template().render(
        report=report,
        log=log,
        summary=_summary(report),
        facts=_facts(report),
        command=_command(report),
        # Classes of the style sheet.
        method_colours={m: f"m{i}" for i, m in enumerate(reversed(report.methods))},
        phase_colours={phase: f"p{[*PHASES, phase].index(phase)}" for phase in phases},
        errors=errors,
        bands=any(mark["class"] == "band" for chart in errors.values() for mark in chart["marks"]),
        layers=[log.layer_cells(layer) for layer in report.layers] if len(report.layers) <= MOST_ROWS else None,
        time=time_chart(blocks, phases),
        memory=memory_chart(blocks, report.memory.limits),
        block_columns=["block", "name", *phases, *PEAK_COLUMNS, "loss before", "loss after", "calibration"],
        block_rows=[_block_cells(block, phases) for block in blocks],
        timeline=timeline(report.timeline, blocks, phases),
    )


@cache
def _template() -> Template:
    """The template, compiled once a process. A text has every character that does not print spelled out."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _summary(report: Report) -> str:
    layers = report.layers_of(report.method)
    kept, size = sum(layer.kept for layer in layers), sum(math.prod(layer.shape) for layer in layers)
    dense = f"; {len(report.kept_dense):,} matrices kept dense" if report.kept_dense else ""
    return (
        f"{kept:,} of {size:,} weights kept ({kept / size:.1%}), in {len(layers):,} layers of {len(report.blocks)} "
        f"blocks{dense}"
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _facts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Lists of facts, (name, value), by heading."""
    memory = report.memory
    sizes = {"limit": memory.limits, "expected": memory.expected, "peak": report.peak_memory}
    sizes["most at once"] = {"solver": memory.solver_bytes}
    placement = ("activations", "batch_windows", "read_ahead", "kept_width")
    texts = [("calibration", report.data), *(("evaluation", text) for text in report.evaluation)]
    facts = {
        "machine": [("device", report.device), *report.versions.items()],
        "texts": [(n, f"{amount(t.source, t.windows, t.seqlen)} of {t.source}, sha256 {t.hash}") for n, t in texts],
        "memory": [
            (f"{kind}, {what.removesuffix('_bytes').replace('_', ' ')}", f"{_gib(size)} GiB")
            for kind, of_kind in sizes.items()
            for what, size in of_kind.items()
        ]
        + [(name.replace("_", " "), str(getattr(memory, name))) for name in placement],
        "ranks": [(f"rank {n}", log.rank_line(rank)) for n, rank in enumerate(report.ranks)],
        "seconds": [(phase, f"{seconds:.1f}") for phase, seconds in report.seconds.items()],
        "source": [("note", note) for note in report.notes],
    }
    return {heading: found for heading, found in facts.items() if found}


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


def _block_cells(block: BlockRecord, phases: list[str]) -> list[str]:
    """A block's seconds, peaks, and losses before and after its reconstruction."""
    seconds = [f"{block.seconds[phase]:.2f}" if phase in block.seconds else "-" for phase in phases]
    peaks = [_gib(getattr(block, name)) for name in PEAKS.values()]
    losses, found = ["-", "-"], block.reconstruction
    if found:
        notes = ([] if found.loss == HIDDEN else [found.loss]) + ["put back"] * found.put_back
        losses = [f"{found.before:.5f}", f"{found.after:.5f}" + (f" ({', '.join(notes)})" if notes else "")]
    return [str(block.block), block.name, *seconds, *peaks, *losses, block.way]


def _ordered(known: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names, each once: first the known ones, in their order."""
    return sorted(dict.fromkeys(names), key=lambda name: [*known, name].index(name))


class _Axes:
    """The axes of a chart over the blocks: y goes from 0 to a little above the greatest value."""

    def __init__(self, numbers: list[int], values: Iterable[float]) -> None:
        self.numbers, self.width = numbers, 1000 / len(numbers)
        self.top = max((value for value in values if math.isfinite(value)), default=0.0) * 1.05 or 1.0

    def line(self, kind: str, colour: str, values: Values, back: Values | None = None) -> Chart:
        """A line through values, and back through others; or dots at them, if they would not run into each other."""
        pairs = [*sorted(values.items()), *sorted((back or {}).items(), reverse=True)]
        points = [self._point(i, v) for i, v in pairs if math.isfinite(v)]
        if kind == "dots":
            # Lines of no length, which their round ends make dots.
            path = "".join(f"M{point}h0" for point in points) if len(points) <= MOST_DOTS else ""
        else:
            path = "M" + "L".join(points) if points else ""
        return {"class": kind, "colour": colour, "path": path}

    def bars(self, colour: str, lows: list[float], heights: list[float]) -> Chart:
        """Bars, one for each block."""
        corners = [
            [self._point(i + x, y) for x, y in ((-0.4, low), (-0.4, low + height), (0.4, low + height), (0.4, low))]
            for i, (low, height) in enumerate(zip(lows, heights, strict=True))
            if height
        ]
        return {"class": "fill", "colour": colour, "path": "".join(f"M{'L'.join(points)}z" for points in corners)}

    def chart(self, marks: list[Chart], titles: Sequence[str]) -> Chart:
        """The chart of marks, with a title for each block: none where that is empty."""
        hits = [
            (f"{i * self.width:.4g}", f"{self.width:.4g}", f"block {number}: {title}")
            for i, (number, title) in enumerate(zip(self.numbers, titles, strict=True))
            if title
        ]
        blocks = _ticks(len(self.numbers) - 1, 7, whole=True)
        return {
            "y": [(f"{self._y(value):.4g}", label) for value, label in _ticks(self.top, 5)],
            "x": [(f"{(i + 0.5) * self.width:.4g}", str(self.numbers[round(i)])) for i, _ in blocks],
            "marks": [mark for mark in marks if mark["path"]],
            "hits": hits,
        }

    def _point(self, i: float, value: float) -> str:
        return f"{(i + 0.5) * self.width:.4g} {self._y(value):.4g}"

    def _y(self, value: float) -> float:
        return 1000 - value * 1000 / self.top


def _ticks(high: float, most: int, whole: bool = False) -> list[tuple[float, str]]:
    """Values from 0 with their labels: multiples of 1, 2 or 5 times a power of ten, about `most` of them."""
    least = high / most or 1.0
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(n * step, f"{n * step:.{digits}f}") for n in range(math.floor(high / step + 1e-9) + 1)]


def error_charts(report: Report) -> dict[str, Chart]:
    """Relative errors of the layers by method: a chart for each type of layer, all of one scale."""
    positions, scale = log.positions_of(report), [1.0]
    found: dict[str, dict[str, dict[int, list[LayerResult]]]] = defaultdict(lambda: defaultdict(dict))
    for layer in report.layers:
        position, kind = log.locate(layer.name, positions)
        found[kind][layer.method].setdefault(position, []).append(layer)
        scale += [layer.relative_mask, layer.relative_error]
    axes, charts = _Axes([block.block for block in report.blocks], scale), {}
    for kind, by_method in found.items():
        marks, titles = list[Chart](), [list[str]() for _ in report.blocks]
        for method, of_blocks in by_method.items():
            errors = {i: [layer.relative_error for layer in layers] for i, layers in of_blocks.items()}
            low, high, means = ({i: pick(values) for i, values in errors.items()} for pick in (min, max, fmean))
            masks = {i: fmean(layer.relative_mask for layer in layers) for i, layers in of_blocks.items()}
            marks += [axes.line("band", method, high, low)] if low != high else []
            marks += [axes.line("mask", method, masks)] if masks != means else []
            marks += [axes.line("line", method, means), axes.line("dots", method, means)]
            for i, values in errors.items():
                n = len(values)
                spread = f" (mean of {n}, {low[i]:.4f} to {high[i]:.4f})" if n > 1 else ""
                titles[i].append(f"{method} {means[i]:.4f}{spread}, mask only {masks[i]:.4f}")
        charts[kind] = axes.chart(marks, ["; ".join(of_block) for of_block in titles])
    return charts


def time_chart(blocks: list[BlockRecord], phases: list[str]) -> Chart:
    """Seconds of each block by phase, stacked."""
    axes = _Axes([block.block for block in blocks], (sum(block.seconds.values()) for block in blocks))
    lows, marks = [0.0] * len(blocks), []
    for phase in phases:
        seconds = [block.seconds.get(phase, 0.0) for block in blocks]
        marks.append(axes.bars(phase, lows, seconds))
        lows = [low + n for low, n in zip(lows, seconds, strict=True)]
    titles = [
        f"{sum(block.seconds.values()):.2f} s "
        f"({', '.join(f'{phase} {block.seconds[phase]:.2f}' for phase in phases if phase in block.seconds)})"
        for block in blocks
    ]
    return axes.chart(marks, titles)


def memory_chart(blocks: list[BlockRecord], limits: dict[str, int]) -> Chart:
    """Peaks of memory in GiB, and the limits that are near them.

    The chart also has `used`, the peaks that are not zero, and `limits`, (place, GiB) of the limits drawn.

    Args:
        blocks: the blocks, with their peaks in bytes.
        limits: memory limits in bytes, by place.
    """
    peaks = {name: [getattr(block, field) / 2**30 for block in blocks] for name, field in PEAKS.items()}
    used = {name: sizes for name, sizes in peaks.items() if any(sizes)}
    top = max((max(sizes) for sizes in used.values()), default=0.0)
    # A limit far above the peaks would press the lines flat.
    near = {name: limits[name] / 2**30 for name in used if name in limits and limits[name] / 2**30 <= 3 * top}
    axes = _Axes([block.block for block in blocks], [top, *near.values()])
    marks = [axes.line("mask", name, {-0.5: limit, len(blocks) - 0.5: limit}) for name, limit in near.items()]
    marks += [axes.line(kind, name, dict(enumerate(used[name]))) for name in used for kind in ("line", "dots")]
    titles = [", ".join(f"{name} {sizes[i]:.2f} GiB" for name, sizes in used.items()) for i in range(len(blocks))]
    drawn = [(name, f"{limit:.2f}") for name, limit in near.items()]
    return axes.chart(marks, titles) | {"used": list(used), "limits": drawn}


def timeline(spans: list[Span], blocks: list[BlockRecord], phases: list[str]) -> Chart | None:
    """Bars by block, in seconds and lanes; None without spans.

    Args:
        spans: what was done when.
        blocks: the blocks in their order.
        phases: phases that have a colour.
    """
    spans = _merged(spans)
    if not spans:
        return None
    lanes = _ordered(LANES, [span.lane for span in spans])
    bars: dict[int | None, list[tuple[str, str, int, str, str]]] = defaultdict(list)
    for span in spans:
        subject = "whole model" if span.block is None else f"block {span.block}"
        title = f"{subject}, {span.phase}: {span.end - span.start:.3f} s from {span.start:.3f} s"
        bar = (f"{span.start:.8g}", f"{span.end - span.start:.8g}", lanes.index(span.lane), span.phase, title)
        bars[span.block].append(bar)
    shown = [block for block in blocks if block.block in bars]
    # Blocks that an earlier run has pruned have less to show.
    solved = [block.block for block in shown if any(phase == "solve" for *_, phase, _ in bars[block.block])]
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    return {
        "lanes": lanes,
        "bars": bars,
        "box": f"{start:.8g} 0 {max(end - start, 1e-5):.8g} {len(lanes)}",
        "options": [("all", "the whole run")] + [(str(b.block), f"block {b.block}, {b.name}") for b in shown],
        "first": str(solved[len(solved) // 2]) if solved and len(shown) > FEW_BLOCKS else "all",
        "phases": [phase for phase in phases if any(span.phase == phase for span in spans)],
    }


def _merged(spans: list[Span]) -> list[Span]:
    """Spans by lane and time. Spans of one block and phase become one if they follow each other at once.

    Without this, a mixture's thousands of experts would have a bar each.
    """
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.lane, span.start)):
        last = merged[-1] if merged else replace(span, lane="")
        alike = (last.lane, last.block, last.phase) == (span.lane, span.block, span.phase)
        # The gap may take a hundredth of the whole.
        if alike and span.start - last.end <= 0.01 * (span.end - last.start):
            merged[-1] = replace(last, end=max(last.end, span.end))
        else:
            merged.append(span)
    return merged
