"""The charts of report.html: marks where their numbers are, and what is shown of the timeline."""

import json
import re

import pytest
from helpers.pages import TYPES, Document, content, layer

from sparsefw.report import charts
from sparsefw.report.html import page


def heights(path: str) -> list[float]:
    """Of the bars of a path."""
    return [float(low) - float(high) for low, high in re.findall(r"M\S+ (\S+?)V(\S+?)h", path)]


def test_errors_by_type():
    """A chart for each type, y from 0 to a little above 1, the mask only beside what was refitted."""
    rows = {"sparsefw": [(i, kind, layer("", "sparsefw", 0.8, 0.5)) for i in range(2) for kind in TYPES]}
    rows["sparsefw"][2][2]["relative_error"] = 0.21
    found = charts.errors(rows, ["sparsefw"], [0, 1])
    assert list(found) == list(TYPES)
    marks = {mark["class"]: mark["path"] for mark in found[TYPES[0]]["marks"]}
    # 1000 is 0 and 1000 - 1000 / 1.05 is 1.
    assert marks["line"] == "M250 523.8L750 800"
    assert marks["mask"] == "M250 238.1L750 238.1"
    assert ("523.8", "0.5") in [(y, label) for y, label in charts.errors(rows, ["sparsefw"], [0, 1])[TYPES[1]]["y"]]
    assert [title for *_, title in found[TYPES[0]]["hits"]] == [
        "block 0: sparsefw 0.5000, mask only 0.8000",
        "block 1: sparsefw 0.2100, mask only 0.8000",
    ]


def test_time_is_stacked():
    blocks = [{"block": 7, "seconds": {"solve": 3.0, "read": 1.0}}, {"block": 8, "seconds": {"solve": 2.0}}]
    chart = charts.time(blocks, ["solve", "read"])
    solve, read = (mark["path"] for mark in chart["marks"])
    assert heights(solve) == pytest.approx([3 / 4.2 * 1000, 2 / 4.2 * 1000], rel=1e-3)
    assert heights(read) == pytest.approx([1 / 4.2 * 1000], rel=1e-3)
    # It stands on the other.
    assert re.search(r"V(\S+?)h", solve)[1] == re.match(r"M\S+ (\S+?)V", read)[1]
    assert chart["x"] == [("250", "7"), ("750", "8")]
    assert chart["hits"][0][2] == "block 7: 4.00 s (solve 3.00, read 1.00)"


@pytest.mark.parametrize(("budget", "drawn"), [(4 << 30, True), (400 << 30, False), (None, False)])
def test_memory(budget, drawn):
    """The GPU's only where there is one; a budget that is far away would press the lines flat."""
    run = content()
    run["memory"]["host_budget_bytes"] = budget
    document = Document(page(run))
    assert bool(document.all("path", **{"class": "mask host", "d": "M0 47.62L1000 47.62"})) == drawn
    assert not document.all("path", **{"class": "line gpu"})
    for block in run["blocks"]:
        block["gpu_bytes"] = 1 << 30
    assert Document(page(run)).all("path", **{"class": "line gpu"})


def test_timeline_of_a_block():
    """From its reading, before it is worked on, to its end."""
    blocks = [{"block": i, "name": f"layers.{i}"} for i in range(9)]
    run = content(blocks=9)
    found = charts.timeline(run["timeline"], blocks, ["solve", "calibrate", "forward", "read", "embed"])
    assert found["first"] == "4"
    assert found["views"]["4"]["box"] == "35 0 17 2"
    assert found["views"]["4"]["ticks"] == [("0.00%", "35"), ("29.41%", "40"), ("58.82%", "45"), ("88.24%", "50")]
    assert found["views"]["all"]["box"] == "-5 0 97 2"
    assert ("45", "6", 0, "solve", "block 4, solve: 6.000 s from 45.000 s") in found["bars"][4]
    assert found["resumed"] == 0
    document = Document(page(run))
    views = json.loads(document.all("script", type="application/json")[0]["text"])
    assert [option["value"] for option in document.all("option")] == ["all", *map(str, range(9))]
    assert views.keys() == found["views"].keys() == {"all", *map(str, range(9))}
    assert [option["value"] for option in document.all("option") if "selected" in option] == ["4"]
    assert document.all("svg", id="timeline")[0]["viewbox"] == views["4"]["box"]
    assert [g["data-block"] for g in document.all("g", **{"class": "on"})] == ["4"]


def test_spans_that_follow_each_other_at_once_are_one():
    """As those of experts do: of one lane, block and phase, with next to nothing in between."""
    parts = [
        (0, "main", "solve", 0.0, 1.0),
        (0, "main", "solve", 1.01, 2.0),
        (0, "main", "solve", 2.1, 3.0),
        (1, "main", "solve", 3.0, 4.0),
        (1, "read", "solve", 0.5, 4.5),
        (1, "main", "read", 4.0, 5.0),
        (1, "main", "solve", 5.0, 6.0),
    ]
    spans = [dict(zip(("block", "lane", "phase", "start", "end"), part, strict=True)) for part in parts]
    blocks = [{"block": i, "name": f"layers.{i}"} for i in range(2)]
    bars = charts.timeline(spans, blocks, ["solve", "read"])["bars"]
    assert [bar[:4] for bar in bars[0]] == [("0", "2", 0, "solve"), ("2.1", "0.9", 0, "solve")]
    assert [bar[:4] for bar in bars[1]] == [
        ("3", "1", 0, "solve"),
        ("4", "1", 0, "read"),
        ("5", "1", 0, "solve"),
        ("0.5", "4", 1, "solve"),
    ]


def test_timeline_of_a_resumed_run():
    """Blocks 0 to 5 were pruned before, the first of them without any trace."""
    run = content(blocks=9)
    run["timeline"] = [
        span for span in run["timeline"] if span["block"] not in range(6) or (span["block"] and span["lane"] == "read")
    ]
    document = Document(page(run))
    assert [option["value"] for option in document.all("option")] == ["all", *map(str, range(1, 9))]
    assert [option["value"] for option in document.all("option") if "selected" in option] == ["7"]
    assert "6 of the blocks were pruned before the run was resumed" in "".join(document.texts)
    run["timeline"] = []
    assert "Timeline" not in page(run)


def test_what_was_kept():
    run = content()
    assert "Kept dense" not in page(run)
    run["kept_dense"] = [f"model.layers.{i}.mlp.gate.weight" for i in (0, 2)]
    document = Document(page(run))
    assert "mlp.gate × 2" in [e["text"] for e in document.all("li")]
