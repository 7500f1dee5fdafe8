"""A run tries the GPU before it reads anything, and a later failure of the GPU keeps its name."""

import pytest
import torch
from helpers.pretended_gpu import pretended_gpu
from triton import TritonError

from sparsefw import probe, run
from sparsefw.kernels import mirror, triton_ops

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
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "this build of torch"),
        (PermissionError(13, "Permission denied", "/root/.triton"), "TRITON_CACHE_DIR"),
    ],
)
def test_what_a_machine_lacks_is_named_before_a_model_is_read(error, remedy, gpu, out, monkeypatch, capsys):
    monkeypatch.setattr(mirror, "mirror_lower", fails_with(error))
    monkeypatch.setattr("sparsefw.api.locate", fails_with(AssertionError("a model is read")))
    assert run.main([*SMALL, "--output", str(out)]) == 2
    message = capsys.readouterr().err
    assert remedy in message
    assert "or give --kernel torch" in message
    assert not out.exists()


def test_an_old_gpu_and_wrong_results_are_refused(gpu, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        assert run.main(SMALL) == 2
    assert "of compute capability 7.5, and Triton's kernels need 8.0; give --kernel torch" in capsys.readouterr().err
    monkeypatch.setattr(mirror, "mirror_lower", lambda G: G)
    assert run.main(SMALL) == 2
    assert "kernels give wrong results: 24.0, [[1.0, 0.0], [2.0, 3.0]]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        TritonError("out of resource: shared memory"),
    ],
)
def test_a_kernel_that_fails_inside_of_a_block_is_no_unsupported_model(error, gpu, out, monkeypatch, capsys):
    monkeypatch.setattr(triton_ops, "gram_accumulate", fails_with(error))
    assert run.main([*SMALL, "--output", str(out)]) == 1
    message = capsys.readouterr().err
    assert "unsupported model" not in message
    assert message.splitlines()[-1].startswith(f"sparsefw: Triton or CUDA failed, see above: {type(error).__name__}: ")
