"""The charts of report.html, as paths and positions.

A chart is 1000 wide and 1000 high, whatever its size on the screen; y points down. Its `marks` are paths, each with
the kind of mark (line, mask, band, dots, fill) and the name that its colour stands for. Its `hits` are the areas that
show a title when they are pointed at, one for each block. Its `x` and `y` are ticks, (position, label).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sparsefw.report.content import BlockRecord, mean
from sparsefw.solver import LayerResult
from sparsefw.timeline import Span

# Phases in the order of their colours. Other phases have the last colour.
PHASES = ("solve", "calibrate", "forward", "evaluate", "read", "write", "reconstruct", "embed", "wait")
LANES = ("main", "read", "write")

# A longer timeline is left to report.json: a browser would crawl.
MOST_SPANS = 20_000

# Up to this many blocks, the timeline shows the whole run first.
FEW_BLOCKS = 4

# The view of a timeline that shows all blocks.
ALL = "all"

# Most dots on a line. More would run into each other.
MOST_DOTS = 48

Point = tuple[float, float]
Tick = tuple[str, str]

# A chart as the template reads it.
Chart = dict[str, Any]
Mark = dict[str, str]


class LayerAt(NamedTuple):
    """A layer's result, with the position of its block and the type of the layer."""

    block: int
    kind: str
    result: LayerResult


def ordered(known: Iterable[str], names: list[str]) -> list[str]:
    """The names, each once: first the known ones, in their order."""
    return [name for name in known if name in names] + [name for name in dict.fromkeys(names) if name not in known]


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[tuple[float, str]]:
    """Round values with their labels: multiples of 1, 2 or 5 times a power of ten, about `most` of them."""
    least = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(n * step, f"{n * step:.{digits}f}") for n in numbers]


def _axis(values: Iterable[float]) -> tuple[float, list[Tick]]:
    """A y axis that starts at 0: its scale, in units of the chart per unit of the values, and its ticks."""
    top = max((value for value in values if math.isfinite(value)), default=0.0) * 1.05 or 1.0
    return 1000 / top, [(_at(1000 - value * 1000 / top), label) for value, label in _ticks(0, top, 5)]


def _blocks_axis(numbers: list[int]) -> list[Tick]:
    width = 1000 / len(numbers)
    return [(_at((i + 0.5) * width), str(numbers[round(i)])) for i, _ in _ticks(0, len(numbers) - 1, 7, whole=True)]


def _at(position: float) -> str:
    return f"{position:.4g}"


def _line(points: list[Point]) -> str:
    return "M" + "L".join(f"{_at(x)} {_at(y)}" for x, y in points) if points else ""


def _dots(points: list[Point]) -> str:
    """Lines of no length, which their round ends make dots; none if they would run into each other."""
    return "".join(f"M{_at(x)} {_at(y)}h0" for x, y in points) if len(points) <= MOST_DOTS else ""


def _bar(x: float, width: float, low: float, high: float) -> str:
    return f"M{_at(x)} {_at(low)}V{_at(high)}h{_at(width)}V{_at(low)}z"


def _chart(numbers: list[int], y: list[Tick], marks: list[Mark], titles: list[str]) -> Chart:
    """A chart over the blocks.

    Args:
        numbers: numbers of the blocks.
        y: ticks of the y axis.
        marks: paths with their classes.
        titles: one for each block, shown when the block is pointed at; an empty title is not shown.
    """
    width = 1000 / len(numbers)
    hits = [(_at(i * width), _at(width), title) for i, title in enumerate(titles) if title]
    return {"y": y, "x": _blocks_axis(numbers), "marks": [mark for mark in marks if mark["path"]], "hits": hits}


def _relative_mask(layer: LayerResult) -> float:
    return layer.relative_mask


def _relative_error(layer: LayerResult) -> float:
    return layer.relative_error


def errors(layers: dict[str, list[LayerAt]], methods: list[str], numbers: list[int]) -> dict[str, Chart]:
    """Relative errors: a chart for each type of layer, all of one scale.

    Args:
        layers: results by method.
        methods: methods to draw.
        numbers: numbers of the blocks.
    """
    # By type, then method, then position of the block.
    by_type: dict[str, dict[str, dict[int, list[LayerResult]]]] = defaultdict(
        lambda: {method: defaultdict(list) for method in methods}
    )
    for method in methods:
        for block, kind, result in layers[method]:
            by_type[kind][method][block].append(result)
    drawn = [at.result for method in methods for at in layers[method]]
    scale, y = _axis([1.0, *map(_relative_mask, drawn), *map(_relative_error, drawn)])
    return {kind: _errors_of_type(by_method, numbers, scale, y) for kind, by_method in by_type.items()}


def _errors_of_type(
    by_method: dict[str, dict[int, list[LayerResult]]], numbers: list[int], scale: float, y: list[Tick]
) -> Chart:
    """The chart of one type, from its results by method and position of the block."""
    marks: list[Mark] = []
    titles: list[list[str]] = [[] for _ in numbers]
    for method, blocks in by_method.items():

        def points(
            error: Callable[[LayerResult], float],
            reduce: Callable[[Sequence[float]], float],
            blocks: dict[int, list[LayerResult]] = blocks,
        ) -> list[Point]:
            reduced = [(i, reduce([error(layer) for layer in blocks[i]])) for i in sorted(blocks)]
            return [((i + 0.5) * 1000 / len(numbers), 1000 - e * scale) for i, e in reduced if math.isfinite(e)]

        if any(len(layers) > 1 for layers in blocks.values()):
            band = points(_relative_error, max) + points(_relative_error, min)[::-1]
            marks.append({"class": "band", "colour": method, "path": _line(band)})
        if any(layer.relative_mask != layer.relative_error for layers in blocks.values() for layer in layers):
            marks.append({"class": "mask", "colour": method, "path": _line(points(_relative_mask, mean))})
        means = points(_relative_error, mean)
        marks.append({"class": "line", "colour": method, "path": _line(means)})
        marks.append({"class": "dots", "colour": method, "path": _dots(means)})
        for i, layers in blocks.items():
            titles[i].append(_errors_title(method, layers))
    texts = [
        f"block {number}: {'; '.join(title)}" if title else "" for number, title in zip(numbers, titles, strict=True)
    ]
    return _chart(numbers, y, marks, texts)


def _errors_title(method: str, layers: list[LayerResult]) -> str:
    """The errors of layers of one type, method and block, in words."""
    masks, errors = [layer.relative_mask for layer in layers], [layer.relative_error for layer in layers]
    spread = f" (mean of {len(errors)}, {min(errors):.4f} to {max(errors):.4f})" if len(errors) > 1 else ""
    return f"{method} {mean(errors):.4f}{spread}, mask only {mean(masks):.4f}"


def time(blocks: list[BlockRecord], phases: list[str]) -> Chart:
    """Seconds of each block by phase, stacked."""
    scale, y = _axis(sum(block.seconds.values()) for block in blocks)
    width, lows = 1000 / len(blocks), [1000.0] * len(blocks)
    paths: dict[str, str] = defaultdict(str)
    for phase in phases:
        for i, block in enumerate(blocks):
            if height := block.seconds.get(phase, 0) * scale:
                paths[phase] += _bar((i + 0.1) * width, 0.8 * width, lows[i], lows[i] - height)
                lows[i] -= height
    titles = []
    for block in blocks:
        seconds = ", ".join(f"{phase} {block.seconds[phase]:.2f}" for phase in phases if phase in block.seconds)
        titles.append(f"block {block.block}: {sum(block.seconds.values()):.2f} s ({seconds})")
    marks = [{"class": "fill", "colour": phase, "path": path} for phase, path in paths.items()]
    return _chart([block.block for block in blocks], y, marks, titles)


def memory(blocks: list[BlockRecord], limits: dict[str, int]) -> Chart:
    """Peaks of memory in GiB, and the limits that are near them.

    The chart also has `used`, the peaks that are not zero, and `limits`, (place, GiB) of the limits drawn. Peaks are
    "host", "gpu" (tensors on the GPU) and "reserved" (what was taken from the GPU for them).

    Args:
        blocks: the blocks, with their peaks in bytes.
        limits: memory limits in bytes, by place.
    """
    peaks = {
        "host": [block.host_bytes for block in blocks],
        "gpu": [block.gpu_bytes for block in blocks],
        "reserved": [block.gpu_reserved_bytes for block in blocks],
    }
    used = {name: [n / 2**30 for n in sizes] for name, sizes in peaks.items() if any(sizes)}
    top = max((max(sizes) for sizes in used.values()), default=0.0)
    # A limit far above the peaks would press the lines flat.
    near = {name: limits[name] / 2**30 for name in used if name in limits and limits[name] / 2**30 <= 3 * top}
    scale, y = _axis([top, *near.values()])
    width = 1000 / len(blocks)
    marks: list[Mark] = []
    for name, limit in near.items():
        path = _line([(0, 1000 - limit * scale), (1000, 1000 - limit * scale)])
        marks.append({"class": "mask", "colour": name, "path": path})
    for name, sizes in used.items():
        points = [((i + 0.5) * width, 1000 - size * scale) for i, size in enumerate(sizes)]
        marks.append({"class": "line", "colour": name, "path": _line(points)})
        marks.append({"class": "dots", "colour": name, "path": _dots(points)})
    titles = [
        f"block {block.block}: " + ", ".join(f"{name} {sizes[i]:.2f} GiB" for name, sizes in used.items())
        for i, block in enumerate(blocks)
    ]
    chart = _chart([block.block for block in blocks], y, marks, titles)
    return chart | {"used": list(used), "limits": [(name, f"{limit:.2f}") for name, limit in near.items()]}


def timeline(spans: list[Span], blocks: list[BlockRecord], phases: list[str], pruned: set[int]) -> Chart | None:
    """Bars by block, in seconds and lanes, with a view of the whole run and one of every block; None without spans.

    A block's view covers all that was done for the block, with its reading and writing.

    Args:
        spans: what was done when.
        blocks: the blocks in their order.
        phases: phases that have a colour.
        pruned: numbers of the blocks with a pruned layer.
    """
    spans = _merged(spans)
    if not spans or len(spans) > MOST_SPANS:
        return {"bars": None, "count": len(spans)} if spans else None
    lanes = ordered(LANES, [span.lane for span in spans])
    bars: dict[int | None, list[tuple[str, str, int, str, str]]] = defaultdict(list)
    extents: dict[int | str | None, Point] = defaultdict(lambda: (math.inf, -math.inf))
    for span in spans:
        subject = "whole model" if span.block is None else f"block {span.block}"
        title = f"{subject}, {span.phase}: {span.end - span.start:.3f} s from {span.start:.3f} s"
        bar = (f"{span.start:.8g}", f"{span.end - span.start:.8g}", lanes.index(span.lane), span.phase, title)
        bars[span.block].append(bar)
        keys: tuple[int | str | None, ...] = (span.block, ALL)
        for key in keys:
            extents[key] = min(extents[key][0], span.start), max(extents[key][1], span.end)
    shown = [block for block in blocks if block.block in extents]
    numbers = [block.block for block in shown]
    views: list[int | str | None] = [ALL, *numbers]
    # Blocks that an earlier run has pruned have less to show.
    solved = [number for number in numbers if any(phase == "solve" for *_, phase, _ in bars[number])]
    return {
        "lanes": lanes,
        "bars": bars,
        "views": {str(key): _view(*extents[key], len(lanes)) for key in views},
        "options": [(ALL, "the whole run")] + [(str(b.block), f"block {b.block}, {b.name}") for b in shown],
        "first": str(solved[len(solved) // 2]) if solved and len(shown) > FEW_BLOCKS else ALL,
        "resumed": len(pruned.difference(solved)),
        "phases": [phase for phase in phases if any(span.phase == phase for span in spans)],
    }


def _merged(spans: list[Span]) -> list[Span]:
    """Spans by lane and time. Spans of one block and phase become one if they follow each other at once.

    Without this, a mixture's thousands of experts would have a bar each.
    """
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.lane, span.start)):
        last = merged[-1] if merged else None
        # The gap may take a hundredth of the whole.
        if last and _same_work(last, span) and span.start - last.end <= 0.01 * (span.end - last.start):
            merged[-1] = replace(last, end=max(last.end, span.end))
        else:
            merged.append(span)
    return merged


def _same_work(a: Span, b: Span) -> bool:
    return (a.lane, a.block, a.phase) == (b.lane, b.block, b.phase)


def _view(low: float, high: float, lanes: int) -> Chart:
    """The extract of a timeline from `low` to `high` seconds, as an SVG viewBox, and its ticks."""
    width = max(high - low, 1e-5)
    ticks = [(f"{(t - low) / width:.2%}", label) for t, label in _ticks(low, low + width, 7)]
    return {"box": f"{low:.8g} 0 {width:.8g} {lanes}", "ticks": ticks}
