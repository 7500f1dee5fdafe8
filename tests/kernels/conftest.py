"""The implementations that tests compare with the specification."""

from importlib import import_module
from types import ModuleType

import pytest
from helpers.checked_launches import checked_launches, own_tiles, tiles_of_a_gpu  # noqa: F401

# They hold torch's own products against the specification, and torch rounds tf32 operands.
OF_TORCH = ("test_cpu.py", "test_reference.py", "test_vertex_products.py")


@pytest.fixture(autouse=True)
def tf32_of_tensor_cores(request, monkeypatch):
    """On a GPU the references cut tf32 operands off, as tensor cores do. Triton's interpreter reads every bit."""
    import torch
    from helpers.kernel_inputs import ROUNDS_AS_A_GPU

    from sparsefw.kernels import cross, gram, product
    from sparsefw.kernels.definitions import round_operand, widened

    def cut_off(X, precision):
        if precision == "tf32x3":
            high = cut_off(X, "tf32")
            return high + cut_off(X - high, "tf32")
        if precision != "tf32":
            return round_operand(X, precision)
        X = widened(X)
        integer, rest = (torch.int32, 13) if X.dtype == torch.float32 else (torch.int64, 42)
        return X.view(integer).bitwise_and(-(2**rest)).view(X.dtype)

    if ROUNDS_AS_A_GPU and request.path.name not in OF_TORCH:
        for module in (product, gram, cross):
            monkeypatch.setattr(module, "round_operand", cut_off)


@pytest.fixture(params=["cpu", "triton_ops"], ids=["cpu", "triton"])
def backend(request) -> ModuleType:
    """The operations of kernels/cpu/ and of triton_ops.py."""
    return import_module(f"sparsefw.kernels.{request.param}")


@pytest.fixture(params=["cpu", "one chunk", pytest.param("chunks", marks=pytest.mark.slow)])
def row_backend(request, monkeypatch) -> ModuleType:
    """The same for kernels that work on rows: with a row in one chunk, and in chunks of which the last ends inside."""
    from sparsefw.kernels import conjugate, cpu, launch, lmo, step, swaps, take_rows, triton_ops

    if request.param == "chunks":
        # The interpreter takes its time by the program. A compiler takes minutes for so many entries of a thread.
        fewer = 1 if launch.INTERPRET else 16
        for module, tile in (
            (lmo, dict(BLOCK_R=256 // fewer, BLOCK_D=64, SEARCH_D=128)),
            (step, dict(BLOCK_R=128 // fewer, BLOCK_D=128, SEARCH_D=256)),
            (conjugate, dict(BLOCK_R=64 // fewer, BLOCK_D=64)),
            (swaps, dict(BLOCK_R=64 // fewer, BLOCK_D=64)),
            (take_rows, dict(BLOCK_R=64 // fewer, BLOCK_D=128)),
        ):
            monkeypatch.setattr(module, "configuration", lambda *_, tile=tile: tile)
    return cpu if request.param == "cpu" else triton_ops
