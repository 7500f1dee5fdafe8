"""report.html: the numbers of the log, and nothing of what a checkpoint says taken for markup."""

import base64
import hashlib
import re
import shlex
from copy import deepcopy

import pytest
import torch
from helpers.pages import TYPES, Document, content, layer, parsed

from sparsefw.data.windows import Windows
from sparsefw.driver.loop import Outcome
from sparsefw.report import charts
from sparsefw.report import content as report
from sparsefw.report.html import COLUMNS, MOST_ROWS, page
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import Timeline

HOSTILE = (
    "</script><script>alert(1)</script>",
    "</title></style><img src=x onerror=alert(1)>",
    '" onload="alert(1)" x=\'',
    "{{7*7}}{% raw %}{#",
    "javascript:alert(1)",
    "<!--",
    "&lt;b&gt;&amp;",
)


def outcome_of(run: dict) -> Outcome:
    rows = [LayerResult(**{**row, "shape": tuple(row["shape"])}) for row in run["layers"]]
    return Outcome(
        Timeline(), layers=rows, perplexity={text["source"]: text["perplexity"] for text in run["evaluation"]}
    )


def test_numbers_are_those_of_the_log():
    run = content()
    cells = Document(page(run)).cells()
    windows = [Windows(torch.zeros(4, 128, dtype=torch.int64), "held out", "def456")]
    log = report.summary(outcome_of(run), ["wanda", "sparsefw"], windows).splitlines()
    for line in log[1:4]:
        assert line.split() in [[cell for cell in row if cell] for row in cells]
    for row, said in zip(outcome_of(run).layers, run["layers"], strict=True):
        # The last one of the log is the peak of memory so far.
        assert report.layer_row(row).split()[:-1] in cells, said
    assert report.layer_header().split() == [*" ".join(COLUMNS).split(), "peak", "GiB"]


def test_facts():
    run = content()
    document = Document(page(run))
    facts = dict(zip((e["text"] for e in document.all("dt")), (e["text"] for e in document.all("dd")), strict=True))
    assert facts["device"] == "a card"
    assert facts["calibration"] == "a text: 8 windows of 128 tokens, sha256 abc123"
    assert facts["host budget"] == "4.00 GiB"
    assert facts["gpu budget"] == "none"
    assert facts["peak host"] == "3.00 GiB"
    assert facts["sparsity"] == "0.5"
    del run["memory"]
    assert "host budget" not in page(run)


def test_loads_nothing_and_runs_only_its_own_script():
    html = page(content())
    document = Document(html)
    for element in document.elements:
        assert not {"src", "href", "srcset", "style", "action"} & element.keys()
        assert not [name for name in element if name.startswith("on")]
        assert element["tag"] not in ("link", "img", "iframe", "object", "form", "base")
    policy = document.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    directives = dict(part.split(maxsplit=1) for part in policy.split(";"))
    assert directives["default-src"] == directives["base-uri"] == directives["form-action"] == "'none'"
    for name, text in (("style-src", document.all("style")[0]), ("script-src", document.all("script")[-1])):
        digest = base64.b64encode(hashlib.sha256(text["text"].encode()).digest()).decode()
        assert directives[name].strip() == f"'sha256-{digest}'"
    # The other one is data.
    assert [script.get("type") for script in document.all("script")] == ["application/json", None]
    assert re.findall(r"\w+://[^\"]*", html) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_never_markup(text):
    """The same elements, attributes and scripts as with harmless names, and the names shown as they are."""
    harmless, hostile = (Document(page(named(one))) for one in ("x", text))
    assert [sorted(e.keys()) for e in hostile.elements] == [sorted(e.keys()) for e in harmless.elements]
    assert [e["tag"] for e in hostile.elements] == [e["tag"] for e in harmless.elements]
    assert [e["text"] for e in hostile.all("script")] == [e["text"] for e in harmless.all("script")]
    assert hostile.all("h1")[0]["text"] == f"{text}model"
    cells = {cell for row in hostile.cells() for cell in row}
    assert {f"{text}layers.0.{text}mlp.down_proj.weight", f"{text}layers.1"} <= cells
    assert f"{text}mlp.down_proj" in {e["text"] for e in hostile.all("h3")}
    assert f"relative error of {text}mlp.down_proj by block" in {e.get("aria-label") for e in hostile.all("svg")}
    assert f"{text}gate" in "".join(hostile.texts)
    # Whoever pastes the command passes on the name and nothing else.
    assert f"{text}model" in shlex.split("".join(e["text"] + " " for e in hostile.all("span")))


def named(text: str) -> dict:
    """A run with a text in all that a checkpoint, a data set or a user names."""
    run = content(prefix=f"{text}layers")
    for row in run["layers"]:
        row["name"] = row["name"].replace(".mlp", f".{text}mlp")
    run["arguments"]["model"] = f"{text}model"
    run["arguments"]["dataset"] = run["data"]["source"] = f"{text}data"
    run["evaluation"][0]["source"] = f"{text}held out"
    run["kept_dense"] = [f"{text}layers.0.{text}gate.weight"]
    run["device"] = f"{text}card"
    run["memory"]["activations"] = text
    return run


def test_characters_that_do_not_print_are_spelled_out():
    text = "a\x00\x1b[31m\u202e\u2066\x85\ud800\ufeff\r\n\tb"
    html = page(named(text))
    assert r"a\x00\x1b[31m\u202e\u2066\x85\ud800\ufeff\r\n\tb" in html
    assert {c for c in html if not c.isprintable()} == {"\n"}
    html.encode()


def test_methods_that_are_their_own_warm_start_are_not_drawn():
    run = content()
    document = Document(page(run))
    assert not document.all("path", **{"class": "line m1"})
    assert "Not drawn: wanda" in "".join(document.texts)
    run["layers"] = [row for row in run["layers"] if row["method"] == "wanda"]
    run["arguments"].update(method="wanda", compare=[])
    html = page(run)
    assert "Not drawn: wanda" in html
    assert "relative error of" not in html


def test_experts_are_one_type():
    run = content()
    run["layers"] += [
        layer(f"model.layers.1.mlp.experts.{name}", "sparsefw", 0.9, error)
        for error, name in ((0.25, "down_proj[0]"), (0.5, "down_proj[17]"), (0.2, "3.w1.weight"), (0.4, "11.w1.weight"))
    ]
    document = Document(page(run))
    assert [e["text"] for e in document.all("h3")][5:9] == [*TYPES, "mlp.experts.down_proj[*]", "mlp.experts.*.w1"]
    titles = [e["text"] for e in document.all("title")]
    assert "block 1: sparsefw 0.3750 (mean of 2, 0.2500 to 0.5000), mask only 0.9000" in titles
    row = ["mlp.experts.*.w1", "sparsefw", "2", "0.9000", "0.3000", "0.2000", "0.4000", "0.50"]
    assert row in document.cells()
    assert len(document.all("path", **{"class": "band m0"})) == 2


def test_a_number_that_is_not_finite_is_in_the_table_only():
    run = content()
    run["layers"][-1]["relative_error"] = float("inf")
    html = page(run)
    assert "inf" in {cell for row in Document(html).cells() for cell in row}
    assert not re.search(r'd="[^"]*(inf|nan)', html)


def test_what_would_stop_a_browser_is_left_to_the_report(monkeypatch):
    run = content()
    extra = [layer(f"model.layers.0.mlp.experts.up[{i}]", "sparsefw", 0.8, 0.5) for i in range(MOST_ROWS - 12)]
    run["layers"] += extra
    assert extra[-1]["name"] in page(run)
    run["layers"].append(extra[0])
    html = page(run)
    assert "experts.up[0]" not in html
    assert "experts.up[*]" in html
    assert f"The table of all {MOST_ROWS + 1:,} layers is in report.json" in html
    monkeypatch.setattr(charts, "MOST_SPANS", len(run["timeline"]) - 1)
    html = page(run)
    assert f"Its {len(run['timeline'])} spans are in report.json" in html
    assert "application/json" not in html


def test_deep_models_and_large_mixtures_stay_small():
    deep = content(blocks=126)
    deep["layers"] = [
        layer(f"model.layers.{i}.{kind}.weight", method, 0.8, 0.5)
        for i in range(126)
        for method in ("wanda", "sparsefw")
        for kind in "abcdefg"
    ]
    assert len(page(deep)) < 1_500_000
    mixture = content(blocks=48)
    mixture["layers"] += [
        layer(f"model.layers.{i}.mlp.experts.{kind}[{e}]", "sparsefw", 0.8, 0.5)
        for i in range(48)
        for kind in ("gate", "up", "down")
        for e in range(128)
    ]
    assert len(page(mixture)) < 500_000


def test_a_run_without_evaluation():
    run = content()
    run["evaluation"] = []
    rows = Document(page(run)).cells()
    assert ["sparsefw", "0.8000", "0.6000"] in rows
    assert "dense" not in [row[0] for row in rows]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--method", "wanda", "--compare", "ria", "--compare", "magnitude"),
        ("--alpha", "0.25", "--eval", "a b.txt", "--eval", "c'd.txt", "--overwrite", "--refit", "0"),
        ("--model", "$(x) `y`", "--preset", "paper", "--sparsity", "2:4", "--eval-windows", "3"),
    ],
)
def test_the_command_gives_the_same_arguments(arguments):
    run = content(arguments=arguments)
    command = " ".join(e["text"] for e in Document(page(without_results(run))).all("span"))
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "sparsefw.run"]
    assert parsed(words[3:]) == run["arguments"]


def without_results(run: dict) -> dict:
    """The run with its arguments' methods in place of those it had."""
    run = deepcopy(run)
    methods = [*run["arguments"]["compare"], run["arguments"]["method"]]
    run["layers"] = [layer(f"model.layers.0.{TYPES[0]}.weight", method, 0.8, 0.5) for method in methods]
    run["evaluation"] = []
    return run


def test_a_layer_outside_of_the_blocks():
    run = content()
    run["layers"].append(layer("model.layers.12.mlp.up_proj.weight", "sparsefw", 0.8, 0.5))
    with pytest.raises(ValueError, match=r"^model\.layers\.12\.mlp\.up_proj\.weight: in none of the blocks$"):
        page(run)
