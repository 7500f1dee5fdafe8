"""The charts of report.html, as paths and positions.

A chart is 1000 wide and 1000 high, whatever its size on the screen; y points down. Its `marks` are paths, each with
the kind of mark (line, mask, band, dots, fill) and the name that its colour stands for. Its `hits` are the areas that
show a title when they are pointed at, one for each block. Its `x` and `y` are ticks, (position, label).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from sparsefw.report.content import BlockRecord, mean
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import Span

# Phases in the order of their colours. Other phases have the last colour.
PHASES = ("solve", "calibrate", "forward", "evaluate", "read", "write", "reconstruct", "embed", "wait")
LANES = ("main", "read", "write")

# A longer timeline is left to report.json: a browser would crawl.
MOST_SPANS = 20_000

# Up to this many blocks, the timeline shows the whole run first.
FEW_BLOCKS = 4

# Most dots on a line. More would run into each other.
MOST_DOTS = 48

# A chart as the template reads it; and values of the y axis by position of the block.
Chart = dict[str, Any]
Values = Mapping[Any, float]


class LayerAt(NamedTuple):
    """A layer's result, with the position of its block and the type of the layer."""

    block: int
    kind: str
    result: LayerResult


def ordered(known: Iterable[str], names: Iterable[str]) -> list[str]:
    """The names, each once: first the known ones, in their order."""
    names = dict.fromkeys(names)
    return [name for name in known if name in names] + [name for name in names if name not in known]


class _Axes:
    """A chart over the blocks, whose y axis goes from 0 to a little above the greatest value."""

    def __init__(self, numbers: list[int], values: Iterable[float]) -> None:
        self.numbers, self.width = numbers, 1000 / len(numbers)
        self.top = max((value for value in values if math.isfinite(value)), default=0.0) * 1.05 or 1.0

    def line(self, kind: str, colour: str, values: Values, back: Values | None = None) -> Chart:
        """A line through values, and back through others; or dots at them, if they would not run into each other."""
        pairs = [*sorted(values.items()), *sorted((back or {}).items(), reverse=True)]
        points = [f"{(i + 0.5) * self.width:.4g} {self._y(v):.4g}" for i, v in pairs if math.isfinite(v)]
        if kind == "dots":
            # Lines of no length, which their round ends make dots.
            path = "".join(f"M{point}h0" for point in points) if len(points) <= MOST_DOTS else ""
        else:
            path = "M" + "L".join(points) if points else ""
        return {"class": kind, "colour": colour, "path": path}

    def bars(self, colour: str, lows: list[float], heights: list[float]) -> Chart:
        """Bars, one for each block."""
        bars = enumerate(zip(lows, heights, strict=True))
        path = "".join(
            f"M{(i + 0.1) * self.width:.4g} {self._y(low):.4g}V{self._y(low + height):.4g}h{0.8 * self.width:.4g}"
            f"V{self._y(low):.4g}z"
            for i, (low, height) in bars
            if height
        )
        return {"class": "fill", "colour": colour, "path": path}

    def chart(self, marks: list[Chart], titles: list[str]) -> Chart:
        """The chart of marks, and a title for each block."""
        hits = [(f"{i * self.width:.4g}", f"{self.width:.4g}", title) for i, title in enumerate(titles) if title]
        blocks = _ticks(len(self.numbers) - 1, 7, whole=True)
        return {
            "y": [(f"{self._y(value):.4g}", label) for value, label in _ticks(self.top, 5)],
            "x": [(f"{(i + 0.5) * self.width:.4g}", str(self.numbers[round(i)])) for i, _ in blocks],
            "marks": [mark for mark in marks if mark["path"]],
            "hits": hits,
        }

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


def errors(layers: list[LayerAt], methods: list[str], numbers: list[int]) -> dict[str, Chart]:
    """Relative errors: a chart for each type of layer, all of one scale.

    Args:
        layers: results.
        methods: methods to draw.
        numbers: numbers of the blocks.
    """
    drawn = [layer for layer in layers if layer.result.method in methods]
    errors = [e for _, _, result in drawn for e in (result.relative_mask, result.relative_error)]
    axes, charts = _Axes(numbers, [1.0, *errors]), {}
    results: dict[tuple[str, str], dict[int, list[LayerResult]]] = defaultdict(lambda: defaultdict(list))
    for block, kind, result in drawn:
        results[kind, result.method][block].append(result)
    for kind in dict.fromkeys(layer.kind for layer in drawn):
        marks, titles = list[Chart](), [list[str]() for _ in numbers]
        for method in methods:
            of_blocks = results[kind, method]
            found = {i: [result.relative_error for result in of_block] for i, of_block in of_blocks.items()}
            masks = {i: mean([result.relative_mask for result in of_block]) for i, of_block in of_blocks.items()}
            means = {i: mean(of_block) for i, of_block in found.items()}
            if any(len(of_block) > 1 for of_block in found.values()):
                low, high = ({i: pick(of_block) for i, of_block in found.items()} for pick in (min, max))
                marks.append(axes.line("band", method, high, low))
            if masks != means:
                marks.append(axes.line("mask", method, masks))
            marks += [axes.line("line", method, means), axes.line("dots", method, means)]
            for i, of_block in found.items():
                n = len(of_block)
                spread = f" (mean of {n}, {min(of_block):.4f} to {max(of_block):.4f})" if n > 1 else ""
                titles[i].append(f"{method} {means[i]:.4f}{spread}, mask only {masks[i]:.4f}")
        hits = [f"block {n}: {'; '.join(title)}" if title else "" for n, title in zip(numbers, titles, strict=True)]
        charts[kind] = axes.chart(marks, hits)
    return charts


def time(blocks: list[BlockRecord], phases: list[str]) -> Chart:
    """Seconds of each block by phase, stacked."""
    axes = _Axes([block.block for block in blocks], (sum(block.seconds.values()) for block in blocks))
    lows, marks = [0.0] * len(blocks), []
    for phase in phases:
        seconds = [block.seconds.get(phase, 0.0) for block in blocks]
        marks.append(axes.bars(phase, lows, seconds))
        lows = [low + n for low, n in zip(lows, seconds, strict=True)]
    titles = [
        f"block {block.block}: {sum(block.seconds.values()):.2f} s "
        f"({', '.join(f'{phase} {block.seconds[phase]:.2f}' for phase in phases if phase in block.seconds)})"
        for block in blocks
    ]
    return axes.chart(marks, titles)


def memory(blocks: list[BlockRecord], limits: dict[str, int]) -> Chart:
    """Peaks of memory in GiB, and the limits that are near them.

    The chart also has `used`, the peaks that are not zero, and `limits`, (place, GiB) of the limits drawn. Peaks are
    "host", "gpu" (tensors on the GPU) and "reserved" (what was taken from the GPU for them).

    Args:
        blocks: the blocks, with their peaks in bytes.
        limits: memory limits in bytes, by place.
    """
    fields = {"host": "host_bytes", "gpu": "gpu_bytes", "reserved": "gpu_reserved_bytes"}
    peaks = {name: [getattr(block, field) / 2**30 for block in blocks] for name, field in fields.items()}
    used = {name: sizes for name, sizes in peaks.items() if any(sizes)}
    top = max((max(sizes) for sizes in used.values()), default=0.0)
    # A limit far above the peaks would press the lines flat.
    near = {name: limits[name] / 2**30 for name in used if name in limits and limits[name] / 2**30 <= 3 * top}
    axes = _Axes([block.block for block in blocks], [top, *near.values()])
    marks = [axes.line("mask", name, {-0.5: limit, len(blocks) - 0.5: limit}) for name, limit in near.items()]
    for name, sizes in used.items():
        marks += [axes.line(kind, name, dict(enumerate(sizes))) for kind in ("line", "dots")]
    titles = [
        f"block {block.block}: " + ", ".join(f"{name} {sizes[i]:.2f} GiB" for name, sizes in used.items())
        for i, block in enumerate(blocks)
    ]
    return axes.chart(marks, titles) | {
        "used": list(used),
        "limits": [(n, f"{limit:.2f}") for n, limit in near.items()],
    }


def timeline(spans: list[Span], blocks: list[BlockRecord], phases: list[str]) -> Chart | None:
    """Bars by block, in seconds and lanes; None without spans. Bars of None are left to report.json.

    Args:
        spans: what was done when.
        blocks: the blocks in their order.
        phases: phases that have a colour.
    """
    spans = _merged(spans)
    if not spans or len(spans) > MOST_SPANS:
        return {"bars": None, "count": len(spans)} if spans else None
    lanes = ordered(LANES, [span.lane for span in spans])
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
