"""A run tries the GPU before it reads anything, and a later failure of the GPU keeps its name."""

import subprocess

import pytest
import torch
from helpers.pretended_gpu import pretended_gpu
from triton import TritonError, knobs

from sparsefw import probe, run
from sparsefw.kernels import mirror, triton_ops
from sparsefw.memory import this_device
from sparsefw.solver.config import PruneConfig

SMALL = ["--nsamples", "2", "--seqlen", "16", "--method", "wanda"]


@pytest.fixture
def gpu():
    probe.probe_gpu.cache_clear()
    with pretended_gpu() as gpu:
        yield gpu
    probe.probe_gpu.cache_clear()


def fails_with(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (RuntimeError("Failed to find C compiler."), "apt install gcc"),
        (subprocess.CalledProcessError(1, ["gcc", "driver.c"]), "apt install python3-dev"),
        (AssertionError("libcuda.so cannot found!\nPlease"), "TRITON_LIBCUDA_PATH"),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "this version of torch"),
        (PermissionError(13, "Permission denied", "/root/.triton"), "TRITON_CACHE_DIR"),
    ],
)
def test_what_a_machine_lacks_is_named_before_a_model_is_read(error, remedy, gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "mirror_lower", fails_with(error))
    monkeypatch.setattr("sparsefw.api.locate", fails_with(AssertionError("a model is read")))
    assert run.main([*SMALL, "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert remedy in message
    assert "or give --kernel torch" in message
    assert not (tmp_path / "out").exists()


def test_an_old_gpu_and_wrong_results_are_refused(gpu, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        assert run.main(SMALL) == 2
    assert "of compute capability 7.5, and Triton's kernels need 8.0; give --kernel torch" in capsys.readouterr().err
    monkeypatch.setattr(mirror, "mirror_lower", lambda G: G)
    assert run.main(SMALL) == 2
    assert "kernels give wrong results: 24.0, [[1.0, 0.0], [2.0, 3.0]]" in capsys.readouterr().err


@pytest.mark.parametrize("hit", [True, False])
def test_the_log_tells_when_kernels_are_compiled_for_the_first_time(hit, gpu, monkeypatch):
    def compiled(G):
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=hit)
        return torch.tensor([[1.0, 2.0], [2.0, 3.0]])

    monkeypatch.setattr(mirror, "mirror_lower", compiled)
    lines = []
    probe.say_kernel(PruneConfig().on(this_device()), lines.append)
    assert ("compiles for this GPU once" in " ".join(lines)) is not hit
    assert knobs.compilation.listener is None


def test_no_gpu_is_told_with_the_driver_that_torch_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for built, line in {
        None: ["kernel: torch (no CUDA device), precision ieee"],
        "13.0": [
            "kernel: torch (torch for CUDA 13.0 finds no GPU; with one, its driver must be 580 or later, see",
            "    nvidia-smi), precision ieee",
        ],
    }.items():
        monkeypatch.setattr(torch.version, "cuda", built)
        lines = []
        probe.say_kernel(PruneConfig().on(this_device()), lines.append)
        assert lines == line


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        TritonError("out of resource: shared memory"),
    ],
)
def test_a_kernel_that_fails_inside_of_a_block_is_no_unsupported_model(error, gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(triton_ops, "gram_accumulate", fails_with(error))
    assert run.main([*SMALL, "--output", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "unsupported model" not in message
    assert message.splitlines()[-1].startswith(f"sparsefw: Triton or CUDA failed, see above: {type(error).__name__}: ")
