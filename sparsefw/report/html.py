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

from sparsefw.errors import flag_of, printable
from sparsefw.memory import gib
from sparsefw.report import log
from sparsefw.report.content import HIDDEN, Argument, BlockRecord, Report, amount
from sparsefw.solver.config import METHODS, PruneConfig
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import Span

TEMPLATE = Path(__file__).with_name("page.html")

# A longer table of layers is left to report.json: a browser would crawl.
MOST_ROWS = 2000

# Phases in the order of their colours. Other phases have the last colour.
PHASES = ("solve", "calibrate", "forward", "evaluate", "read", "write", "reconstruct", "embed", "wait")
LANES = ("main", "read", "write")

# Most dots on a line. More would run into each other.
MOST_DOTS = 48

# Peaks of a block by their names.
PEAKS = {"host": "host_bytes", "gpu": "gpu_bytes", "reserved": "gpu_reserved_bytes"}

# A chart as the template reads it.
Chart = dict[str, Any]
# Its kind, the name that its colour stands for, and values of the y axis by position of the block: those of a line or
# of an upper edge, and those of the lower edge of a band or of bars.
Mark = tuple[str, str, Mapping[Any, float], Mapping[Any, float]]


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
    sizes = [*(f"{phase} s" for phase in phases), *(f"{name} GiB" for name in PEAKS)]
    columns = ["block", "name", *sizes, "loss before", "loss after", "calibration"]
    return _template().render(
        report=report,
        log=log,
        summary="; ".join([log.kept_line(report), *log.recovery_lines(report)]),
        facts=_facts(report),
        command=command_of(used_arguments(report)),
        # Classes of the style sheet.
        method_colours={m: f"m{i}" for i, m in enumerate(reversed(report.methods))},
        phase_colours={phase: f"p{[*PHASES, phase].index(phase)}" for phase in phases},
        errors=errors,
        bands=any(mark["class"] == "band" for chart in errors.values() for mark in chart["marks"]),
        layers=[log.layer_cells(layer) for layer in report.layers] if len(report.layers) <= MOST_ROWS else None,
        time=time_chart(blocks, phases),
        memory=memory_chart(blocks, report.memory.limits),
        block_columns=columns,
        block_rows=[_block_cells(block, phases) for block in blocks],
        timeline=timeline(report.timeline, blocks),
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


def _facts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Lists of facts, (name, value), by heading."""
    memory = report.memory
    sizes = {"limit": memory.limits, "expected": memory.expected, "peak": report.peak_memory}
    sizes["most at once"] = {"solver": memory.solver_bytes}
    placement = ("activations", "batch_windows", "step_windows", "read_ahead", "kept_width")
    texts = [("calibration", report.data), *(("evaluation", text) for text in report.evaluation)]
    facts = {
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
    }
    return {heading: found for heading, found in facts.items() if found}


def used_arguments(report: Report) -> dict[str, Argument]:
    """The arguments of a run without those that no method of it uses, which the command line refuses."""
    if any(METHODS[name].frank_wolfe for name in report.methods):
        return report.arguments
    unused = {f.name for f in fields(PruneConfig) if f.metadata.get("frank_wolfe")}
    return {name: value for name, value in report.arguments.items() if name not in unused}


def command_of(arguments: Mapping[str, Argument]) -> list[str]:
    """The command line of a run with these arguments, flag by flag."""
    parts = ["python -m sparsefw.run"]
    for name, value in arguments.items():
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and item is not False:
                parts.append(flag_of(name) if item is True else f"{flag_of(name)} {shlex.quote(str(item))}")
    return parts


def _block_cells(block: BlockRecord, phases: list[str]) -> list[str]:
    """A block's seconds, peaks, and losses before and after its reconstruction."""
    seconds = [f"{block.seconds[phase]:.2f}" if phase in block.seconds else "-" for phase in phases]
    peaks = [f"{getattr(block, name) / 2**30:.2f}" for name in PEAKS.values()]
    losses, found = ["-", "-"], block.reconstruction
    if found:
        notes = ([] if found.loss == HIDDEN else [found.loss]) + ["put back"] * found.put_back
        losses = [f"{found.before:.5f}", f"{found.after:.5f}" + (f" ({', '.join(notes)})" if notes else "")]
    return [str(block.block), block.name, *seconds, *peaks, *losses, block.way]


def _ordered(known: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names, each once: first the known ones, in their order."""
    return sorted(dict.fromkeys(names), key=lambda name: [*known, name].index(name))


def _chart(blocks: Sequence[BlockRecord], marks: Sequence[Mark], titles: Sequence[str], top: float = 0.0) -> Chart:
    """A chart over the blocks: y goes from 0 to a little above the greatest value.

    Args:
        blocks: the blocks.
        marks: what is drawn. Lines have dots at their values, if these would not run into each other.
        titles: for each block, what is shown when it is pointed at; empty: nothing.
        top: the greatest value, or a greater one.
    """
    edges = [value for *_, high, low in marks for value in (*high.values(), *low.values()) if math.isfinite(value)]
    width, top = 1000 / len(blocks), max([top, *edges]) * 1.05 or 1.0

    def x(i: float) -> str:
        return f"{(i + 0.5) * width:.4g}"

    def y(value: float) -> str:
        return f"{1000 - value * 1000 / top:.4g}"

    paths = []
    for kind, colour, high, low in marks:
        pairs = [*sorted(high.items()), *sorted(low.items(), reverse=True)]
        points = [f"{x(i)} {y(value)}" for i, value in pairs if math.isfinite(value)]
        path = "M" + "L".join(points) if points else ""
        if kind == "fill":
            bars = (f"M{x(i - 0.4)} {y(low[i])}V{y(end)}H{x(i + 0.4)}V{y(low[i])}z" for i, end in high.items())
            path = "".join(bars)
        paths.append({"class": kind, "colour": colour, "path": path})
        if kind == "line" and len(points) <= MOST_DOTS:
            # Lines of no length, which their round ends make dots.
            paths.append({"class": "dots", "colour": colour, "path": "".join(f"M{at}h0" for at in points)})
    return {
        "y": [(y(value), label) for value, label in _ticks(top, 5)],
        "x": [(x(i), str(blocks[round(i)].block)) for i, _ in _ticks(len(blocks) - 1, 7, whole=True)],
        "marks": [mark for mark in paths if mark["path"]],
        "hits": [
            (f"{i * width:.4g}", f"{width:.4g}", f"block {block.block}: {title}")
            for i, (block, title) in enumerate(zip(blocks, titles, strict=True))
            if title
        ],
    }


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
    positions, top, charts = log.positions_of(report), 1.0, {}
    found: dict[str, dict[str, dict[int, list[LayerResult]]]] = defaultdict(lambda: defaultdict(dict))
    for layer in report.layers:
        position, kind = log.locate(layer.name, positions)
        found[kind][layer.method].setdefault(position, []).append(layer)
        top = max([top, *filter(math.isfinite, (layer.relative_mask, layer.relative_error))])
    for kind, by_method in found.items():
        marks, titles = list[Mark](), [list[str]() for _ in report.blocks]
        for method, of_blocks in by_method.items():
            errors = {i: [layer.relative_error for layer in layers] for i, layers in of_blocks.items()}
            low, high, means = ({i: pick(values) for i, values in errors.items()} for pick in (min, max, fmean))
            masks = {i: fmean(layer.relative_mask for layer in layers) for i, layers in of_blocks.items()}
            marks += [("band", method, high, low)] if low != high else []
            marks += [("mask", method, masks, {})] if masks != means else []
            marks += [("line", method, means, {})]
            for i, values in errors.items():
                n = len(values)
                spread = f" (mean of {n}, {low[i]:.4f} to {high[i]:.4f})" if n > 1 else ""
                titles[i].append(f"{method} {means[i]:.4f}{spread}, mask only {masks[i]:.4f}")
        charts[kind] = _chart(report.blocks, marks, ["; ".join(of_block) for of_block in titles], top)
    return charts


def time_chart(blocks: list[BlockRecord], phases: list[str]) -> Chart:
    """Seconds of each block by phase, stacked."""
    marks, tops = list[Mark](), [0.0] * len(blocks)
    for phase in phases:
        lows, tops = tops, [low + block.seconds.get(phase, 0.0) for low, block in zip(tops, blocks, strict=True)]
        bars = {i: top for i, top in enumerate(tops) if top > lows[i]}
        marks.append(("fill", phase, bars, dict(enumerate(lows))))
    titles = [
        f"{sum(block.seconds.values()):.2f} s "
        f"({', '.join(f'{phase} {block.seconds[phase]:.2f}' for phase in phases if phase in block.seconds)})"
        for block in blocks
    ]
    return _chart(blocks, marks, titles)


def memory_chart(blocks: list[BlockRecord], limits: dict[str, int]) -> Chart:
    """Peaks of memory in GiB, and the limits that are near them.

    The chart also has `used`, the names of the peaks that are not zero, and `limits`, GiB of the limits drawn, by name.

    Args:
        blocks: the blocks, with their peaks in bytes.
        limits: memory limits in bytes, by place.
    """
    peaks = {name: [getattr(block, field) / 2**30 for block in blocks] for name, field in PEAKS.items()}
    used = {name: sizes for name, sizes in peaks.items() if any(sizes)}
    top = max((max(sizes) for sizes in used.values()), default=0.0)
    # A limit far above the peaks would press the lines flat.
    near = {name: limits[name] / 2**30 for name in used if name in limits and limits[name] / 2**30 <= 3 * top}
    marks: list[Mark] = [("mask", name, {-0.5: n, len(blocks) - 0.5: n}, {}) for name, n in near.items()]
    marks += [("line", name, dict(enumerate(sizes)), {}) for name, sizes in used.items()]
    titles = [", ".join(f"{name} {sizes[i]:.2f} GiB" for name, sizes in used.items()) for i in range(len(blocks))]
    return _chart(blocks, marks, titles) | {"used": list(used), "limits": near}


def timeline(spans: list[Span], blocks: list[BlockRecord]) -> Chart | None:
    """Bars by block, in seconds and lanes; None without spans.

    Args:
        spans: what was done when.
        blocks: the blocks in their order.
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
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    return {
        "lanes": lanes,
        "bars": bars,
        "box": f"{start:.8g} 0 {max(end - start, 1e-5):.8g} {len(lanes)}",
        "options": {"all": "the whole run"} | {str(b.block): f"block {b.block}, {b.name}" for b in shown},
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
