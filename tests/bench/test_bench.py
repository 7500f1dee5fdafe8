"""`python -m bench` on a CPU, at tiny shapes."""

import json
from dataclasses import replace

import machine
import measure
import pytest
import timing
import torch

from bench import __main__ as command
from sparsefw.kernels import cpu
from sparsefw.kernels.operation import OPERATIONS

PROVIDERS = ["--providers", "ours,torch,library"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Make roofs and flushes small, and leave torch's threads as they are."""
    monkeypatch.setattr(machine, "COPIED", 1 << 16)
    monkeypatch.setattr(machine, "SIDE", 64)
    monkeypatch.setattr(timing, "FLUSH", 1 << 16)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def bench(*words):
    return command.main([*words, "--shape", "48x64", "--tokens", "20", "--seconds", "0.01"])


def test_two_operations_end_to_end(tmp_path, capsys):
    assert bench("take", "lmo", *PROVIDERS, "--json", str(tmp_path / "run.json")) == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["machine"]["torch"] == torch.__version__
    names = [f"{row['operation']} {row['setting']} {row['provider']}" for row in run["rows"]]
    chosen = [f"lmo {setting} {provider}" for setting in ("", "2:4") for provider in ("ours", "torch", "library")]
    assert names == ["take_rows  ours", "take_rows  torch", *chosen]
    for row in run["rows"]:
        assert (row["rows"], row["d"], row["tokens"], row["dtype"], row["error"]) == (48, 64, 20, "float32", 0)
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["share"] == pytest.approx(row["bytes"] / run["roofs"]["copy"] / row["seconds"])
    assert capsys.readouterr().out.count("| triton   | checked in the interpreter at 48x96, error 0e+00 |\n") == 3


def test_a_wrong_result_gets_no_time(tmp_path, monkeypatch, capsys):
    """Nor does one of another shape, one of NaN, and none at all; and others are compared with those that are right."""
    wrong = [lambda G: G.add_(1), lambda G: G[1:], lambda G: G.fill_(torch.nan), lambda G: {}["it fails"]]
    for number, mirror in enumerate(wrong):
        monkeypatch.setattr(cpu, "mirror_lower", mirror)
        assert bench("mirror", *PROVIDERS, "--json", str(tmp_path / "run.json")) == 1
        ours, theirs = json.loads((tmp_path / "run.json").read_text())["rows"]
        assert (ours["seconds"], ours["share"], ours["speedup"], theirs["speedup"]) == (None,) * 4
        assert ours["wrong"].startswith("wrong: error " if number < 3 else "failed: 'it fails'")
        assert f"\n| ours     | {ours['wrong']} |\n" in capsys.readouterr().out


def test_a_rival_that_is_wrong_gets_no_time_and_decides_nothing(tmp_path, monkeypatch):
    operation = OPERATIONS["mirror_lower"]
    monkeypatch.setitem(OPERATIONS, "mirror_lower", replace(operation, library=lambda G: G.add_(1)))
    assert bench("mirror", *PROVIDERS, "--json", str(tmp_path / "run.json")) == 0
    rows = {row["provider"]: row for row in json.loads((tmp_path / "run.json").read_text())["rows"]}
    assert rows["library"]["wrong"].startswith("wrong: error ")
    assert rows["library"]["seconds"] is None
    assert rows["ours"]["seconds"] > 0


def test_the_base_is_compared_with_ours_only(monkeypatch):
    """Ours takes 2 s, torch 8 s, the base 1 s."""
    monkeypatch.setattr(measure, "race", lambda timers, limit: dict(ours=[2.0], torch=[8.0], base=[1.0]))

    class Base:
        def time(self, **case):
            return 1.0

    case = measure.Case(*command.cases(command.named(["mirror"]), None, [measure.TINY], {})[0])
    rows = measure.measure(case, ["ours", "torch"], {"copy": 1.0}, 1.0, Base())
    assert {row["provider"]: row["speedup"] for row in rows} == {"ours": 4.0, "torch": 0.25, "base": 2.0}
