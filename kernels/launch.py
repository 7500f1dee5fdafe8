"""What the launchers share on the host: checks of the arguments, where to launch, what it is compiled for."""

import contextlib

import torch
import triton
from torch import Tensor

INTERPRET = triton.knobs.runtime.interpret
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def platform() -> str:
    """What the next launch runs on: "interpreter", "hip", "sm_80" (and before) or "sm_90" (and later)."""
    if INTERPRET:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "hip"
    return "sm_90" if target.arch >= 90 else "sm_80"


def warps(n: int) -> int:
    """Warps of n x 32 threads: half as many on AMD, where a warp has 64."""
    return max(1, n // 2) if platform() == "hip" else n


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run at once; two where no GPU is: more than one, fewer than tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can stand for it, as the bulk copies ask: 16-byte aligned rows, one after another."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return aligned and matrix.stride(1) == 1


def interpreter_tile(rows: int, width: int) -> dict[str, int]:
    """Tile of a row-wise kernel in the interpreter, where cost is per program and step, hardly per entry: large."""
    BLOCK_D = min(triton.next_power_of_2(width), 65536)
    return dict(BLOCK_R=max(1, min(triton.next_power_of_2(rows), 262144 // BLOCK_D)), BLOCK_D=BLOCK_D)


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Raise unless `tensor` has this shape, one of these dtypes, and the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(t) for t in dtypes)}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")
    if tensor.device.type == "cpu" and not INTERPRET:
        raise ValueError(
            f"{name}: the Triton kernels need a GPU, got {tensor.device}; use --kernel torch, or set TRITON_INTERPRET=1"
        )


def check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> tuple[int, int]:
    """Shape of `tensor`; raise unless it is a matrix of one of these dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {tuple(tensor.shape)}")
    check(name, tensor, tensor.shape, dtypes, tensor)
    return tensor.shape[0], tensor.shape[1]


def check_fp32_precision(precision: str) -> None:
    """Raise unless `precision` is one that fp32 inputs can be multiplied in as they are."""
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision: expected ieee or tf32, got {precision!r}")


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
