"""Host functions that several launchers call: checks of arguments, the current device, the target of compilation."""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from .interpreter import repair_range

repair_range()
INTERPRET = triton.knobs.runtime.interpret
FLOATS, FP32, BOOL = (torch.float32, torch.bfloat16, torch.float16), (torch.float32,), (torch.bool,)


def platform() -> str:
    """Return the target of the next launch: "interpreter", "hip", "sm_80" (and earlier) or "sm_90" (and later).

    sm_120 counts as sm_80: it has the same instructions for tensor cores, and only 99 KiB of shared memory a program.
    """
    if INTERPRET:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "hip"
    return "sm_90" if 90 <= target.arch < 120 else "sm_80"


def warps(n: int) -> int:
    """Return the number of warps for n x 32 threads: half of n on AMD, where a warp has 64 threads."""
    return max(1, n // 2) if platform() == "hip" else n


def multiprocessors(device: torch.device) -> int:
    """Return the number of programs of a persistent kernel: one on each multiprocessor, or 2 in the interpreter.

    For the meta device, whose tensors serve to compile kernels without a GPU, it is the number of an H100.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2 if INTERPRET else 132


def triangle_tiles(d: int, block_m: int, block_n: int) -> int:
    """Count the tiles that cover the lower triangle of a (d, d) matrix, see `device.triangle_tile`."""
    side = max(block_m, block_n)
    squares = triton.cdiv(d, side)
    return squares * (squares + 1) // 2 * (side // block_m) * (side // block_n)


def describable(matrix: Tensor) -> bool:
    """Tell whether a tensor descriptor can describe a matrix: its rows are contiguous, and aligned to 16 bytes."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0
    return aligned and matrix.stride(1) == 1


def vectorized(matrix: Tensor) -> bool:
    """Tell whether a thread can load several entries of a matrix by one instruction.

    Triton does so if rows are contiguous, the address is a multiple of 16 bytes, and the row stride of 16 entries.
    """
    return describable(matrix) and matrix.stride(0) % 16 == 0


def interpreter_tile(rows: int, width: int) -> dict[str, int]:
    """Choose a large tile for a row-wise kernel: the interpreter's time grows with programs and steps, not entries."""
    BLOCK_D = min(triton.next_power_of_2(width), 65536)
    return dict(BLOCK_R=max(1, min(triton.next_power_of_2(rows), 262144 // BLOCK_D)), BLOCK_D=BLOCK_D)


def check(name: str, tensor: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Raise unless `tensor` is a tensor with this shape, one of these dtypes, and the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(t) for t in dtypes)}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")
    if tensor.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"{name}: the Triton kernels need a GPU, got {tensor.device}; use --kernel torch, or set "
            "TRITON_INTERPRET=1 before Python starts"
        )


def check_matrix(name: str, tensor: object, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
    """Return the shape of `tensor`. Raise unless it is a matrix of one of these dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {tuple(tensor.shape)}")
    check(name, tensor, tensor.shape, dtypes, tensor)
    return tensor.shape[0], tensor.shape[1]


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current GPU in a `with` block, since Triton launches on the current GPU."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def launch_rows(kernel: Any, config: dict[str, int], X: Tensor, *others: object, **options: object) -> None:
    """Launch a kernel whose first argument is X; a program works on BLOCK_R rows of X."""
    with on_device(X):
        kernel[(triton.cdiv(len(X), config["BLOCK_R"]),)](
            X, *others, rows=len(X), enable_fp_fusion=True, **options, **config
        )


def check_rows(shape: tuple[int, ...], like: Tensor, dtypes: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    """Raise unless every tensor that is not None has this shape, one of these dtypes, and contiguous rows.

    A vector is one row.
    """
    for name, tensor in tensors.items():
        if tensor is not None:
            check(name, tensor, shape, dtypes, like)
            if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise ValueError(f"{name}: expected contiguous rows, got strides {tensor.stride()}")


def row_strides(**matrices: Tensor | None) -> dict[str, int]:
    """Return the arguments `stride_...` of a kernel: the row stride of each matrix, and 0 for None."""
    return {f"stride_{name}": 0 if matrix is None else matrix.stride(0) for name, matrix in matrices.items()}
