"""report.html has the numbers of the log, and takes no text of a checkpoint for markup."""

import base64
import hashlib
import math
import re
import shlex
from dataclasses import replace

import pytest
from helpers.pages import TYPES, Document, layer, parsed, report_of_run

from sparsefw.report import PREDICTIONS, Reconstruction, Report, charts, log
from sparsefw.report.html import MOST_ROWS, page

HOSTILE = (
    "</script><script>alert(1)</script>",
    "</title></style><img src=x onerror=alert(1)>",
    '" onload="alert(1)" x=\'',
    "{{7*7}}{% raw %}{#",
    "javascript:alert(1)",
    "<!--",
    "&lt;b&gt;&amp;",
)


def facts_of(report: Report) -> dict[str, str]:
    document = Document(page(report))
    return dict(zip((e["text"] for e in document.all("dt")), (e["text"] for e in document.all("dd")), strict=True))


def test_numbers_are_those_of_the_log():
    report = report_of_run()
    cells = Document(page(report)).cells()
    for line in [*log.summary(report)][1:4]:
        assert line.split() in [[cell for cell in row if cell] for row in cells]
    for result in report.layers:
        # A row of the log has one more cell, the peak of memory so far.
        assert log.layer_row(result).split()[:-1] in cells, result
    assert ["layer", *log.COLUMNS[1:]] in cells
    assert log.layer_header().split() == [*" ".join(log.COLUMNS).split(), "peak", "GiB"]


def test_facts():
    report = report_of_run(arguments=("--ignore", "q_proj", "--ignore", "layers.1"))
    facts = facts_of(report)
    assert facts["device"] == "a card"
    assert facts["calibration"] == "a text: 8 windows of 128 tokens, sha256 abc123"
    assert facts["host limit"] == "4.00 GiB"
    assert facts["host expected"] == "2.00 GiB"
    assert "gpu limit" not in facts
    assert facts["solver"] == "1.00 GiB"
    assert facts["read ahead"] == "yes"
    assert facts["peak host"] == "3.00 GiB"
    assert facts["sparsity"] == "0.5"
    assert facts["include"] == "none"
    assert facts["ignore"] == "q_proj, layers.1"
    assert facts["keep-zeros"] == "no"
    report.memory.limits.update(gpu=2 << 30)
    assert facts_of(report)["gpu limit"] == "2.00 GiB"
    report.peak_memory.update(gpu_bytes=1 << 30, gpu_reserved_bytes=3 << 29)
    assert facts_of(report)["peak gpu"] == "1.00 GiB"
    assert facts_of(report)["peak gpu reserved"] == "1.50 GiB"


def block_tables(report: Report) -> list[dict[str, str]]:
    """The rows of the table of blocks, by column."""
    cells = Document(page(report)).cells()
    head = next(n for n, row in enumerate(cells) if row[:2] == ["block", "name"])
    return [dict(zip(cells[head], row, strict=True)) for row in cells[head + 1 : head + 1 + len(report.blocks)]]


def test_losses_of_blocks_only_where_some_were_reconstructed():
    report = report_of_run()
    assert all(not {"loss before", "loss after"} & row.keys() for row in block_tables(report))
    found = Reconstruction(0.25, 0.123456, 18, False), None, Reconstruction(0.5, math.inf, 18, True, PREDICTIONS)
    blocks = [replace(block, reconstruction=x) for block, x in zip(report.blocks, found, strict=True)]
    rows = block_tables(replace(report, blocks=blocks))
    assert [(row["loss before"], row["loss after"]) for row in rows] == [
        ("0.25000", "0.12346"),
        ("-", "-"),
        ("0.50000", "inf (predictions, put back)"),
    ]
    # The other columns are where they were.
    assert [row["calibration"] for row in rows] == ["once"] * 3
    plain = [row | {"loss before": "", "loss after": ""} for row in block_tables(report)]
    assert [row | {"loss before": "", "loss after": ""} for row in rows] == plain


def test_phases_have_classes_of_the_style_sheet():
    """The last of them is that of all others."""
    html = page(report_of_run())
    for n in range(len(charts.PHASES) + 1):
        assert f".p{n} {{" in html or f".p{n}," in html, n


def test_loads_nothing_and_runs_only_its_own_script():
    html = page(report_of_run())
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
    # One of the scripts is data.
    assert [script.get("type") for script in document.all("script")] == ["application/json", None]
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
    assert f"{text}mlp.down_proj" in {e["text"] for e in hostile.all("h3")}
    assert f"relative error of {text}mlp.down_proj by block" in {e.get("aria-label") for e in hostile.all("svg")}
    assert f"{text}gate" in "".join(hostile.texts)
    # Pasted into a shell, the command takes this name as an argument and does nothing else.
    assert f"{text}model" in shlex.split("".join(e["text"] + " " for e in hostile.all("span")))


def named(text: str) -> Report:
    """A run with this text in all names that a checkpoint, a data set or a user gives."""
    report = report_of_run(prefix=f"{text}layers")
    arguments = {"model": f"{text}model", "dataset": f"{text}data", "ignore": (text, f"re:{text}")}
    return replace(
        report,
        arguments=report.arguments | arguments,
        data=replace(report.data, source=f"{text}data"),
        evaluation=[replace(report.evaluation[0], source=f"{text}evaluation text")],
        layers=[replace(row, name=row.name.replace(".mlp", f".{text}mlp")) for row in report.layers],
        kept_dense=[f"{text}layers.0.{text}gate.weight"],
        device=f"{text}card",
        memory=replace(report.memory, activations=text),
        notes=[text],
    )


def test_characters_that_do_not_print_are_spelled_out():
    text = "a\x00\x1b[31m\u202e\u2066\x85\ud800\ufeff\r\n\tb"
    html = page(named(text))
    assert r"a\x00\x1b[31m\u202e\u2066\x85\ud800\ufeff\r\n\tb" in html
    assert {c for c in html if not c.isprintable()} == {"\n"}
    html.encode()


def test_methods_that_are_their_own_warm_start_are_not_drawn():
    report = report_of_run()
    document = Document(page(report))
    assert not document.all("path", **{"class": "line m1"})
    assert "Not drawn: wanda" in "".join(document.texts)
    report.layers[:] = report.layers_of("wanda")
    report.arguments.update(method="wanda", compare=())
    html = page(report)
    assert "Not drawn: wanda" in html
    assert "relative error of" not in html


def test_experts_are_one_type():
    report = report_of_run()
    report.layers.extend(
        layer(f"model.layers.1.mlp.experts.{name}", "sparsefw", 0.9, error)
        for error, name in ((0.25, "down_proj[0]"), (0.5, "down_proj[17]"), (0.2, "3.w1.weight"), (0.4, "11.w1.weight"))
    )
    document = Document(page(report))
    assert [e["text"] for e in document.all("h3")][5:9] == [*TYPES, "mlp.experts.down_proj[*]", "mlp.experts.*.w1"]
    titles = [e["text"] for e in document.all("title")]
    assert "block 1: sparsefw 0.3750 (mean of 2, 0.2500 to 0.5000), mask only 0.9000" in titles
    row = ["mlp.experts.*.w1", "sparsefw", "2", "0.9000", "0.3000", "0.2000", "0.4000", "0.50"]
    assert row in document.cells()
    assert len(document.all("path", **{"class": "band m0"})) == 2


def test_a_number_that_is_not_finite_is_in_the_table_only():
    report = report_of_run()
    report.layers[-1] = replace(report.layers[-1], relative_error=float("inf"))
    html = page(report)
    assert "inf" in {cell for row in Document(html).cells() for cell in row}
    assert not re.search(r'd="[^"]*(inf|nan)', html)


def test_what_would_stop_a_browser_is_left_to_the_report(monkeypatch):
    report = report_of_run()
    extra = [layer(f"model.layers.0.mlp.experts.up[{i}]", "sparsefw", 0.8, 0.5) for i in range(MOST_ROWS - 12)]
    report.layers.extend(extra)
    assert extra[-1].name in page(report)
    report.layers.append(extra[0])
    html = page(report)
    assert "experts.up[0]" not in html
    assert "experts.up[*]" in html
    assert f"The table of all {MOST_ROWS + 1:,} layers is in report.json" in html
    monkeypatch.setattr(charts, "MOST_SPANS", len(report.timeline) - 1)
    html = page(report)
    assert f"Its {len(report.timeline)} spans are in report.json" in html
    assert "application/json" not in html


@pytest.mark.slow
def test_deep_models_and_large_mixtures_stay_small():
    deep = report_of_run(blocks=126)
    deep.layers[:] = [
        layer(f"model.layers.{i}.{kind}.weight", method, 0.8, 0.5)
        for i in range(126)
        for method in ("wanda", "sparsefw")
        for kind in "abcdefg"
    ]
    assert len(page(deep)) < 1_500_000
    mixture = report_of_run(blocks=48)
    mixture.layers.extend(
        layer(f"model.layers.{i}.mlp.experts.{kind}[{e}]", "sparsefw", 0.8, 0.5)
        for i in range(48)
        for kind in ("gate", "up", "down")
        for e in range(128)
    )
    assert len(page(mixture)) < 500_000


def test_a_run_without_evaluation():
    report = report_of_run()
    report.evaluation.clear()
    rows = Document(page(report)).cells()
    assert ["sparsefw", "0.8000", "0.6000"] in rows
    assert "dense" not in [row[0] for row in rows]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--method", "wanda", "--compare", "ria", "--compare", "magnitude"),
        ("--alpha", "0.25", "--eval", "a b.txt", "--eval", "c'd.txt", "--overwrite", "--refit", "0"),
        ("--model", "$(x) `y`", "--preset", "paper", "--sparsity", "2:4", "--eval", "a b.txt", "--eval-windows", "3"),
        ("--include", "mlp", "--ignore", "layers.0", "--ignore", r"re:.*\.(q|k)_proj", "--keep-zeros"),
        ("--method", "sparsegpt", "--sparsity", "layer:0.5", "--gpu-memory", "2.5", "--restart"),
    ],
)
def test_the_command_gives_the_same_arguments(arguments):
    report = report_of_run(arguments=arguments)
    command = " ".join(e["text"] for e in Document(page(without_results(report))).all("span"))
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "sparsefw.run"]
    assert parsed(words[3:]) == report.arguments


def without_results(report: Report) -> Report:
    """The run with one layer for each method of its arguments, and without evaluation."""
    layers = [layer(f"model.layers.0.{TYPES[0]}.weight", method, 0.8, 0.5) for method in report.methods]
    return replace(report, layers=layers, evaluation=[])


def test_a_layer_outside_of_the_blocks():
    report = report_of_run()
    report.layers.append(layer("model.layers.12.mlp.up_proj.weight", "sparsefw", 0.8, 0.5))
    with pytest.raises(ValueError, match=r"^model\.layers\.12\.mlp\.up_proj\.weight: in none of the blocks$"):
        page(report)


class TestKeptDense:
    def test_is_shown_by_type_and_block(self):
        report = report_of_run(blocks=9)
        assert "Kept dense" not in page(report)
        ignored = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1, 2, 4, 7, 8)]
        routers = [f"model.layers.{i}.mlp.gate.weight" for i in (3, 0)]
        experts = [f"model.layers.5.mlp.experts.up_proj[{e}]" for e in range(3)]
        document = Document(page(replace(report, kept_dense=ignored + routers + experts)))
        assert ["mlp.down_proj", "6", "0 to 2, 4, 7, 8"] in document.cells()
        assert ["mlp.gate", "2", "0, 3"] in document.cells()
        assert ["mlp.experts.up_proj[*]", "3", "5"] in document.cells()
        assert "11 matrices kept dense" in "".join(document.texts)

    def test_stays_small_where_most_layers_are_ignored(self):
        """Ignored layers have one row for each type, whatever their number."""
        report = report_of_run(blocks=126)
        size = len(page(report))
        types = [f"mlp.experts.{kind}[{e}]" for kind in ("gate", "up", "down") for e in range(128)]
        report.kept_dense.extend(f"model.layers.{i}.{kind}" for i in range(120) for kind in types)
        assert len(page(report)) < size + 1500
        assert ["mlp.experts.gate[*]", "15,360", "0 to 119"] in Document(page(report)).cells()
