"""Scripts of bench/ run the package of their own checkout, and say which names there are."""

import importlib
import importlib.util
import multiprocessing
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import kill_runs
import pytest

REPO = Path(kill_runs.__file__).resolve().parents[2]
# gpu.sh sets the path of gpu_steps; the others import no package, or only in processes of their own.
OTHERS = {"gpu_steps.py", "kill_runs.py", "rehearsal.py"}
SCRIPTS = [p for p in (REPO / "bench").rglob("*.py") if "__main__" in p.read_text() and p.name not in OTHERS]


def find_packages(installed, found):
    """Write down where each script finds the package, as `python SCRIPT` does: its folder first, then PYTHONPATH.

    In a copy of this process, which has what they import but the package and the modules beside them.
    """
    path = [folder for folder in sys.path if not Path(folder).resolve().is_relative_to(REPO)]
    for script in SCRIPTS:
        sys.path[:] = [str(script.parent), str(installed), *path]
        for name, module in [*sys.modules.items()]:
            if name == "sparsefw" or str(getattr(module, "__file__", None)).startswith(f"{REPO}/bench"):
                del sys.modules[name]
        runpy.run_path(str(script))
        with found.open("a") as file:
            print(importlib.import_module("sparsefw").__file__, script, file=file)


@pytest.mark.slow
def test_the_package_is_the_checkouts_own(tmp_path, monkeypatch):
    """Run from another folder, with another version installed."""
    installed = tmp_path / "site-packages"
    (installed / "sparsefw").mkdir(parents=True)
    (installed / "sparsefw/__init__.py").write_text("raise ImportError('the installed one')")
    monkeypatch.chdir(tmp_path)
    found = tmp_path / "found.txt"
    process = multiprocessing.get_context("fork").Process(target=find_packages, args=(installed, found))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert found.read_text().splitlines() == [f"{REPO}/sparsefw/__init__.py {script}" for script in SCRIPTS]
    # Its runs are processes of their own.
    started: dict = {}
    monkeypatch.setattr(kill_runs.subprocess, "Popen", lambda command, **options: started.update(options))
    kill_runs.start(tmp_path / "out", ranks=1)
    assert started["env"]["PYTHONPATH"] == str(REPO)


def test_a_benchmark_of_no_name_ends_in_the_operations():
    spec = importlib.util.spec_from_file_location("bench_conftest", REPO / "bench/conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    ids = ("lmo 48 96 triton", "row_step 48 96 torch")
    items = [SimpleNamespace(name=f"test_operation[{id}]", path=Path("bench_operations.py")) for id in ids]
    hook = conftest.pytest_collection_modifyitems(items)
    next(hook)
    items.clear()
    with pytest.raises(pytest.UsageError, match=r"operations: lmo, row_step$"):
        next(hook)
