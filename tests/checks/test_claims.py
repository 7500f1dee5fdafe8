"""Wrong claims in report.json: layers that the model does not have, layers left out, values of the wrong kind."""

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
