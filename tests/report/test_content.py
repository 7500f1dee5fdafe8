"""report.json is read as it was written; anything else is refused in one line that names the place."""

import json
import math
from dataclasses import replace

import pytest
from helpers.pages import report_of_run

from sparsefw.errors import InputError
from sparsefw.report.content import Reconstruction, read_report


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


@pytest.fixture
def report(pruned):
    return report_of_run(pruned)


@pytest.fixture
def content(report):
    return json.loads(report.to_json())


def test_what_is_written_is_read(path, pruned):
    """Losses need not be numbers, and names may hold any character."""
    report = report_of_run(pruned, "--ignore", "down_proj", "--gpu-memory", "3")
    report.layers[0] = replace(report.layers[0], name="a\ud800\x1b\n\u202e")
    report.seconds.update(solve=math.inf, forward=1e-320)
    report.arguments.update(seed=2**63 - 1)
    report.blocks[0] = replace(report.blocks[0], reconstruction=Reconstruction(0.5, math.inf, 18, True))
    path.write_text(report.to_json())
    assert read_report(path) == report
    report.seconds.update(solve=math.nan)
    path.write_text(report.to_json())
    assert math.isnan(read_report(path).seconds["solve"])


def test_keys(content):
    """The keys of the file, for readers other than this package."""
    keys = (
        "arguments versions device data evaluation layers kept_dense seconds blocks timeline peak_memory memory notes "
        "ranks in_memory recovery recoveries given"
    )
    assert list(content) == keys.split()


def test_reports_of_other_versions(path, report, content):
    """Older ones have no reconstructions and no arguments that were given. Entries of later ones are passed over."""
    content["later"] = 1
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
def test_values_of_another_kind(change, place, path, content):
    change(content)
    assert place in refused(path, json.dumps(content))


@pytest.mark.parametrize("text", ["", "[]", "\ufeff{}", '{"layers": ' + "[" * 10**5, "\ud800", b"\xff\xfe\x00"])
def test_not_a_report(text, path):
    assert refused(path, text)


def test_arguments(report):
    assert report.methods == ["wanda", "sparsefw"]
    report.arguments["refit"] = "4"
    with pytest.raises(InputError, match=r"^arguments\.refit: expected int, got str"):
        report.argument("refit", int)
    report.arguments.pop("compare")
    with pytest.raises(InputError, match=r"^arguments\.compare: missing; prune again with this version of sparsefw$"):
        _ = report.methods
