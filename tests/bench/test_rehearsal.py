"""The page of a rehearsal on a GPU: what it says of parts that pass, fail, and have not run."""

import importlib
import re

import gpu_lines
import gpu_runs
import gpu_steps
import pytest
import rehearsal
from helpers.pretended_gpu import pretended_gpu

import sparsefw.run


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """A rehearsal sets these for its parts."""
    for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")


def test_limits_add_up_to_ten_minutes():
    assert sum(limit for limit, _ in gpu_steps.REHEARSAL.values()) <= 600


@pytest.mark.slow
def test_the_page_tells_what_passed_and_the_end_of_what_failed(tmp_path, monkeypatch):
    """Two parts pass, one is no part and fails, one is cut off. The page after the first says what has not run."""
    # Where it is set, pytest-benchmark times nothing.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    parts = {name: gpu_steps.REHEARSAL[name] for name in ("machine", "row step bench")}
    monkeypatch.setattr(rehearsal, "REHEARSAL", parts | {"no part": (20, ""), "probe": (0.01, "")})
    pages, write = [], rehearsal.page
    monkeypatch.setattr(rehearsal, "page", lambda parts: pages.append(write(parts)) or pages[-1])
    assert rehearsal.main([str(tmp_path / "out"), "--scratch", str(tmp_path / "scratch"), "--tiny"]) == 1
    page = (tmp_path / "out/rehearsal.md").read_text()
    assert page == pages[-1]
    assert len(pages) == 4
    table = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    expected = {
        "machine": "| yes |",
        "row step bench": "| 12 cases |",
        "no part": "| **no** |",
        "probe": "| cut off after",
    }
    assert all(text in table[name] for name, text in expected.items())
    assert "invalid choice: 'no part'" in table["no part"]
    assert table["machine"] in pages[0]
    assert "| row step bench | not run |" in pages[0]
    assert all(figure in page for figure in ("torch 2.", "row_step 48 96 triton"))
    # The last lines of what failed.
    assert "error: argument STEP" in page.partition("## no part")[2]
    with pytest.raises(SystemExit, match="has results already"):
        rehearsal.main([str(tmp_path / "out"), "--tiny"])


def test_without_a_gpu_it_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="torch finds no GPU here; --tiny"):
        rehearsal.main([str(tmp_path / "out"), "--scratch", str(tmp_path)])


@pytest.mark.slow
def test_a_block_on_a_gpu_stands_beside_its_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_runs, "launch", lambda arguments, environment: (sparsefw.run.main(arguments), ""))
    part = gpu_lines.Part("8B block", tmp_path, tmp_path, tiny=True)
    with pretended_gpu():
        importlib.import_module("gpu_compile").machine(part)
        rehearsal.block(part)
    part.add(end="done", seconds=1.0)
    gpu_steps.output_path(part).write_text("")
    page = rehearsal.page([part])
    assert "pretended GPU" in page
    assert all(re.search(rf"^{phase} +\d+\.\d s$", page, re.MULTILINE) for phase in ("solve", "reconstruct"))
    (row,) = (row for row in part.lines("8B block") if "run" in row)
    expected, measured = row["memory"]["expected"]["host"] / 2**30, row["peak_memory"]["host_bytes"] / 2**30
    assert f"\nhost             {expected:.2f} GiB planned, {measured:.2f} measured\n" in page
    assert "\ngpu " in page
