"""Saved runs are reported as they are, what to look at comes first, and another commit is timed by its own code."""

import json
import subprocess
from contextlib import suppress
from pathlib import Path

import base
import plots
import pytest
import report

ROW = dict(operation="row_step", setting="", rows=8, d=16, tokens=32, dtype="float32", provider="ours", wrong=None)
ROW |= dict(
    seconds=2e-3, low=1e-3, high=4e-3, rounds=9, error=3e-7, flops=8e9, bytes=4e6, unit=None, share=0.4, speedup=3
)
RIVAL = ROW | dict(provider="torch", seconds=6e-3, share=0.1, speedup=1 / 3)
SLOWER = ROW | dict(operation="lmo", setting="2:4", speedup=0.5, flops=0)
WRONG = SLOWER | dict(provider="compile", seconds=None, low=None, high=None, share=None, speedup=None, wrong="wrong: 3")


@pytest.fixture
def save(tmp_path, monkeypatch):
    """save(name, *rows): save a run; returns its path."""
    monkeypatch.setattr(report, "EXPECTED", tmp_path / "expected.json")

    def save(name, *rows):
        run = {
            "machine": {"device": "GPU", "capability": "sm_90"},
            "command": "-",
            "roofs": {"copy": 1e12, "ieee": 2e12},
        }
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, [run, *rows])))
        else:
            path.write_text(json.dumps(run | {"rows": rows}))
        return str(path)

    return save


def test_numbers_are_those_of_the_rows(save, capsys):
    assert report.main([save("run.json", ROW, RIVAL, SLOWER, WRONG)]) == 0
    page = capsys.readouterr().out
    assert "\n|  | 8x16 | 32 | float32 | ours | 2.000 (1.000-4.000) | 2.0 | 4,000.0 | 40% | 3.00 | 3e-07 |\n" in page
    assert "\n|  | 8x16 | 32 | float32 | torch | 6.000 (1.000-4.000) | 0.7 | 1,333.3 | 10% | 0.33 | 3e-07 |\n" in page
    assert "\nRoofs in GB/s and GFLOP/s: copy 1,000.0, ieee 2,000.0\n" in page
    assert "in 1 cases, slower in 1; geometric mean of speedups 1.22.\n" in page
    # A wrong result has no time, and comes before a slow one.
    assert "| compile | **wrong: 3** | | | | | |" in page
    assert page.index("compile: wrong: 3") < page.index("ours: slower: 0.50 x") < page.index("###")


def test_what_is_below_its_expectation_comes_first(save, capsys):
    known = {"": {"share": 0.6, "limit": "instructions"}, "2:4": {"share": 0.5}}
    report.EXPECTED.write_text(json.dumps({"sm_90": {"row_step": known}}))
    report.main([save("run.json", SLOWER, ROW | {"speedup": 0.7}, RIVAL, ROW | {"setting": "2:4"})])
    page = capsys.readouterr().out
    first = page.index(
        "row_step - 8x16 32 float32, ours: low: 40% of the roof, 60% expected, limit: instructions; slower: 0.70 x"
    )
    assert first < page.index("ours: slower")
    assert page.count(" low: ") == 1
    assert "| **40% of 60%** |" in page
    assert "| 40% of 50% |" in page


def test_files_are_compared(save, tmp_path):
    files = save("old.json", ROW, SLOWER), save("new.jsonl", ROW | {"seconds": 1e-3}, WRONG)
    report.main([*files, "--output", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    assert page.endswith("| --- | --- | --- |\n| row_step - 8x16 32 float32 | 2.000 (1.00) | 1.000 (2.00) |\n")
    assert f"| ms (speedup) | {files[0]}: ours | {files[1]}: ours |\n" in page


def test_base_is_compared(save, capsys):
    report.main([save("run.json", ROW, ROW | {"provider": "base", "seconds": 8e-3})])
    assert capsys.readouterr().out.endswith("| row_step - 8x16 32 float32 | 8.000 (1.00) | 2.000 (4.00) |\n")


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", "3"])
def test_what_is_no_run_is_refused(text, tmp_path, capsys):
    path = tmp_path / "run.json"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        report.main([str(path)])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m bench report: error: {path}: ")


def test_plot(save, tmp_path):
    """Nothing wrong is drawn, and no operation of which ours is wrong."""
    others = [RIVAL | {"operation": "gram"}, WRONG | {"operation": "gram", "provider": "ours", "flops": 1}]
    runs = [
        report.read(Path(save("run.json", *rows))) for rows in ([ROW, RIVAL, SLOWER, *others], [ROW, ROW | {"d": 32}])
    ]
    plots.plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


WORKER = """
import json, sys, sparsefw
for line in sys.stdin:
    request = json.loads(line)
    if request["rounds"] == 0:
        break
    answer = {"seconds": [sparsefw.SECONDS] * request["rounds"]}
    print(json.dumps(answer if request["operation"] == "lmo" else {"error": "unknown"}), flush=True)
"""


@pytest.fixture
def git(tmp_path, monkeypatch):
    """git(...): run git in a repository that has a commit without operations, one with them, and changes."""
    monkeypatch.setattr(base, "REPO", tmp_path)
    monkeypatch.setattr(base, "CODE", WORKER)

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init")
    files = {"sparsefw.py": "SECONDS = 7", "kernels/cpu/x.cpp": "", "kernels/operation.py": ""}
    files["setup.py"] = "print(end='built', file=open('kernels/cpu/_x.so', 'w'))"
    (tmp_path / "kernels/cpu").mkdir(parents=True)
    git("commit", "--allow-empty", "-m", "old")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    git("add", ".")
    git("commit", "-m", "new")
    (tmp_path / "sparsefw.py").write_text("SECONDS = 8")
    (tmp_path / "kernels/cpu/_x.so").write_text("copied")
    return git


@pytest.mark.parametrize(("source", "compiled"), [("", "copied"), ("changed", "built")])
def test_another_commit_is_timed_by_its_own_code(source, compiled, git, tmp_path):
    (tmp_path / "kernels/cpu/x.cpp").write_text(source)
    with suppress(KeyboardInterrupt), base.Worker("HEAD") as worker:
        assert worker.time(operation="lmo", rounds=2) == [7, 7]
        with pytest.raises(RuntimeError, match="HEAD: unknown"):
            worker.time(operation="other", rounds=1)
        assert len(git("worktree", "list").splitlines()) == 2
        assert Path(f"/proc/{worker.process.pid}/cwd/kernels/cpu/_x.so").read_text() == compiled
        for _ in range(2):
            with pytest.raises(RuntimeError, match="its process has ended"):
                worker.time(operation="lmo", rounds=0)
        raise KeyboardInterrupt
    assert len(git("worktree", "list").splitlines()) == 1
    assert worker.process.returncode is not None


@pytest.mark.parametrize(
    ("commit", "line"),
    [
        ("HEAD~1", "HEAD~1 has no kernels/operation.py: it is older than this command"),
        ("nowhere", "nowhere: no such commit"),
        ("-x", "-x: no such commit"),
    ],
)
def test_commits_that_cannot_be_timed_are_refused(commit, line, git, capsys):
    with pytest.raises(SystemExit, match="2"), base.Worker(commit):
        pass
    assert capsys.readouterr().err == f"python -m bench: {line}\n"
    assert len(git("worktree", "list").splitlines()) == 1
