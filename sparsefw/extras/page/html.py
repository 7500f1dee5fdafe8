"""Make report.html: the content of report.json on one page that loads no other files.

This module turns values into texts, SVG paths and positions, and the template page.html arranges them. Names in a
checkpoint are not trusted: every text is escaped, unprintable characters are spelled out, and the page has no links.

A chart has 1000 x 1000 units, whatever its size on the screen, and y points down. `marks` are SVG paths, each with its
kind (line, mask, band) and the name that its colour stands for. `titles` are shown when the mouse points at a block.
`x` and `y` are ticks, (position, label).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from sparsefw.errors import printable
from sparsefw.extras.page.command import commands_of
from sparsefw.memory import gib
from sparsefw.report import log
from sparsefw.report.content import BlockRecord, Report, amount
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import Span

TEMPLATE = Path(__file__).with_name("page.html")

# A longer table of layers would make browsers slow, so the page leaves the table to report.json.
MOST_ROWS = 2000

# Phases in the order of their colours. All other phases share one further colour.
PHASES = ("solve", "calibrate", "forward", "evaluate", "read", "write", "reconstruct", "embed", "wait")
LANES = ("main", "read", "write")

# Peaks of a block: name on the page, and field of `BlockRecord`.
PEAKS = {"host": "host_bytes", "gpu": "gpu_bytes", "reserved": "gpu_reserved_bytes"}

# A chart for the template, see the module.
Chart = dict[str, Any]
# Points of a line: (position of a block, value on the y axis).
Points = list[tuple[int, float]]
# Kind of a mark, the name that its colour stands for, and its points.
Mark = tuple[str, str, Points]


def page(report: Report) -> str:
    """Make the page of a run.

    Args:
        report: report of the run.

    Returns:
        An HTML document.

    Raises:
        ValueError: the report has a layer that belongs to no block.
    """
    blocks, errors = report.blocks, error_charts(report)
    names = [phase for block in blocks for phase in block.seconds] + [span.phase for span in report.timeline]
    phases = _ordered(PHASES, names)
    sizes = [*(f"{phase} s" for phase in phases), *(f"{peak} GiB" for peak in PEAKS)]
    columns = ["block", "name", *sizes, "loss before", "loss after", "calibration"]
    rows = [_block_cells(block, phases) for block in blocks]
    titles = [", ".join(f"{what} {cell}" for what, cell in zip(columns, row, strict=True)) for row in rows]
    peaks = {name: [(i, getattr(block, of) / 2**30) for i, block in enumerate(blocks)] for name, of in PEAKS.items()}
    lines: list[Mark] = [("line", name, points) for name, points in peaks.items() if any(size for _, size in points)]
    return _template().render(
        report=report,
        log=log,
        summary="; ".join([log.kept_line(report), *log.recovery_lines(report)]),
        facts=_facts(report),
        # The page does not name its own folder, so that all copies of an output have the same page.
        commands=commands_of(report, "recovered" if report.recoveries else report.argument("output", str)),
        # Values are classes of the style sheet.
        method_colours={m: f"m{i}" for i, m in enumerate(reversed(report.methods))},
        phase_colours={phase: f"p{[*PHASES, phase].index(phase)}" for phase in phases},
        errors=errors,
        bands=any(mark["class"] == "band" for chart in errors.values() for mark in chart["marks"]),
        layers=[log.layer_cells(layer) for layer in report.layers] if len(report.layers) <= MOST_ROWS else None,
        memory=_chart(blocks, lines, titles),
        block_columns=columns,
        block_rows=rows,
        timeline=timeline(report.timeline, blocks),
    )


@cache
def _template() -> Template:
    """Compile the template once per process. The template spells out unprintable characters."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _facts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Collect the facts of a run: by heading, a list of (name, value), which may be empty."""
    memory = report.memory
    sizes = {"limit": memory.limits, "expected": memory.expected, "peak": report.peak_memory}
    sizes["most at once"] = {"solver": memory.solver_bytes}
    placement = ("activations", "batch_windows", "step_windows", "read_ahead", "kept_width")
    texts = [("calibration", report.data), *(("evaluation", text) for text in report.evaluation)]
    return {
        "machine": [("device", report.device), *report.versions.items()],
        "texts": [(n, f"{amount(t.source, t.windows, t.seqlen)} of {t.source}, sha256 {t.hash}") for n, t in texts],
        "memory": [
            (f"{kind}, {what.removesuffix('_bytes').replace('_', ' ')}", f"{gib(size)} GiB")
            for kind, of_kind in sizes.items()
            for what, size in of_kind.items()
        ]
        + [(name.replace("_", " "), str(getattr(memory, name))) for name in placement],
        "ranks": [(f"rank {n}", log.rank_line(rank)) for n, rank in enumerate(report.ranks)],
        "time": [(phase, f"{seconds:.1f} s") for phase, seconds in report.seconds.items()],
        "source": [("note", note) for note in report.notes],
        "arguments": [
            (name, " ".join(map(str, value)) if isinstance(value, tuple) else str(value))
            for name, value in report.arguments.items()
            if value not in (None, ())
        ],
    }


def _block_cells(block: BlockRecord, phases: list[str]) -> list[str]:
    """Return the row of a block: seconds, peaks, and losses before and after the reconstruction."""
    seconds = [f"{block.seconds[phase]:.2f}" if phase in block.seconds else "-" for phase in phases]
    peaks = [f"{getattr(block, name) / 2**30:.2f}" for name in PEAKS.values()]
    losses, found = ["-", "-"], block.reconstruction
    if found:
        losses = [f"{found.before:.5f}", f"{found.after:.5f}" + " (put back)" * found.put_back]
    return [str(block.block), block.name, *seconds, *peaks, *losses, block.way]


def _ordered(known: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return each name once: first the known names in their order, then all other names."""
    return sorted(dict.fromkeys(names), key=lambda name: [*known, name].index(name))


def _chart(blocks: Sequence[BlockRecord], marks: Sequence[Mark], titles: Sequence[str], top: float = 0.0) -> Chart:
    """Make a chart over the blocks. The y axis goes from 0 to a little above the greatest value.

    Args:
        blocks: the blocks.
        marks: the lines and bands to draw.
        titles: a text for each block.
        top: the y axis reaches at least this value.
    """
    values = [value for *_, points in marks for _, value in points if math.isfinite(value)]
    width, top = 1000 / len(blocks), max([top, *values]) * 1.05 or 1.0

    def x(position: float) -> str:
        return f"{(position + 0.5) * width:.4g}"

    def y(value: float) -> str:
        return f"{1000 - value * 1000 / top:.4g}"

    paths = []
    for kind, name, points in marks:
        drawn = "L".join(f"{x(position)} {y(value)}" for position, value in points if math.isfinite(value))
        # h0 adds a line of no length, whose round ends draw a single point as a dot.
        paths += [{"class": kind, "colour": name, "path": f"M{drawn}h0"}] if drawn else []
    return {
        "marks": paths,
        "titles": titles,
        "y": [(y(value), label) for value, label in _ticks(top, 5)],
        "x": [(x(i), str(blocks[round(i)].block)) for i, _ in _ticks(len(blocks) - 1, 7, least=1.0)],
    }


def _ticks(high: float, most: int, least: float = 0.0) -> list[tuple[float, str]]:
    """Choose about `most` ticks from 0 to `high`, with labels, at multiples of 1, 2 or 5 times a power of ten."""
    distance = max(high / most, least)
    power = 10.0 ** math.floor(math.log10(distance))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= distance * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [(n * step, f"{n * step:.{digits}f}") for n in range(math.floor(high / step + 1e-9) + 1)]


def error_charts(report: Report) -> dict[str, Chart]:
    """Chart the relative errors of the layers by method. Each type of layer has a chart, and all have one scale."""
    positions, top, charts = log.positions_of(report), 1.0, {}
    found: dict[str, dict[str, dict[int, list[LayerResult]]]] = defaultdict(lambda: defaultdict(dict))
    for layer in report.layers:
        position, kind = log.locate(layer.name, positions)
        found[kind][layer.method].setdefault(position, []).append(layer)
        top = max([top, *filter(math.isfinite, (layer.relative_mask, layer.relative_error))])
    for kind, by_method in found.items():
        marks, titles = list[Mark](), [[f"block {block.block}"] for block in report.blocks]
        for method, of_blocks in by_method.items():
            upper, lower, means, masks = Points(), Points(), Points(), Points()
            for i, layers in sorted(of_blocks.items()):
                errors = [layer.relative_error for layer in layers]
                upper.append((i, max(errors)))
                lower.append((i, min(errors)))
                means.append((i, fmean(errors)))
                masks.append((i, fmean(layer.relative_mask for layer in layers)))
                titles[i].append(f"{method} {means[-1][1]:.4f}, mask only {masks[-1][1]:.4f}")
            if upper != lower:
                marks.append(("band", method, upper + lower[::-1]))
            if masks != means:
                marks.append(("mask", method, masks))
            marks.append(("line", method, means))
        charts[kind] = _chart(report.blocks, marks, ["; ".join(of_block) for of_block in titles], top)
    return charts


def timeline(spans: list[Span], blocks: list[BlockRecord]) -> Chart | None:
    """Make the chart of the timeline, with bars by block; None without spans.

    Args:
        spans: the phases with block, lane, start and end.
        blocks: the blocks, in order.
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
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    return {
        "lanes": lanes,
        "bars": bars,
        "box": f"{start:.8g} 0 {max(end - start, 1e-5):.8g} {len(lanes)}",
        "options": {"all": "the whole run"}
        | {str(b.block): f"block {b.block}, {b.name}" for b in blocks if b.block in bars},
    }


def _merged(spans: list[Span]) -> list[Span]:
    """Sort spans by lane and time, and merge consecutive spans of one block and phase if the gap is small.

    Without merging, each of thousands of experts would have a bar.
    """
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.lane, span.start)):
        last = merged[-1] if merged else replace(span, lane="")
        alike = (last.lane, last.block, last.phase) == (span.lane, span.block, span.phase)
        # A small gap is at most a hundredth of the merged span.
        if alike and span.start - last.end <= 0.01 * (span.end - last.start):
            merged[-1] = replace(last, end=max(last.end, span.end))
        else:
            merged.append(span)
    return merged
