"""The parts that measure a GPU run at tiny sizes. A part that hangs is cut off."""

import gpu
import pytest

from bench.__main__ import named


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu")


# They compare other operations than "packed" does, by the same command, for up to a minute; or they are runs like that
# of "8B cold", but for sizes, which are all tiny here.
LIKE_OTHERS = {*gpu.OPERATIONS, "8B block", "8B warm", "70B block", "70B in host memory"} - {"packed"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in gpu.parts() if name not in LIKE_OTHERS])
def test_part_on_a_gpu(name, folder, monkeypatch):
    """Later parts compare their outputs with those of earlier ones."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    part = gpu.Part(name, folder, folder, tiny=True)
    gpu.parts()[name][1](part)
    assert all(value for line in part.lines() for name, value in line.items() if name.startswith("same bytes"))


@pytest.mark.parametrize("name", gpu.OPERATIONS)
def test_operations_of_parts_are_there(name):
    assert named(gpu.OPERATIONS[name][0].split())


def test_a_part_that_is_cut_off_tells_how_many_tests_had_ended(tmp_path):
    part = gpu.Part("kernel tests", tmp_path, tmp_path, tiny=True)
    part.path(".txt").write_text("[gw0] [ 1%] PASSED tests/a.py::test\n[gw1] [ 2%] FAILED tests/b.py::test\n" * 2)
    assert gpu.tested(part) == ", 2 passed, 2 failed"


def test_the_page_has_what_passed_and_the_end_of_what_failed(tmp_path, monkeypatch):
    limits = {"machine": (60, gpu.describe), "no part": (60, None), "kernel tests": (0.01, gpu.kernel_tests)}
    monkeypatch.setattr(gpu, "parts", lambda: limits)
    arguments = [str(tmp_path), "--tiny", "--scratch", str(tmp_path / "scratch")]
    for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "TRITON_CACHE_DIR", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    assert gpu.main([*arguments, *limits]) == 1
    page = (tmp_path / "results.md").read_text()
    assert "| machine | passed |" in page
    assert "| no part | failed with status 1 |" in page
    assert "KeyError: 'no part'" in page
    assert "| kernel tests | cut off after 0 s |" in page
