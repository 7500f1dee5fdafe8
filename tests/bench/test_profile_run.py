"""The profile of a run covers all of its threads."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch

profile_run = __import__("profile_run")


def run_with(monkeypatch, status):
    def main(flags):
        assert flags == ["--steps", "3"]
        with ThreadPoolExecutor(1) as pool:
            pool.submit(torch.mm, torch.ones(64, 64), torch.ones(64, 64)).result()
        return status

    monkeypatch.setattr(profile_run.run, "main", main)
    monkeypatch.setattr(sys, "argv", ["profile_run.py", "--steps", "3"])
    return profile_run.main()


def test_operations_of_all_threads(monkeypatch, capsys):
    assert run_with(monkeypatch, 0) == 0
    assert "aten::mm" in capsys.readouterr().out


def test_a_run_that_failed_has_no_profile(monkeypatch, capsys):
    assert run_with(monkeypatch, 2) == 2
    assert "aten::" not in capsys.readouterr().out
