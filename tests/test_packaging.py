"""The content of the wheel and of the source archive, built offline from a copy of the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPO = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").exists())
DATA = {"sparsefw/py.typed", "sparsefw/extras/page/page.html", "sparsefw/extras/page/card.md"}


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files(names: list[str]) -> set[str]:
    """Files of the package, without the metadata."""
    return {name for name in names if name.startswith("sparsefw/") and not name.endswith("/")}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository without what earlier builds and tests have left, which setuptools would pick up."""
    folder = tmp_path_factory.mktemp("packaging") / "repository"
    skipped = shutil.ignore_patterns(".git", "*.so", "*.egg-info", "build", "dist", "__pycache__", ".*_cache", ".venv")
    return shutil.copytree(REPO, folder, symlinks=True, ignore=skipped)


@pytest.fixture(scope="module")
def expected(copy) -> set[str]:
    """The package's files in the repository: modules, kernels, the page and the built-in model."""
    files = {path.relative_to(copy).as_posix() for path in (copy / "sparsefw").rglob("*.py")}
    files |= {f"sparsefw/{path.relative_to(copy).as_posix()}" for path in (copy / "kernels").rglob("*.py")}
    files |= {path.relative_to(copy).as_posix() for path in (copy / "sparsefw/default/model").iterdir()}
    return files | DATA


@pytest.fixture(scope="module")
def wheel(copy) -> Path:
    # Without isolation pip downloads nothing, and uses the setuptools of the extra "test".
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    call(*pip, "--wheel-dir", copy.parent, copy, cwd=copy)
    (wheel,) = copy.parent.glob("*.whl")
    return wheel


def test_wheel(wheel, expected):
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    # Without a compiler the wheel is one for all machines.
    compiled = {name for name in package_files(names) if name.startswith("sparsefw/kernels/cpu/_packed.")}
    assert len(compiled) == (wheel.name.count("-none-any") == 0)
    assert package_files(names) - compiled == expected
    # Nothing beside the package: no tests, no top-level `kernels` over Hugging Face's.
    assert {name.split("/")[0] for name in names} == {"sparsefw", "-".join(wheel.name.split("-")[:2]) + ".dist-info"}


def test_wheel_starts_elsewhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    where = "import sparsefw.run, sparsefw.kernels.launch as launch; print(launch.__file__, sparsefw.__version__)"
    printed = call(sys.executable, "-c", where, cwd=tmp_path)
    assert printed.split() == [str(tmp_path / "sparsefw/kernels/launch.py"), wheel.name.split("-")[1]]
