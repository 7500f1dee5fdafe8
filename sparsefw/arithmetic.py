"""The dtype that a model computes in, and the refusal of NaN and Inf.

The dtype is the model's own, or fp32 on a processor that is slow in half precision: without instructions for bf16 or
fp16 products in it take many times as long. The model is read and written in its own dtype all the same.
"""

import time
from functools import cache

import torch
from torch import Tensor, aminmax
from torch.nn.functional import linear

from sparsefw.errors import InputError

HALF = (torch.bfloat16, torch.float16)

# A dtype is slow if its products take more than this many times as long as those in fp32.
SLOW = 1.5


def computes_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model of this dtype computes in fp32 on a device: only on a CPU, where its own products are slow."""
    return device.type == "cpu" and dtype in HALF and slowdown(dtype) > SLOW


def computed(x: torch.Tensor, in_fp32: bool) -> torch.Tensor:
    """A tensor as it is computed with: one of half precision in fp32, if the model computes in it."""
    return x.float() if in_fp32 and x.dtype in HALF else x


@cache
def slowdown(dtype: torch.dtype) -> float:
    """How many times as long products of this dtype take on this CPU as those in fp32; measured once a process.

    64 vectors are multiplied with a matrix of 512 x 512, forward and backward, as in a step of a reconstruction.
    """
    best = {dtype: float("inf"), torch.float32: float("inf")}
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(5):
            for one in best:
                x, weight = torch.ones(64, 512, dtype=one), torch.ones(512, 512, dtype=one, requires_grad=True)
                begin = time.perf_counter()
                out = linear(x, weight)
                out.backward(out.detach())
                best[one] = min(best[one], time.perf_counter() - begin)
    return best[dtype] / best[torch.float32]


def note(dtype: torch.dtype) -> str:
    """The line of the log for a model that computes in fp32."""
    own = str(dtype).removeprefix("torch.")
    times = f"{slowdown(dtype):.2g} times as long"
    return f"read and written in {own}, computed in fp32: products in {own} take {times} on this processor"


class OnItsWay:
    """A bool that is copied to the host beside other work.

    Reading it waits for what was launched before it, and not for what has been launched since: to read a tensor of a
    GPU would wait for all of it.

    Args:
        flag: () bool, on any device.
    """

    def __init__(self, flag: Tensor) -> None:
        self._flag, self._arrived = flag, None
        if flag.device.type == "cuda":
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._flag.copy_(flag, non_blocking=True)
            self._arrived = torch.cuda.current_stream(flag.device).record_event()

    def __bool__(self) -> bool:
        if self._arrived:
            self._arrived.synchronize()
        return bool(self._flag)


def all_finite(tensor: Tensor) -> Tensor:
    """Whether a floating tensor that is not empty has no NaN or Inf: a bool on its device; the host does not wait."""
    # Both ends are finite exactly if all values are: NaN spreads to them. One pass, and no copy of a large tensor.
    low, high = aminmax(tensor)
    return low.isfinite() & high.isfinite()


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or Inf.

    Args:
        name: the tensor's name, for the message.
        tensor: any shape, dtype and device.

    Raises:
        InputError: it holds NaN or Inf; the message says how many.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if bool(all_finite(tensor)):
        return
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise InputError(f"{name}: holds {nan} NaN and {inf} Inf among {tensor.numel()} values; finite ones are needed")
