"""The dtype that a model computes in, and the refusal of NaN and Inf.

A model of half precision computes in fp32 on a processor without instructions for bf16 or fp16, which would take many
times as long for its products. It is read and written in its own dtype all the same.

The steps of a reconstruction round the operands of fp32 products where that is faster: gradients need no more.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial

import torch
from torch import Tensor, aminmax
from torch.nn.functional import linear

from sparsefw.caller import products_of_fp32
from sparsefw.errors import InputError, option

HALF = (torch.bfloat16, torch.float16)

# A dtype is slow if its products take more than this many times as long as those in fp32. All measured processors are
# below 1.1 or above 1.5, far from this limit.
SLOW = 1.25
# Products are rounded if that makes them FAST times as fast, in models of width WIDE or more: narrow models gain less.
FAST, WIDE = 1.5, 256


def computes_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether a model of this dtype computes in fp32 on a device: on a CPU that is slow in this dtype."""
    return device.type == "cpu" and dtype in HALF and slowdown(dtype) > SLOW


def computed(x: torch.Tensor, in_fp32: bool) -> torch.Tensor:
    """Convert a tensor of half precision to fp32 if the model computes in fp32."""
    return x.float() if in_fp32 and x.dtype in HALF else x


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Measure how many times as long products of a dtype take on this CPU as those in fp32, once a process.

    64 vectors are multiplied with a matrix of 512 x 512, forward and backward, as in a step of a reconstruction.
    """

    with torch.inference_mode(False), torch.enable_grad():
        # Allocated before the timing: the system takes longer for new pages than for the products.
        operands = [
            (torch.ones(64, 512, dtype=one), torch.ones(512, 512, dtype=one, requires_grad=True))
            for one in (dtype, torch.float32)
        ]

        def step(x: Tensor, weight: Tensor) -> None:
            out = linear(x, weight)
            out.backward(out.detach())
            weight.grad = None

        own, fp32 = _seconds(*(partial(step, x, weight) for x, weight in operands))
    return own / fp32


def rounds_products(dtype: torch.dtype, device: torch.device, width: int) -> bool:
    """Tell whether the steps of a reconstruction round the operands of their products.

    Args:
        dtype, device: the dtype and the device that the model computes in.
        width: the width of its hidden states.
    """
    return dtype == torch.float32 and width >= WIDE and (device.type == "cuda" or speedup_of_rounding() >= FAST)


@cache
def speedup_of_rounding() -> float:
    """Measure how many times as fast fp32 products with operands rounded to bf16 are on this CPU, once a process.

    About 3.5 with AMX; 1 on processors on which oneDNN does not round.
    """
    # Rounded to bf16, 1 + 2**-12 is 1.
    x = torch.full((512, 512), 1 + 2**-12)

    def rounded() -> Tensor:
        with rounded_products():
            return x @ x

    if rounded()[0, 0] != len(x):
        return 1.0
    exact, fast = _seconds(lambda: x @ x, rounded)
    return exact / fast


def _seconds(*works: Callable[[], object]) -> list[float]:
    """Time several functions in turns, and return the least seconds of each."""
    best = [float("inf")] * len(works)
    for _ in range(5):
        for n, work in enumerate(works):
            begin = time.perf_counter()
            work()
            best[n] = min(best[n], time.perf_counter() - begin)
    return best


def rounded_products() -> AbstractContextManager[None]:
    """Round the operands of fp32 products inside the `with` block: to bf16 on a CPU, to tf32 on a GPU."""
    return products_of_fp32("bf16", "tf32")


def note(dtype: torch.dtype) -> str:
    """Make the line of the log for a model that computes in fp32."""
    own = str(dtype).removeprefix("torch.")
    times = f"{slowdown(dtype):.2g} times as long"
    return f"read and written in {own}, computed in fp32: products in {own} take {times} on this processor"


def note_of_rounding(device: torch.device) -> str:
    """Make the line of the log for steps whose products are rounded."""
    to = "tf32" if device.type == "cuda" else f"bf16 ({speedup_of_rounding():.2g} times as fast here)"
    return f"steps of a reconstruction multiply in {to}; {option('precision', 'ieee')} keeps them exact"


class AsyncBool:
    """A bool whose copy to the host has begun.

    `bool()` of it waits for the work that was launched before the copy. To read a tensor on the GPU instead would wait
    for everything that has been launched since, too.

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
    """Tell whether a floating tensor, not empty, has no NaN or Inf: a bool on its device; the host does not wait."""
    # Minimum and maximum are finite exactly if all values are, since NaN spreads: one pass, without a copy.
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
