"""The charts of report.html, as paths and positions.

A chart is 1000 wide and 1000 high, whatever its size on the screen; y points down. Its `marks` are paths with the kind
of mark (line, mask, band, dots, fill) and what it is the colour of; `hits` are the places that tell something when they
are pointed at, one for each block; `x` and `y` are ticks, (position, label).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

# In the order of their colours; another phase takes the colour after the last.
PHASES = ("solve", "calibrate", "forward", "evaluate", "read", "write", "embed", "wait")
LANES = ("main", "read", "write")

RELATIVE = ("relative_mask", "relative_error")

# A longer timeline is left to report.json: a browser would crawl.
MOST_SPANS = 20_000

# Up to this many blocks, the timeline shows the whole run first.
FEW_BLOCKS = 4

# The view of a timeline that shows all blocks.
ALL = "all"

# Dots on a line run into each other when there are more.
MOST_DOTS = 48

Point = tuple[float, float]
Tick = tuple[str, str]

# Of one method: (position of the block, type of the layer, its row) of every layer.
Placed = list[tuple[int, str, dict]]


def ordered(known: Iterable[str], found: list[str]) -> list[str]:
    """What was found, each once: first those known, in their order."""
    return [name for name in known if name in found] + [name for name in dict.fromkeys(found) if name not in known]


def mean(values: list[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


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
    """The scale, in units of the chart per unit of the values, and the ticks of a y axis that starts at 0."""
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
    """Lines of no length, which round ends make dots; none where they would run into each other."""
    return "".join(f"M{_at(x)} {_at(y)}h0" for x, y in points) if len(points) <= MOST_DOTS else ""


def _bar(x: float, width: float, low: float, high: float) -> str:
    return f"M{_at(x)} {_at(low)}V{_at(high)}h{_at(width)}V{_at(low)}z"


def _chart(numbers: list[int], y: list[Tick], marks: list[dict], titles: list[str]) -> dict:
    """A chart over the blocks: `marks` are paths and their classes, and each block tells its title where it is."""
    width = 1000 / len(numbers)
    hits = [(_at(i * width), _at(width), title) for i, title in enumerate(titles) if title]
    return {"y": y, "x": _blocks_axis(numbers), "marks": [mark for mark in marks if mark["path"]], "hits": hits}


def errors(rows: dict[str, Placed], methods: list[str], numbers: list[int]) -> dict[str, dict]:
    """Relative errors by type: a chart for each, all of one scale."""
    # By type, then method, then block.
    found = defaultdict(lambda: {m: defaultdict(list) for m in methods})
    for m in methods:
        for i, kind, row in rows[m]:
            found[kind][m][i].append(row)
    scale, y = _axis([1.0, *(row[what] for m in methods for *_, row in rows[m] for what in RELATIVE)])
    return {kind: _panel(by_method, numbers, scale, y) for kind, by_method in found.items()}


def _panel(found: dict[str, dict[int, list[dict]]], numbers: list[int], scale: float, y: list[Tick]) -> dict:
    """The chart of one type, from its rows by method and position of the block."""
    marks, told = [], [[] for _ in numbers]
    for method, of in found.items():
        after = _points(of, "relative_error", mean, scale, len(numbers))
        if any(len(layers) > 1 for layers in of.values()):
            most, least = (_points(of, "relative_error", way, scale, len(numbers)) for way in (max, min))
            marks.append({"class": "band", "colour": method, "path": _line(most + least[::-1])})
        if any(row["relative_mask"] != row["relative_error"] for layers in of.values() for row in layers):
            mask = _points(of, "relative_mask", mean, scale, len(numbers))
            marks.append({"class": "mask", "colour": method, "path": _line(mask)})
        marks.append({"class": "line", "colour": method, "path": _line(after)})
        marks.append({"class": "dots", "colour": method, "path": _dots(after)})
        for i, layers in of.items():
            mask, error = ([row[what] for row in layers] for what in RELATIVE)
            spread = f" (mean of {len(error)}, {min(error):.4f} to {max(error):.4f})" if len(error) > 1 else ""
            told[i].append(f"{method} {mean(error):.4f}{spread}, mask only {mean(mask):.4f}")
    titles = [f"block {number}: {'; '.join(said)}" if said else "" for number, said in zip(numbers, told, strict=True)]
    return _chart(numbers, y, marks, titles)


def _points(
    of: dict[int, list[dict]], what: str, reduce: Callable[[list[float]], float], scale: float, blocks: int
) -> list[Point]:
    reduced = [(i, reduce([row[what] for row in of[i]])) for i in sorted(of)]
    return [((i + 0.5) * 1000 / blocks, 1000 - value * scale) for i, value in reduced if math.isfinite(value)]


def time(blocks: list[dict], phases: list[str]) -> dict:
    """Seconds by phase, one upon the other."""
    scale, y = _axis(sum(block["seconds"].values()) for block in blocks)
    width, lows = 1000 / len(blocks), [1000.0] * len(blocks)
    paths = defaultdict(str)
    for phase in phases:
        for i, block in enumerate(blocks):
            if height := block["seconds"].get(phase, 0) * scale:
                paths[phase] += _bar((i + 0.1) * width, 0.8 * width, lows[i], lows[i] - height)
                lows[i] -= height
    titles = []
    for block in blocks:
        parts = ", ".join(f"{phase} {block['seconds'][phase]:.2f}" for phase in phases if phase in block["seconds"])
        titles.append(f"block {block['block']}: {sum(block['seconds'].values()):.2f} s ({parts})")
    marks = [{"class": "fill", "colour": phase, "path": path} for phase, path in paths.items()]
    return _chart([block["block"] for block in blocks], y, marks, titles)


def memory(blocks: list[dict], limits: dict) -> dict:
    """Peaks in GiB of what was used, and its budget where that is near; named in `used` and `budgets`."""
    used = [(name, [b[f"{name}_bytes"] / 2**30 for b in blocks]) for name in ("host", "gpu")]
    used = [(name, values) for name, values in used if any(values)]
    top = max(max(values) for _, values in used)
    budgets = [(name, (limits.get(f"{name}_budget_bytes") or math.inf) / 2**30) for name, _ in used]
    # One far above what was used would press the lines flat.
    budgets = [(name, budget) for name, budget in budgets if budget <= 3 * top]
    scale, y = _axis([top, *(budget for _, budget in budgets)])
    width, marks = 1000 / len(blocks), []
    for name, budget in budgets:
        path = _line([(0, 1000 - budget * scale), (1000, 1000 - budget * scale)])
        marks.append({"class": "mask", "colour": name, "path": path})
    for name, values in used:
        points = [((i + 0.5) * width, 1000 - value * scale) for i, value in enumerate(values)]
        marks.append({"class": "line", "colour": name, "path": _line(points)})
        marks.append({"class": "dots", "colour": name, "path": _dots(points)})
    titles = [
        f"block {block['block']}: " + ", ".join(f"{name} {values[i]:.2f} GiB" for name, values in used)
        for i, block in enumerate(blocks)
    ]
    chart = _chart([block["block"] for block in blocks], y, marks, titles)
    return chart | {"used": [name for name, _ in used], "budgets": [(n, f"{budget:.2f}") for n, budget in budgets]}


def timeline(spans: list[dict], blocks: list[dict], phases: list[str]) -> dict | None:
    """Bars by block, in seconds and lanes, and of the run and of every block the part to show; None without spans.

    A block's part lasts from the first to the last of what was done for it, its reading and writing too.
    """
    spans = _merged(spans)
    if not spans or len(spans) > MOST_SPANS:
        return {"bars": None, "count": len(spans)} if spans else None
    lanes = ordered(LANES, [span["lane"] for span in spans])
    bars, extents = defaultdict(list), defaultdict(lambda: (math.inf, -math.inf))
    for span in spans:
        block, start, end = span["block"], span["start"], span["end"]
        where = "whole model" if block is None else f"block {block}"
        title = f"{where}, {span['phase']}: {end - start:.3f} s from {start:.3f} s"
        bars[block].append((f"{start:.8g}", f"{end - start:.8g}", lanes.index(span["lane"]), span["phase"], title))
        for key in (block, ALL):
            extents[key] = min(extents[key][0], start), max(extents[key][1], end)
    shown = [block for block in blocks if block["block"] in extents]
    numbers = [block["block"] for block in shown]
    # Of the others, which a run before has pruned, there is less to see.
    pruned = [number for number in numbers if any(phase == "solve" for *_, phase, _ in bars[number])]
    return {
        "lanes": lanes,
        "bars": bars,
        "views": {str(key): _view(*extents[key], len(lanes)) for key in (ALL, *numbers)},
        "options": [(ALL, "the whole run")] + [(str(b["block"]), f"block {b['block']}, {b['name']}") for b in shown],
        "first": str(pruned[len(pruned) // 2]) if pruned and len(shown) > FEW_BLOCKS else ALL,
        "resumed": len(blocks) - len(pruned),
        "phases": [phase for phase in phases if any(span["phase"] == phase for span in spans)],
    }


def _merged(spans: list[dict]) -> list[dict]:
    """Spans by lane and time, with those of one block and phase that follow each other at once made one.

    The experts of a mixture are solved one by one, thousands of them.
    """
    merged: list[dict] = []
    for span in sorted(spans, key=lambda span: (span["lane"], span["start"])):
        last = merged[-1] if merged else None
        alike = last and all(span[what] == last[what] for what in ("lane", "block", "phase"))
        # The gaps may make up a hundredth.
        if alike and span["start"] - last["end"] <= 0.01 * (span["end"] - last["start"]):
            merged[-1] = last | {"end": max(last["end"], span["end"])}
        else:
            merged.append(span)
    return merged


def _view(low: float, high: float, lanes: int) -> dict:
    """The part of a timeline from `low` to `high` seconds, as an SVG viewBox, and its ticks."""
    width = max(high - low, 1e-5)
    ticks = [(f"{(t - low) / width:.2%}", label) for t, label in _ticks(low, low + width, 7)]
    return {"box": f"{low:.8g} 0 {width:.8g} {lanes}", "ticks": ticks}
