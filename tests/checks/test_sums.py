"""Every byte of an output is accounted for: what differs from SHA256SUMS is named, and so is what is not in it."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import make_hub_cache
from helpers.verifying import DOWN, WANDA, Q, change_report, change_tensor, refused, sum_again, tensor_of, verdict

from sparsefw.checkpoint.checksums import SUMS, file_digest
from sparsefw.checkpoint.source import INDEX
from sparsefw.checks.sums import check_sums
from sparsefw.checks.verdict import Check


def failures(folder: Path, digest: str | None = None) -> list[str]:
    """The failures of the check of SHA256SUMS."""
    check = Check("")
    check_sums(check, folder, digest)
    return check.failures


def shard_of(output: Path, name: str) -> str:
    """The name of the shard that holds a tensor."""
    return json.loads((output / INDEX).read_text())["weight_map"][name]


def test_an_unchanged_output(copied, capsys):
    _, output = copied(*WANDA)
    status, printed, _ = verdict(capsys, output, "--digest", file_digest(output / SUMS), summed=False)
    assert status == 0
    # Three shards, their index, config, generation config, two files of the tokenizer, two reports.
    assert re.search(r"^sums .* 10 files +ok$", printed, re.MULTILINE)
    assert f"\nSHA-256 of SHA256SUMS: {file_digest(output / SUMS)}\n" in printed


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: -tensor,
        lambda tensor: tensor.flip(0),
        lambda tensor: torch.zeros_like(tensor),
        lambda tensor: tensor * 2,
    ],
)
def test_refitted_weights(change, copied):
    """All other checks pass: what a refit has made of kept weights is not known."""
    _, output = copied()
    digest = file_digest(output / SUMS)
    change_tensor(output, Q, change)
    assert sorted(failures(output)) == [
        f"{name}: not what the run wrote" for name in sorted([shard_of(output, Q), INDEX])
    ]
    # Somebody who writes SHA256SUMS anew is found out by its digest alone.
    sum_again(output)
    assert failures(output) == []
    (failure,) = failures(output, digest)
    assert re.fullmatch(rf"SHA256SUMS: its SHA-256 is {file_digest(output / SUMS)}, not that of --digest", failure)


def test_exchanged_matrices(copied):
    _, output = copied()
    K = Q.replace("q_proj", "o_proj")
    q, k = tensor_of(output, Q), tensor_of(output, K)
    change_tensor(output, Q, lambda tensor: k)
    change_tensor(output, K, lambda tensor: q)
    assert f"{shard_of(output, Q)}: not what the run wrote" in failures(output)


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "additional_chat_templates/x.jinja", "modeling.py", "pytorch_model.bin", ".env", "a/b/c"],
)
def test_added_files(name, copied):
    _, output = copied(*WANDA)
    (output / name).parent.mkdir(parents=True, exist_ok=True)
    (output / name).write_text("{}")
    assert failures(output) == [f"{name}: not in SHA256SUMS"]


@pytest.mark.parametrize(("name", "said"), [("empty", "empty"), ("__pycache__/a/b", "__pycache__/a/b")])
def test_added_folders_without_files(name, said, copied):
    _, output = copied(*WANDA)
    (output / name).mkdir(parents=True)
    assert failures(output) == [f"{said}: not in SHA256SUMS"]


def test_a_folder_that_cannot_be_read(copied, monkeypatch):
    """A superuser can read all of them."""
    _, output = copied(*WANDA)
    (output / "closed").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert failures(output) == ["closed: not in SHA256SUMS"]


def test_an_added_adapter_and_another_digest(copied, capsys):
    _, output = copied(*WANDA)
    (output / "adapter_config.json").write_text("{}")
    found = verdict(capsys, output, "--digest", "0" * 64, summed=False)[2]
    digest = file_digest(output / SUMS)
    assert found["sums"] == [
        f"SHA256SUMS: its SHA-256 is {digest}, not that of --digest",
        "adapter_config.json: not in SHA256SUMS",
    ]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/"), lambda path: path.symlink_to("gone")])
def test_what_is_no_file_is_named_and_not_opened(make, copied):
    _, output = copied(*WANDA)
    make(output / "x")
    assert failures(output) == ["x: not in SHA256SUMS"]
    (output / "x").unlink()
    (output / "report.html").unlink()
    make(output / "report.html")
    (failure,) = failures(output)
    assert re.match(rf"{output / 'report.html'}: (missing, or not a file|a link)", failure)


def test_a_report_that_is_no_file(copied, capsys):
    _, output = copied(*WANDA)
    (output / "report.json").unlink()
    os.mkfifo(output / "report.json")
    refused(capsys, ".*report.json: not readable", output)


def test_edited_claims(copied):
    _, output = copied(*WANDA)
    change_report(output, lambda report: report["layers"][0].update(error=0.0))
    assert failures(output) == ["report.json: not what the run wrote"]


@pytest.mark.parametrize("name", ["config.json", "report.html", "tokenizer.json"])
def test_missing_and_changed_files(name, copied):
    _, output = copied(*WANDA)
    content = (output / name).read_bytes()
    (output / name).write_bytes(content + b"\n")
    assert failures(output) == [f"{name}: not what the run wrote"]
    if name != "config.json":
        (output / name).unlink()
        assert failures(output) == [f"{name}: missing"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "missing, or not a file"),
        (lambda path: path.unlink() or os.mkfifo(path), "missing, or not a file"),
        (lambda path: path.unlink() or path.mkdir(), "missing, or not a file"),
        (lambda path: path.write_text(path.read_text() * 2), "line 11 is not a digest and the name of a file"),
        (lambda path: path.write_text(path.read_text() + f"{'0' * 64}  ../x\n"), "line 11 is not a digest"),
        (lambda path: path.write_text(path.read_text() + f"{'0' * 64}  /etc/passwd\n"), "line 11 is not a digest"),
        (lambda path: path.write_text(path.read_text()[:-20]), "tokenizer_config.json: not in SHA256SUMS"),
        (lambda path: path.write_text(path.read_text()[:-80]), "line 10 is not a digest"),
        (lambda path: path.write_bytes(b"\xff"), "cannot be read: "),
        (lambda path: path.open("ab").truncate(2**24 + 1), "more than 16 MiB"),
    ],
)
def test_damaged_sums(change, message, copied):
    _, output = copied(*WANDA)
    change(output / SUMS)
    assert message in failures(output)[0]


@pytest.mark.parametrize("name", ["tool:use.jinja", 'say "a".jinja', "a\\b.jinja", " a?.jinja"])
def test_names_that_other_systems_do_not_have(name, copied):
    _, output = copied(*WANDA)
    (output / "additional_chat_templates").mkdir()
    (output / "additional_chat_templates" / name).write_text("x")
    sum_again(output)
    assert failures(output) == []
    assert subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=output, check=False).returncode == 0


def test_an_empty_list_accounts_for_nothing(copied):
    _, output = copied(*WANDA)
    (output / SUMS).write_text("")
    assert len(failures(output)) == 10


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "sha256:" + "0" * 57, "\n"])
def test_what_is_no_digest(digest, pruned, capsys):
    refused(capsys, "--digest .*: expected 64 digits", pruned(*WANDA)[1], f"--digest={digest}")


def test_the_hubs_cache(copied, hub):
    """There the files are links to blobs."""
    _, output = copied(*WANDA)
    assert failures(make_hub_cache(output, hub)) == []


def test_the_systems_tool_agrees(copied):
    _, output = copied(*WANDA)
    check = ["sha256sum", "--check", "--quiet", SUMS]
    assert subprocess.run(check, cwd=output, check=False).returncode == 0
    change_tensor(output, DOWN, lambda tensor: -tensor)
    assert subprocess.run(check, cwd=output, capture_output=True, check=False).returncode == 1
