"""report.json is read as it was written; anything else is refused in one line that names the place."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
from helpers.pages import report_of_run, task

from sparsefw.errors import InputError
from sparsefw.report import Measurement, Reconstruction, Report, content, read_report

JUNK = [None, True, -1, 0, 10**22, 0.5, float("inf"), "", "x", "\ud800", [], [[]], [None], {}, {"x": None}]


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
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def test_what_is_written_is_read(path):
    report = report_of_run(arguments=("--ignore", "down_proj", "--alpha", "0.25", "--gpu-memory", "3"))
    path.write_text(report.to_json())
    assert read_report(path) == Report.from_json(report.to_json(), path) == report
    assert read_report(path).to_json() == report.to_json()


def test_names_and_numbers_that_are_unusual(path):
    report = report_of_run(prefix="a\ud800\x1b\n\u202e")
    report.seconds.update(solve=math.inf, forward=1e-320)
    report.arguments.update(seed=2**63 - 1, damp=1)
    path.write_text(report.to_json())
    assert read_report(path) == report
    report.seconds.update(solve=math.nan)
    path.write_text(report.to_json())
    assert math.isnan(read_report(path).seconds["solve"])


def test_keys(path):
    """The keys of the file, for readers other than this package."""
    keys = (
        "arguments versions device data evaluation layers kept_dense seconds blocks timeline peak_memory memory notes "
        "ranks tasks in_memory"
    )
    content = json.loads(report_of_run().to_json())
    assert list(content) == keys.split()
    assert content["arguments"]["evaluate"] == ["default"]
    assert content["layers"][0]["shape"] == [4, 8]
    assert content["layers"][0]["gap"] is None
    assert content["timeline"][0] == {"block": None, "lane": "main", "phase": "embed", "start": 0.0, "end": 1.5}
    assert content["memory"]["limits"] == {"host": 4 << 30}


def test_tasks(path):
    report = report_of_run()
    report.tasks.extend([task("boolq"), replace(task("cola", "mcc"), higher_is_better=None)])
    report.tasks[1].results.update(dense=Measurement(math.nan), wanda=Measurement(0.5))
    written = report.to_json()
    path.write_text(written)
    assert read_report(path).to_json() == written
    content = json.loads(written)
    assert content["tasks"][0]["results"]["wanda"]["difference"] == {"value": -0.125, "stderr": 0.025}
    assert content["tasks"][1]["results"]["wanda"] == {"value": 0.5, "stderr": None, "difference": None}
    content["tasks"][0]["results"]["wanda"]["difference"] = {"value": 0.5}
    assert refused(path, json.dumps(content)).startswith("tasks[0].results.wanda.difference.stderr: missing")
    content["tasks"][0]["results"]["wanda"]["difference"] = 7
    message = "tasks[0].results.wanda.difference: expected an object or null, got a whole number"
    assert refused(path, json.dumps(content)) == message
    content["tasks"][0].pop("documents")
    assert refused(path, json.dumps(content)).startswith("tasks[0].documents: missing")


def reconstructed(report, *found):
    """The report, with reconstructions of its first blocks; None leaves one out."""
    pairs = zip(report.blocks, found, strict=False)
    return replace(
        report, blocks=[replace(block, reconstruction=x) for block, x in pairs] + report.blocks[len(found) :]
    )


def test_reconstructions(path):
    """Losses need not be numbers: weights may have gone beyond all of them before they were put back."""
    found = Reconstruction(0.25, 0.125, 18, False), None, Reconstruction(0.5, math.inf, 18, True)
    report = reconstructed(report_of_run(), *found)
    written = report.to_json()
    path.write_text(written)
    assert read_report(path) == report
    assert read_report(path).to_json() == written
    blocks = json.loads(written)["blocks"]
    expected = {"before": 0.25, "after": 0.125, "steps": 18, "put_back": False, "loss": "hidden states", "varies": ""}
    assert blocks[0]["reconstruction"] == expected
    assert blocks[1]["reconstruction"] is None
    report = reconstructed(report_of_run(), Reconstruction(0.5, math.nan, 18, True))
    path.write_text(report.to_json())
    assert math.isnan(read_report(path).blocks[0].reconstruction.after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("steps"), ".steps: missing"),
        (lambda x: x.update(put_back=0), ".put_back: expected a boolean, got a whole number"),
        (lambda x: x.update(before="1"), ".before: expected a number, got a string"),
        (lambda x: x.update(more=1), ".more: unknown to this version"),
    ],
)
def test_reconstructions_of_another_kind(change, message, path):
    content = json.loads(reconstructed(report_of_run(), Reconstruction(0.25, 0.125, 18, False)).to_json())
    change(content["blocks"][0]["reconstruction"])
    assert refused(path, json.dumps(content)).startswith(f"blocks[0].reconstruction{message}")


def test_reports_from_before_blocks_were_reconstructed(path):
    report = report_of_run()
    content = json.loads(report.to_json())
    for block in content["blocks"]:
        del block["reconstruction"]
    path.write_text(json.dumps(content))
    assert read_report(path) == report
    assert [block.reconstruction for block in read_report(path).blocks] == [None] * 3


def test_reports_of_older_versions(path):
    """Runs before there were tasks have written none."""
    report = report_of_run()
    content = json.loads(report.to_json())
    del content["tasks"]
    path.write_text(json.dumps(content))
    assert read_report(path) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("layers"), "layers: missing; prune again with this version of sparsefw"),
        (lambda r: r.update(more=1), "more: unknown to this version of sparsefw"),
        (lambda r: r["layers"][3].update({"\x1b[31m" + "x" * 999: 1}), r"layers[3].\x1b[31mxxxxx"),
        (lambda r: r["layers"][3].update(shape=[4]), "layers[3].shape: expected 2 values, got 1"),
        (
            lambda r: r["layers"][3].update(shape=[4, True]),
            "layers[3].shape[1]: expected a whole number, got a boolean",
        ),
        (lambda r: r["layers"][3].update(gap="0"), "layers[3].gap: expected a number or null, got a string"),
        (lambda r: r["layers"][3].update(kept=8.0), "layers[3].kept: expected a whole number, got a number"),
        (lambda r: r["layers"][3].update(error=True), "layers[3].error: expected a number, got a boolean"),
        (
            lambda r: r["layers"][3].update(error=10**400),
            "layers[3].error: expected a number, got one that is too large",
        ),
        (lambda r: r["layers"][3].pop("transposed"), "layers[3].transposed: missing"),
        (
            lambda r: r["blocks"][1]["seconds"].update(solve=None),
            "blocks[1].seconds.solve: expected a number, got null",
        ),
        (lambda r: r.update(data=[]), "data: expected an object, got an array"),
        (
            lambda r: r["evaluation"][0].update(perplexity=7),
            "evaluation[0].perplexity: expected an object, got a whole",
        ),
        (lambda r: r["timeline"][0].update(block="0"), "timeline[0].block: expected a whole number or null, got a str"),
        (
            lambda r: r["arguments"].update(ignore=[1]),
            "arguments.ignore: expected a string, a whole number, a number, ",
        ),
        (lambda r: r["arguments"].update(ignore={}), "arguments.ignore: expected a string, a whole number, a number, "),
        (lambda r: r["memory"].update(read_ahead=1), "memory.read_ahead: expected a boolean, got a whole number"),
    ],
)
def test_values_of_another_kind(change, message, path):
    report = json.loads(report_of_run().to_json())
    change(report)
    assert refused(path, json.dumps(report)).startswith(message)


def places_in(value, way=()):
    """The paths to all values in a report; of an array of objects only to those of the first."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value[:1]):
        yield (*way, key)
        if isinstance(inner, dict | list):
            yield from places_in(inner, (*way, key))


@pytest.mark.slow
def test_junk_anywhere(path):
    """Junk in the place of a value is read if it is of the right kind; otherwise one line refuses it."""
    whole = json.loads(report_of_run().to_json())
    ways = list(places_in(whole))
    assert len(ways) > 100
    taken, messages = 0, []
    for *way, last in ways:
        for junk in JUNK:
            report = copy.deepcopy(whole)
            holder = report
            for step in way:
                holder = holder[step]
            holder[last] = junk
            text = json.dumps(report)
            try:
                read = Report.from_json(text, path)
            except InputError as error:
                messages.append(str(error))
                continue
            assert json.loads(read.to_json()) == report
            taken += 1
    assert all(message.startswith(f"{path}: ") and len(message.splitlines()) == 1 for message in messages)
    assert 0 < taken < len(messages)


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "nul", "{", "\ufeff{}", '{"layers": ' + "[" * 10**5, "1" * 5000, "\ud800"]
)
def test_not_a_report(text, path):
    assert refused(path, text)


def test_nested_deeply(path):
    """Values inside are refused, however deep they are."""
    report = report_of_run().to_json()
    for deep in ('{"x":' * 900 + "1" + "}" * 900, "[" * 900 + "]" * 900):
        assert refused(path, report.replace('"a card"', deep)).startswith("device: expected a string")
        assert refused(path, report.replace('"model": "default"', f'"model": {deep}')).startswith("arguments.model: ")


def test_twice(path):
    """A reader that takes the first value would see another device."""
    text = report_of_run().to_json().replace('"device": "a card"', '"device": "a card", "device": "another"')
    assert refused(path, text).startswith("device is in it twice")


def test_files_that_are_none(path, tmp_path, monkeypatch):
    message = r"report\.json: not readable \(missing, or not a file\); give a folder that sparsefw\.run wrote$"
    with pytest.raises(InputError, match=message):
        read_report(path)
    path.mkdir()
    with pytest.raises(InputError, match=message):
        read_report(path)
    with pytest.raises(InputError, match="not JSON"):
        read_report(_written(tmp_path / "bytes", b"\xff\xfe\x00"))
    monkeypatch.setattr(content, "MAX_REPORT_BYTES", 1 << 20)
    with pytest.raises(InputError, match="more than 1 MiB; no report of a run is that large"):
        read_report(_written(tmp_path / "large", b" " * ((1 << 20) + 1)))


def _written(path, text: bytes):
    path.write_bytes(text)
    return path


def test_arguments(path):
    report = report_of_run()
    assert report.methods == ["wanda", "sparsefw"]
    report.arguments["refit"] = "4"
    with pytest.raises(InputError, match=re.escape("arguments.refit: expected a whole number, got a string")):
        report.argument("refit", int)
    report.arguments.pop("compare")
    with pytest.raises(InputError, match=r"^arguments\.compare: missing; prune again with this version of sparsefw$"):
        _ = report.methods
