"""Saved runs are reported as they are, what to look at comes first, and another commit is timed by its own code."""

import json
import subprocess
from pathlib import Path

import base
import pytest
import report

ROW = dict(operation="row_step", setting="", rows=4096, d=4096, tokens=32, dtype="bfloat16", provider="ours")
ROW |= dict(wrong=None, seconds=2e-3, low=1e-3, high=4e-3, rounds=9, error=3e-7, flops=8e9, bytes=4e6, unit=None)
ROW |= dict(late=0, share=0.4, speedup=3)
RIVAL = ROW | dict(provider="torch", seconds=6e-3, share=0.1, speedup=1 / 3)
SLOWER = ROW | dict(operation="lmo", setting="2:4", speedup=0.5, flops=0)
WRONG = SLOWER | dict.fromkeys(("seconds", "low", "high", "share", "speedup")) | {"provider": "compile"}
WRONG |= {"wrong": "wrong: error 3"}
STEP = "row_step, 4096x4096 bfloat16, 32 tokens"


@pytest.fixture
def save(tmp_path):
    """save(name, *rows): save a run; returns its path."""

    def save(name, *rows):
        run = dict(machine={"device": "GPU", "capability": "sm_90"}, command="-", roofs={"copy": 1e12, "ieee": 2e12})
        (tmp_path / name).write_text(json.dumps(run | {"rows": rows}))
        return str(tmp_path / name)

    return save


@pytest.fixture
def printed(save, monkeypatch, capsys):
    """printed(*rows, **expected shares): report a run; returns the page."""

    def printed(*rows, **known):
        monkeypatch.setattr(report, "EXPECTED", {"sm_90": known})
        assert report.main([save("run.json", *rows)]) == 0
        return capsys.readouterr().out

    return printed


def test_numbers_are_those_of_the_rows(printed):
    page = printed(ROW | {"late": 2}, RIVAL, SLOWER, WRONG)
    assert (
        f"""
### {STEP}: 8 Gflop, 4 MB, bound by bytes

| provider | median ms |  20 % |  80 % |    rounds | GB/s | GFLOP/s | of roof | speedup | error |
| -------- | --------: | ----: | ----: | --------: | ---: | ------: | ------: | ------: | ----: |
| ours     |     2.000 | 1.000 | 4.000 | 9, 2 late |  2.0 | 4,000.0 |     40% |    3.00 | 3e-07 |
| torch    |     6.000 | 1.000 | 4.000 |         9 |  0.7 | 1,333.3 |     10% |    0.33 | 3e-07 |
"""
        in page
    )
    assert "\nRoofs in GB/s and GFLOP/s: copy 1,000.0, ieee 2,000.0\n" in page
    assert f"\n| {STEP}" in page
    assert "| torch         |     2.000 |     40% |    3.00 |\n" in page
    # A wrong result has no time, and comes before a slow one.
    assert "\n| compile  | wrong: error 3 |\n" in page
    assert page.index("compile: wrong: error 3") < page.index("ours: slower: 0.50 x") < page.index("###")


def test_what_is_below_its_expectation_comes_first(printed):
    known = {"": {"share": 0.6, "limit": "instructions"}, "2:4": {"share": 0.5}}
    small = ROW | {"rows": 1024}
    page = printed(SLOWER, ROW | {"speedup": 0.7}, RIVAL, ROW | {"setting": "2:4"}, small, row_step=known)
    first = f"{STEP}, ours: low: 40% of the roof, 60% expected, limit: instructions; slower: 0.70 x"
    assert page.index(first) < page.index("ours: slower")
    assert page.count(" low: ") == 1
    assert " 40% of 60% |" in page
    assert " 40% of 50% |" in page
    # A small weight is not expected to fill a GPU.
    assert " 40% |" in page


def test_files_and_the_base_are_compared():
    base = ROW | {"provider": "base", "seconds": 8e-3}
    runs = {"old": {"rows": [ROW, SLOWER]}, "new": {"rows": [ROW | {"seconds": 1e-3}, base, WRONG]}}
    head, _, row = report.comparison(runs)[1].splitlines()
    assert [cell.strip() for cell in head.split("|")[2:5]] == ["old: ours", "new: base", "new: ours"]
    assert [cell.strip() for cell in row.split("|")[1:5]] == [STEP, "2.000 (1.00)", "8.000 (0.25)", "1.000 (2.00)"]


WORKER = """
import json, sys, sparsefw
for line in sys.stdin:
    print(json.dumps({"seconds": sparsefw.SECONDS}), flush=True)
"""


@pytest.mark.parametrize(("source", "compiled"), [("", "copied"), ("changed", "built")])
def test_another_commit_is_timed_by_its_own_code(source, compiled, tmp_path, monkeypatch):
    """What is compiled is copied from here if its sources are the same."""
    monkeypatch.setattr(base, "REPO", tmp_path)
    monkeypatch.setattr(base, "CODE", WORKER)
    (tmp_path / "kernels/cpu").mkdir(parents=True)
    files = {"sparsefw.py": "SECONDS = 7", "kernels/cpu/x.cpp": "", "kernels/operation.py": ""}
    files["setup.py"] = "print(end='built', file=open('kernels/cpu/_x.so', 'w'))"
    changes = {"sparsefw.py": "SECONDS = 8", "kernels/cpu/x.cpp": source, "kernels/cpu/_x.so": "copied"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for arguments in (["init"], ["add", "."], ["commit", "-m", "new"]):
        command = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x", *arguments]
        subprocess.run(command, check=True)
    for name, text in changes.items():
        (tmp_path / name).write_text(text)
    with base.start("HEAD") as worker:
        assert worker.time(operation="lmo") == 7
        assert Path(f"/proc/{worker.process.pid}/cwd/kernels/cpu/_x.so").read_text() == compiled
    assert worker.process.returncode is not None
