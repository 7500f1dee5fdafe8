"""report.json is read as it was written; anything else is refused in one line that names the place."""

import json
import math
import re
import subprocess
from dataclasses import replace

import pytest
from helpers.pages import report_of_run

import sparsefw
from sparsefw.errors import InputError
from sparsefw.report.content import Reconstruction, commit, read_report


@pytest.fixture
def path(tmp_path):
    return tmp_path / "report.json"


def refused(path, text: str | bytes) -> str:
    """The message, without the path."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError) as error:
        read_report(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_what_is_written_is_read(path):
    """Losses need not be numbers, and names may hold any character."""
    report = report_of_run(arguments=("--ignore", "down_proj", "--gpu-memory", "3"), prefix="a\ud800\x1b\n\u202e")
    report.seconds.update(solve=math.inf, forward=1e-320)
    report.arguments.update(seed=2**63 - 1)
    report.blocks[0] = replace(report.blocks[0], reconstruction=Reconstruction(0.5, math.inf, 18, True))
    path.write_text(report.to_json())
    assert read_report(path) == report
    report.seconds.update(solve=math.nan)
    path.write_text(report.to_json())
    assert math.isnan(read_report(path).seconds["solve"])


def test_keys(path):
    """The keys of the file, for readers other than this package."""
    keys = (
        "arguments versions device data evaluation layers kept_dense seconds blocks timeline peak_memory memory notes "
        "ranks in_memory recovery recoveries given"
    )
    assert list(json.loads(report_of_run().to_json())) == keys.split()


def test_reports_of_other_versions(path):
    """Older ones have no reconstructions and no arguments that were given. Entries of later ones are passed over."""
    report = report_of_run()
    content = json.loads(report.to_json()) | {"later": 1}
    for block in content["blocks"]:
        del block["reconstruction"]
    del content["given"]
    path.write_text(json.dumps(content))
    assert read_report(path) == replace(report, given=None)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda r: r.pop("layers"), "missing required field `layers`"),
        (lambda r: r["layers"][3].update(shape=[4, True]), "$.layers[3].shape[1]"),
        (lambda r: r["blocks"][1]["seconds"].update(solve=None), "$.blocks[1].seconds"),
        (lambda r: r["memory"].update(read_ahead=1), "$.memory.read_ahead"),
    ],
)
def test_values_of_another_kind(change, place, path):
    report = json.loads(report_of_run().to_json())
    change(report)
    assert place in refused(path, json.dumps(report))


@pytest.mark.parametrize("text", ["", "[]", "\ufeff{}", '{"layers": ' + "[" * 10**5, "\ud800", b"\xff\xfe\x00"])
def test_not_a_report(text, path):
    assert refused(path, text)


def test_arguments(path):
    report = report_of_run()
    assert report.methods == ["wanda", "sparsefw"]
    report.arguments["refit"] = "4"
    with pytest.raises(InputError, match=r"^arguments\.refit: expected int, got str"):
        report.argument("refit", int)
    report.arguments.pop("compare")
    with pytest.raises(InputError, match=r"^arguments\.compare: missing; prune again with this version of sparsefw$"):
        _ = report.methods


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(sparsefw, "__file__", str(tmp_path / "sparsefw/__init__.py"))
    assert commit() == {}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init"], ["commit", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    assert re.fullmatch(r"[0-9a-f]{7,}", commit()["commit"])
