"""report.html has the numbers of the log, draws them where they belong, and takes no text for markup."""

import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers.pages import TYPES, layer, report_of_run

from sparsefw.extras.page.html import MOST_ROWS, page
from sparsefw.report import log
from sparsefw.report.content import Report

VOID = {"meta", "br"}


class Document(HTMLParser):
    """The elements of a page in their order, with what was wrong in their nesting."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        self.texts.append(data)
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attributes: str) -> list[dict]:
        return [e for e in self.elements if e["tag"] == tag and attributes.items() <= e.items()]

    def cells(self) -> list[list[str]]:
        """The rows of all tables."""
        rows = []
        for element in self.elements:
            if element["tag"] == "tr":
                rows.append([])
            elif element["tag"] in ("td", "th"):
                rows[-1].append(element["text"])
        return rows


HOSTILE = (
    "</script><script>alert(1)</script>",
    "</title></style><img src=x onerror=alert(1)>",
    '" onload="alert(1)" x=\'',
    "{{7*7}}{% raw %}{#",
    "<!-- &lt;b&gt;&amp;",
)


def test_numbers_are_those_of_the_log():
    report = report_of_run()
    cells = Document(page(report)).cells()
    for line in [*log.summary(report)][1:4]:
        assert line.split() in [[cell for cell in row if cell] for row in cells]
    for result in report.layers:
        # A row of the log has some of its cells, and the peak of memory so far.
        assert any({*log.layer_row(result, "").split()[1:-1]} <= {*row} for row in cells), result
    assert ["layer", *log.LAYER_COLUMNS[1:]] in cells


# Charts


def test_experts_are_one_type():
    report = report_of_run()
    report.layers.extend(
        layer(f"model.layers.1.mlp.experts.{name}", "sparsefw", 0.9, error)
        for error, name in ((0.25, "down_proj[0]"), (0.5, "down_proj[17]"), (0.2, "3.w1.weight"), (0.4, "11.w1.weight"))
    )
    document = Document(page(report))
    types = [*TYPES, "mlp.experts.down_proj[*]", "mlp.experts.*.w1"]
    assert [e["text"] for e in document.all("h3") if e["text"] in types] == types
    titles = [e["text"] for e in document.all("title")]
    assert "block 1; sparsefw 0.3750, mask only 0.9000" in titles
    assert len(document.all("path", **{"class": "band m0"})) == 2


def test_what_has_no_place_in_a_chart():
    report = report_of_run()
    report.evaluation.clear()
    report.layers[-1] = replace(report.layers[-1], relative_error=math.inf)
    html = page(report)
    assert "inf" in {cell for row in Document(html).cells() for cell in row}
    assert not re.search(r'd="[^"]*(inf|nan)', html)
    report.layers.append(layer("model.layers.12.mlp.up_proj.weight", "sparsefw", 0.8, 0.5))
    with pytest.raises(ValueError, match=r"^model\.layers\.12\.mlp\.up_proj\.weight: in none of the blocks$"):
        page(report)


def test_what_would_stop_a_browser_is_left_to_the_report():
    report = report_of_run(blocks=9)
    size = len(page(report))
    report.layers.extend(layer(f"model.layers.0.mlp.experts.up[{i}]", "sparsefw", 0.8, 0.5) for i in range(MOST_ROWS))
    report.kept_dense.extend(f"model.layers.{i}.mlp.experts.gate[{e}]" for i in range(8) for e in range(128))
    html = page(report)
    assert len(html) < size + 2000
    assert f"The table of all {len(report.layers):,} layers is in report.json" in html
    assert ["mlp.experts.gate[*]", "1,024", "0 to 7"] in Document(html).cells()


# Text


def test_loads_nothing():
    html = page(report_of_run())
    document = Document(html)
    for element in document.elements:
        assert not {"src", "href", "srcset", "style", "action"} & element.keys()
        assert not [name for name in element if name.startswith("on")]
        assert element["tag"] not in ("link", "img", "iframe", "object", "form", "base")
    policy = document.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; ")
    assert re.findall(r"\w+://[^\"]*", html) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_never_markup(text):
    """The page has the same elements, attributes and scripts as with harmless names, and shows the names."""
    harmless, hostile = (Document(page(named(name))) for name in ("x", text))
    assert [sorted(e.keys()) for e in hostile.elements] == [sorted(e.keys()) for e in harmless.elements]
    assert [e["tag"] for e in hostile.elements] == [e["tag"] for e in harmless.elements]
    assert [e["text"] for e in hostile.all("script")] == [e["text"] for e in harmless.all("script")]
    assert hostile.all("h1")[0]["text"] == f"{text}model"
    cells = {cell for row in hostile.cells() for cell in row}
    assert {f"{text}layers.0.{text}mlp.down_proj.weight", f"{text}layers.1"} <= cells
    assert f"relative error of {text}mlp.down_proj by block" in {e.get("aria-label") for e in hostile.all("svg")}
    # Pasted into a shell, the command takes this name as an argument and does nothing else.
    assert f"{text}model" in shlex.split(hostile.all("pre")[0]["text"])


def named(text: str) -> Report:
    """A run with this text in all names that a checkpoint, a data set or a user gives."""
    report = report_of_run(prefix=f"{text}layers")
    arguments = {"model": f"{text}model", "dataset": (f"{text}data",), "ignore": (text, f"re:{text}")}
    return replace(
        report,
        arguments=report.arguments | arguments,
        given=arguments,
        data=replace(report.data, source=f"{text}data"),
        evaluation=[replace(report.evaluation[0], source=f"{text}evaluation text")],
        layers=[replace(row, name=row.name.replace(".mlp", f".{text}mlp")) for row in report.layers],
        kept_dense=[f"{text}layers.0.{text}gate.weight"],
        device=f"{text}card",
        memory=replace(report.memory, activations=text),
        notes=[text],
    )


def test_characters_that_do_not_print_are_spelled_out():
    html = page(named("a\x00\x1b[31m\u202e\u2066\x85\ud800\ufeff\r\n\tb"))
    assert r"a\x00\x1b[31m\u202e\u2066\x85\ud800\ufeff\r\n\tb" in html
    assert {c for c in html if not c.isprintable()} == {"\n"}
    html.encode()
