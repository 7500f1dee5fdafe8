"""The charts of report.html: marks stand where their numbers say, and the timeline shows the right views."""

import json
import re
from dataclasses import replace

import pytest
from helpers.pages import TYPES, Document, layer, report_of_run

from sparsefw.report import BlockRecord, charts
from sparsefw.report.charts import LayerAt
from sparsefw.report.html import page
from sparsefw.timeline import Span


def heights(path: str) -> list[float]:
    """The heights of a path's bars."""
    return [float(low) - float(high) for low, high in re.findall(r"M\S+ (\S+?)V(\S+?)h", path)]


def test_errors_by_type():
    """A chart for each type, with y from 0 to a little above 1; masks are drawn for refitted layers only."""
    layers = [LayerAt(i, kind, layer("", "sparsefw", 0.8, 0.5)) for i in range(2) for kind in TYPES]
    layers[2] = layers[2]._replace(result=layer("", "sparsefw", 0.8, 0.21))
    panels = charts.errors({"sparsefw": layers}, ["sparsefw"], [0, 1])
    assert list(panels) == list(TYPES)
    marks = {mark["class"]: mark["path"] for mark in panels[TYPES[0]]["marks"]}
    # In the chart 0 is at y = 1000, and 1 at y = 1000 - 1000 / 1.05.
    assert marks["line"] == "M250 523.8L750 800"
    assert marks["mask"] == "M250 238.1L750 238.1"
    assert ("523.8", "0.5") in panels[TYPES[1]]["y"]
    assert [title for *_, title in panels[TYPES[0]]["hits"]] == [
        "block 0: sparsefw 0.5000, mask only 0.8000",
        "block 1: sparsefw 0.2100, mask only 0.8000",
    ]


def test_time_is_stacked():
    blocks = [
        BlockRecord(7, "layers.7", "", {"solve": 3.0, "read": 1.0}, 0, 0),
        BlockRecord(8, "layers.8", "", {"solve": 2.0}, 0, 0),
    ]
    chart = charts.time(blocks, ["solve", "read"])
    solve, read = (mark["path"] for mark in chart["marks"])
    assert heights(solve) == pytest.approx([3 / 4.2 * 1000, 2 / 4.2 * 1000], rel=1e-3)
    assert heights(read) == pytest.approx([1 / 4.2 * 1000], rel=1e-3)
    # Reading stands on solving.
    assert re.search(r"V(\S+?)h", solve)[1] == re.match(r"M\S+ (\S+?)V", read)[1]
    assert chart["x"] == [("250", "7"), ("750", "8")]
    assert chart["hits"][0][2] == "block 7: 4.00 s (solve 3.00, read 1.00)"


@pytest.mark.parametrize(("limits", "drawn"), [({"host": 4 << 30}, True), ({"host": 400 << 30}, False), ({}, False)])
def test_memory(limits, drawn):
    """The GPU is drawn only where there is one, and a limit only where it would not press the lines flat."""
    report = report_of_run()
    report.memory.limits.clear()
    report.memory.limits.update(limits)
    document = Document(page(report))
    assert bool(document.all("path", **{"class": "mask host", "d": "M0 47.62L1000 47.62"})) == drawn
    assert not document.all("path", **{"class": "line gpu"})
    blocks = [replace(block, gpu_bytes=1 << 30, gpu_reserved_bytes=3 << 29) for block in report.blocks]
    document = Document(page(replace(report, blocks=blocks)))
    assert document.all("path", **{"class": "line gpu"})
    assert document.all("path", **{"class": "line reserved"})
    assert "block 0: host 1.00 GiB, gpu 1.00 GiB, reserved 1.50 GiB" in "".join(document.texts)
    row = next(cells for cells in document.cells() if cells[:2] == ["0", "model.layers.0"])
    assert row[-4:] == ["1.00", "1.00", "1.50", "once"]


def test_timeline_of_a_block():
    """A block's view begins with its reading, before the block is worked on."""
    report = report_of_run(blocks=9)
    phases = ["solve", "calibrate", "forward", "read", "embed"]
    timeline = charts.timeline(report.timeline, report.blocks, phases, set(range(9)))
    assert timeline["first"] == "4"
    assert timeline["views"]["4"]["box"] == "35 0 17 2"
    assert timeline["views"]["4"]["ticks"] == [("0.00%", "35"), ("29.41%", "40"), ("58.82%", "45"), ("88.24%", "50")]
    assert timeline["views"]["all"]["box"] == "-5 0 97 2"
    assert ("45", "6", 0, "solve", "block 4, solve: 6.000 s from 45.000 s") in timeline["bars"][4]
    assert timeline["resumed"] == 0
    document = Document(page(report))
    views = json.loads(document.all("script", type="application/json")[0]["text"])
    assert [option["value"] for option in document.all("option")] == ["all", *map(str, range(9))]
    assert views.keys() == timeline["views"].keys() == {"all", *map(str, range(9))}
    assert [option["value"] for option in document.all("option") if "selected" in option] == ["4"]
    assert document.all("svg", id="timeline")[0]["viewbox"] == views["4"]["box"]
    assert [g["data-block"] for g in document.all("g", **{"class": "on"})] == ["4"]


def test_spans_that_follow_each_other_at_once_are_one():
    """Spans of experts have one lane, block and phase, with next to nothing in between."""
    parts = [
        (0, "main", "solve", 0.0, 1.0),
        (0, "main", "solve", 1.01, 2.0),
        (0, "main", "solve", 2.1, 3.0),
        (1, "main", "solve", 3.0, 4.0),
        (1, "read", "solve", 0.5, 4.5),
        (1, "main", "read", 4.0, 5.0),
        (1, "main", "solve", 5.0, 6.0),
    ]
    blocks = [BlockRecord(i, f"layers.{i}", "", {}, 0, 0) for i in range(2)]
    bars = charts.timeline([Span(*part) for part in parts], blocks, ["solve", "read"], {0, 1})["bars"]
    assert [bar[:4] for bar in bars[0]] == [("0", "2", 0, "solve"), ("2.1", "0.9", 0, "solve")]
    assert [bar[:4] for bar in bars[1]] == [
        ("3", "1", 0, "solve"),
        ("4", "1", 0, "read"),
        ("5", "1", 0, "solve"),
        ("0.5", "4", 1, "solve"),
    ]


def test_timeline_of_a_resumed_run():
    """Blocks 0 to 5 were pruned before, the first of them without any trace."""
    report = report_of_run(blocks=9)
    report.timeline[:] = [
        span for span in report.timeline if span.block not in range(6) or (span.block and span.lane == "read")
    ]
    document = Document(page(report))
    assert [option["value"] for option in document.all("option")] == ["all", *map(str, range(1, 9))]
    assert [option["value"] for option in document.all("option") if "selected" in option] == ["7"]
    assert "6 of the blocks were pruned before the run was resumed" in "".join(document.texts)
    report.timeline.clear()
    assert "Timeline" not in page(report)


def test_timeline_with_a_block_that_is_ignored():
    """No layer of it was solved, but an earlier run has not pruned it either."""
    report = report_of_run(blocks=3)
    report.layers[:] = [layer for layer in report.layers if ".1." not in layer.name]
    report.timeline[:] = [span for span in report.timeline if (span.block, span.phase) != (1, "solve")]
    document = Document(page(report))
    assert "before the run was resumed" not in "".join(document.texts)
    assert [option["value"] for option in document.all("option")] == ["all", "0", "1", "2"]
