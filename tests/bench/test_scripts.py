"""Scripts of bench/ run the package of their own checkout, and say which names there are."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kill_runs
import pytest

REPO = Path(kill_runs.__file__).resolve().parents[2]
# gpu.sh sets the path of gpu_steps; the others import no package, or only in processes of their own.
OTHERS = {"gpu_steps.py", "kill_runs.py"}
SCRIPTS = [p for p in (REPO / "bench").rglob("*.py") if "__main__" in p.read_text() and p.name not in OTHERS]

# As `python SCRIPT` does it: the script's folder comes first, then PYTHONPATH.
IMPORTED = """
import importlib, os, runpy, sys
path = sys.path[1:]
for script in sys.argv[1:]:
    sys.path[:] = [os.path.dirname(script), *path]
    for name in [name for name in sys.modules if name.partition(".")[0] == "sparsefw"]:
        del sys.modules[name]
    runpy.run_path(script)
    print(importlib.import_module("sparsefw").__file__, script)
"""


@pytest.mark.slow
def test_the_package_is_the_checkouts_own(tmp_path, monkeypatch):
    """Run from another folder, with another version installed."""
    installed = tmp_path / "site-packages"
    (installed / "sparsefw").mkdir(parents=True)
    (installed / "sparsefw/__init__.py").write_text("raise ImportError('the installed one')")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", IMPORTED, *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{REPO}/sparsefw/__init__.py {script}" for script in SCRIPTS]
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
