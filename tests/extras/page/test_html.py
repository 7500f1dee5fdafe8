"""report.html has the numbers of the log, draws them where they belong, and takes no text for markup."""

import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers.pages import report_of_run

from sparsefw.extras.page.html import MOST_ROWS, page
from sparsefw.report import log
from sparsefw.report.content import Report

VOID = {"meta", "br"}


class Document(HTMLParser):
    """The elements of a page in their order, with what was wrong in their nesting."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def texts(self, *tags: str) -> list[str]:
        return [e["text"] for e in self.elements if e["tag"] in tags]


HOSTILE = (
    "</script><script>alert(1)</script>",
    "</title></style><img src=x onerror=alert(1)>",
    '" onload="alert(1)" x=\'',
    "{{7*7}}{% raw %}{#",
    "<!-- &lt;b&gt;&amp;",
)


def test_numbers_are_those_of_the_log(pruned):
    report = report_of_run(pruned)
    cells = Document(page(report)).texts("td", "th")
    for line in [*log.summary(report)][1:4]:
        assert {*re.split("  +", line)} <= {*cells}
    for result in report.layers:
        # A row of the log has some of its cells, and the peak of memory so far.
        assert {*log.layer_row(result, "").split()[1:-1]} <= {*cells}


def test_what_has_no_place_in_a_chart(pruned):
    report = report_of_run(pruned)
    report.layers[-1] = replace(report.layers[-1], relative_error=math.inf)
    html = page(report)
    assert "-" in Document(html).texts("td")
    assert not re.search(r'd="[^"]*(inf|nan)', html)


def test_what_would_stop_a_browser_is_left_to_the_report(pruned):
    """All experts share a chart, and there is no table of them."""
    report = report_of_run(pruned)
    size, row = len(page(report)), report.layers[-1]
    report.layers.extend(replace(row, name=f"model.layers.0.mlp.experts.up[{i}]") for i in range(MOST_ROWS))
    report.kept_dense.extend(f"model.layers.{i}.mlp.experts.gate[{e}]" for i in range(8) for e in range(128))
    assert len(page(report)) < size + 2000


def test_loads_nothing(pruned):
    """The policy forbids what an element could load, and no text leads elsewhere."""
    html = page(report_of_run(pruned))
    assert "content=\"default-src 'none'; " in html
    assert re.findall(r"\w+://[^\"]*", html) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_never_markup(text, pruned):
    """The page has the same elements, attributes and scripts as with harmless names, and shows the names."""
    harmless, hostile = (Document(page(named(pruned, name))) for name in ("x", text))
    assert [list(e) for e in hostile.elements] == [list(e) for e in harmless.elements]
    assert [e["tag"] for e in hostile.elements] == [e["tag"] for e in harmless.elements]
    assert hostile.texts("script") == harmless.texts("script")
    assert hostile.texts("h1")[0] == f"{text}model"
    assert {f"{text}layers.0.{text}mlp.down_proj.weight", f"{text}layers.1"} <= {*hostile.texts("td", "th")}
    # Pasted into a shell, the command takes this name as an argument and does nothing else.
    assert f"{text}model" in shlex.split(hostile.texts("pre")[0])


def named(pruned, text: str) -> Report:
    """A run with this text in all names that a checkpoint, a data set or a user gives."""
    report = report_of_run(pruned)
    arguments = {"model": f"{text}model", "dataset": (f"{text}data",), "ignore": (text, f"re:{text}")}

    def renamed(part):
        return replace(part, name=part.name.replace("model.", text).replace(".mlp", f".{text}mlp"))

    return replace(
        report,
        arguments=report.arguments | arguments,
        given=arguments,
        data=replace(report.data, source=f"{text}data"),
        evaluation=[replace(report.evaluation[0], source=f"{text}evaluation text")],
        layers=[*map(renamed, report.layers)],
        blocks=[*map(renamed, report.blocks)],
        kept_dense=[f"{text}layers.0.{text}gate.weight"],
        device=f"{text}card",
        memory=replace(report.memory, activations=text),
        notes=[text],
    )


def test_characters_that_do_not_print_are_spelled_out(pruned):
    html = page(named(pruned, "a\x00\x1b[31m\u202e\u2066\x85\ud800\ufeff\r\n\tb"))
    assert r"a\x00\x1b[31m\u202e\u2066\x85\ud800\ufeff\r\n\tb" in html
    assert {c for c in html if not c.isprintable()} == {"\n"}
    html.encode()
