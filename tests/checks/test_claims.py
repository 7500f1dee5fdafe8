"""Wrong claims in report.json: layers that the model does not have, layers left out, values of the wrong kind."""

import json
import re

import pytest
import torch
from helpers.verifying import (
    EMBEDDING,
    NORM,
    WANDA,
    Q,
    change_report,
    change_tensor,
    only_failure,
    refused,
    verdict,
)

from sparsefw.checks.claims import read_claims
from sparsefw.errors import InputError

UP = "model.layers.0.mlp.up_proj.weight"


def test_fewer_layers_than_the_model(copied, capsys):
    _, output = copied(*WANDA)
    change_report(output, lambda report: report["layers"].pop(0))
    failures = verdict(capsys, output)[2]
    assert failures.keys() == {"report", "others"}
    assert failures["report"] == [f"{Q}: neither pruned nor kept dense by the report"]
    assert failures["others"][0].startswith(f"{Q}: 608 of 1024 values differ")
    # The check needs no source.
    change_report(output, lambda report: report["arguments"].update(model="gone"))
    assert only_failure(capsys, output, "report").startswith(Q)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "model.layers.0.mlp.up_proj.bias"},
        {"name": "model.layers.7.mlp.up_proj.weight"},
        {"name": f"{UP}[0]"},
        {"name": NORM.replace(".1.", ".0.")},
        {"name": EMBEDDING},
        {"shape": [48, 64]},
        {"shape": [10**30, 32]},
        {"transposed": True},
    ],
)
def test_layer_that_the_model_has_not(change, copied, capsys):
    _, output = copied(*WANDA)
    change_report(output, lambda report: [row.update(change) for row in report["layers"] if row["name"] == UP])
    failures = verdict(capsys, output)[2]["report"]
    assert any(failure.startswith(f"{change.get('name', UP)}: ") for failure in failures)


def test_names_are_printed_harmless(copied, capsys):
    _, output = copied(*WANDA)
    change_report(output, lambda report: report["layers"][0].update(name="a\x1b[31m\nb\ud800"))
    assert "a\\x1b[31m\\nb\\ud800: in none of the model's blocks" in verdict(capsys, output)[2]["report"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("layers"), "layers: missing"),
        (lambda r: r.update(layers={}), "layers: expected an array, got an object"),
        (lambda r: r.update(layers=[]), "layers: none of them pruned by wanda"),
        (lambda r: r.update(layers=[7]), r"layers\[0\]: expected an object, got a whole number"),
        (lambda r: r["layers"][2].pop("kept"), r"layers\[2\]\.kept: missing"),
        (lambda r: r["layers"][2].update(kept=True), r"layers\[2\]\.kept: expected a whole number, got a boolean"),
        (lambda r: r["layers"][2].update(kept=-1), r"layers\[2\]\.kept: -1, of 16 x 32"),
        (lambda r: r["layers"][2].update(kept=10**9), r"layers\[2\]\.kept: 1000000000, of 16 x 32"),
        (
            lambda r: r["layers"][2].update(kept=float("nan")),
            r"layers\[2\]\.kept: expected a whole number, got a number",
        ),
        (lambda r: r["layers"][2].update(shape=[0, 32]), r"layers\[2\]\.shape: expected two whole numbers above 0"),
        (lambda r: r["layers"][2].update(shape=[32]), r"layers\[2\]\.shape: expected 2 values, got 1"),
        (lambda r: r["layers"][2].update(transposed=1), r"layers\[2\]\.transposed: expected a boolean"),
        (lambda r: r["layers"][2].update(pattern="2:4"), r"layers\[2\]\.pattern: 2:4, but"),
        (lambda r: r["layers"].append(r["layers"][0]), r"layers\[14\]\.name: a second row of model"),
        (lambda r: r.pop("arguments"), "arguments: missing"),
        (lambda r: r["arguments"].update(method="magic"), r"arguments\.method: no such method: magic"),
        (lambda r: r["arguments"].update(sparsity="most"), r"arguments\.sparsity: --sparsity most: expected"),
        (lambda r: r["arguments"].update(model=None), r"arguments\.model: expected a string, got null"),
        (lambda r: r["arguments"].pop("keep_zeros"), r"arguments\.keep_zeros: missing"),
        (lambda r: r["arguments"].update(keep_zeros=1), r"arguments\.keep_zeros: expected a boolean"),
        (lambda r: r["arguments"].update(dataset=7), r"arguments\.dataset: expected an array, got a whole number"),
        (lambda r: r["arguments"].pop("dataset"), r"arguments\.dataset: missing"),
        (lambda r: r.update(kept_dense=[1]), r"kept_dense\[0\]: expected a string, got a whole number"),
    ],
)
def test_malformed(change, message, copied, capsys):
    _, output = copied(*WANDA)
    change_report(output, change)
    refused(capsys, rf"{re.escape(str(output / 'report.json'))}: {message}", output)


@pytest.mark.parametrize(
    ("value", "kind"), [("2", "a string"), (None, "null"), (True, "a boolean"), (2.0, "a number"), (["2"], "an array")]
)
def test_passes_of_another_kind(value, kind, copied, capsys):
    _, output = copied(*WANDA)
    change_report(output, lambda report: report["arguments"].update(reconstruct=value))
    message = rf"arguments\.reconstruct: expected a whole number, got {kind}"
    refused(capsys, rf"{re.escape(str(output / 'report.json'))}: {message}", output)


def test_a_report_without_passes_reconstructed_nothing(copied, capsys):
    """Older versions wrote none: their one-shot masks leave weights as they are."""
    _, output = copied(*WANDA, "--reconstruct", "0")
    change_report(output, lambda report: report["arguments"].pop("reconstruct"))
    assert not verdict(capsys, output)[2]
    change_tensor(output, UP, lambda W: W * 2)
    assert only_failure(capsys, output, "kept").startswith(UP)


def test_older_reports_name_one_dataset(copied, capsys):
    _, output = copied(*WANDA)
    change_report(output, lambda report: report["arguments"].update(dataset="c4"))
    assert not verdict(capsys, output)[2]


@pytest.mark.parametrize(("passes", "failing"), [(0, {"kept"}), (2, set())])
def test_kept_weights_may_change_where_blocks_were_reconstructed(passes, failing, copied, capsys):
    """And no others."""
    _, output = copied(*WANDA, "--reconstruct", str(passes))
    change_tensor(output, UP, lambda W: W * 2)
    assert verdict(capsys, output)[2].keys() == failing
    change_tensor(output, UP, lambda W: torch.where(W == 0, 0.5, W))
    assert "pattern" in verdict(capsys, output)[2]


def test_what_was_not_pruned_may_not_change_either(copied, capsys):
    _, output = copied(*WANDA, "--reconstruct", "2", "--ignore", "up_proj")
    assert not verdict(capsys, output)[2]
    change_tensor(output, UP, lambda W: W * 2)
    assert verdict(capsys, output)[2].keys() == {"others"}


@pytest.mark.parametrize("text", ["", "[]", "{", "7", "nul", '{"arguments": ' + "[" * 10**5, "\ufeff{}", "1" * 5000])
def test_not_even_an_object(text, copied, capsys):
    _, output = copied(*WANDA)
    (output / "report.json").write_text(text)
    refused(capsys, rf"{re.escape(str(output / 'report.json'))}: ", output)


def test_not_even_text(copied, capsys):
    _, output = copied(*WANDA)
    (output / "report.json").write_bytes(b"\xff\xfe\x00")
    refused(capsys, rf"{re.escape(str(output / 'report.json'))}: not JSON", output)


def test_groups_that_do_not_divide_the_shape(copied, capsys):
    _, output = copied("--method", "wanda", "--sparsity", "2:4")
    change_report(output, lambda report: report["layers"][0].update(shape=[32, 33]))
    refused(capsys, r".*layers\[0\]\.shape: 33 inputs do not divide into groups of 4", output)


@pytest.mark.slow
def test_junk_anywhere(pruned, tmp_path):
    """Junk in the place of a value gives one line about it, or is a value that a report may have."""
    _, output = pruned()
    report, path = json.loads((output / "report.json").read_text()), tmp_path / "report.json"
    whole = json.dumps(report | {"layers": report["layers"][:4]})
    junk = [None, True, -1, 0, 10**40, 0.5, float("inf"), float("nan"), "", "x", "\ud800", [], [[]], [None], {}]
    places = [("arguments", key) for key in ("method", "sparsity", "refit", "model", "keep_zeros")]
    places += [(key,) for key in ("arguments", "layers", "kept_dense")]
    places += [("layers", 3, key) for key in ("name", "shape", "transposed", "pattern", "kept", "method")]
    places += [("layers", 3), ("layers", 3, "shape", 1)]
    lines = []
    for *way, last in places:
        for value in junk:
            report = json.loads(whole)
            holder = report
            for step in way:
                holder = holder[step]
            holder[last] = value
            path.write_text(json.dumps(report))
            try:
                read_claims(path)
            except InputError as error:
                lines.append(str(error))
    # Accepted are: three texts each for a model, a layer and another method; three numbers of refit steps; a large
    # shape, 0 kept and True transposed; True for zeros kept; nothing kept dense.
    assert len(lines) == len(places) * len(junk) - 4 * 3 - 3 - 1 - 1
    assert all(line.startswith(f"{path}: ") and len(line.splitlines()) == 1 for line in lines)
