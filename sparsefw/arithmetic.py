"""Choose the dtype that a model computes in, and refuse NaN and Inf.

On a CPU without instructions for bf16 or fp16, products in half precision take many times as long as in fp32. There a
model in half precision computes in fp32. It is still read and written in its own dtype.

The steps of a reconstruction round the operands of fp32 products if that is faster, since gradients need no more
precision.
"""

from contextlib import AbstractContextManager
from functools import cache, partial
from timeit import timeit

import torch
from torch import Tensor, aminmax
from torch.nn.functional import linear

from sparsefw.caller import products_of_fp32
from sparsefw.errors import InputError, option

HALF = (torch.bfloat16, torch.float16)

# A dtype is slow if its products take more than this many times as long as fp32 products. On all measured processors
# the ratio is below 1.1 or above 1.5, far from this limit.
SLOW = 1.25
# Operands are rounded only in models of width WIDE or more, since narrow models gain less.
WIDE = 256


def computes_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether a model of this dtype computes in fp32, as it does on a CPU that is slow in the dtype."""
    return device.type == "cpu" and dtype in HALF and slowdown(dtype) > SLOW


def computed(x: Tensor, in_fp32: bool) -> Tensor:
    """Convert a tensor of half precision to fp32 if the model computes in fp32."""
    return x.float() if in_fp32 and x.dtype in HALF else x


@cache
def slowdown(dtype: torch.dtype) -> float:
    """Measure once per process how many times as long products in a dtype take on this CPU as in fp32.

    64 vectors are multiplied with a matrix of 512 x 512, forward and backward, as in a step of a reconstruction.
    """

    with torch.inference_mode(False), torch.enable_grad():
        # Operands are allocated before the timing, since the system takes longer for new pages than for the products.
        operands = [
            (torch.ones(64, 512, dtype=one), torch.ones(512, 512, dtype=one, requires_grad=True))
            for one in (dtype, torch.float32)
        ]

        def step(x: Tensor, weight: Tensor) -> None:
            out = linear(x, weight)
            out.backward(out.detach())
            weight.grad = None

        # Alternately, and the shortest time of each.
        rounds = [[timeit(partial(step, *x), number=1) for x in operands] for _ in range(5)]
    own, fp32 = map(min, zip(*rounds, strict=True))
    return own / fp32


def rounds_products(dtype: torch.dtype, device: torch.device, width: int) -> bool:
    """Tell whether the steps of a reconstruction round the operands of their products.

    Args:
        dtype, device: the dtype and the device that the model computes in.
        width: the width of its hidden states.
    """
    return dtype == torch.float32 and width >= WIDE and (device.type == "cuda" or cpu_rounds())


@cache
def cpu_rounds() -> bool:
    """Tell whether oneDNN rounds the operands of fp32 products to bf16: it does on CPUs that multiply in bf16.

    With AMX such products are about 3.5 times as fast.
    """
    # 1 + 2**-12 rounds to 1 in bf16, so the product shows whether operands were rounded.
    x = torch.full((512, 512), 1 + 2**-12)
    with rounded_products():
        return (x @ x)[0, 0].item() == len(x)


def rounded_products() -> AbstractContextManager[None]:
    """Round the operands of fp32 products inside the `with` block: to bf16 on a CPU, to tf32 on a GPU."""
    return products_of_fp32("bf16", "tf32")


def note(dtype: torch.dtype) -> str:
    """Write the log line for a model in half precision that computes in fp32."""
    own = str(dtype).removeprefix("torch.")
    times = f"{slowdown(dtype):.2g} times as long"
    return f"read and written in {own}, computed in fp32: products in {own} take {times} on this processor"


def note_of_rounding(device: torch.device) -> str:
    """Write the log line for a reconstruction with rounded products."""
    to = "tf32" if device.type == "cuda" else "bf16"
    return f"steps of a reconstruction multiply in {to}; {option('precision', 'ieee')} keeps them exact"


class AsyncBool:
    """A bool on its way from a GPU to the host.

    `bool()` waits only for work that was launched before the copy. Reading the tensor on the GPU would also wait for
    all work that was launched later.

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
    """Return a () bool on the tensor's device: whether a nonempty floating tensor has no NaN or Inf."""
    # One pass without a copy: minimum and maximum are finite exactly if all values are, since a NaN becomes both.
    low, high = aminmax(tensor)
    return low.isfinite() & high.isfinite()


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or Inf.

    Args:
        name: the tensor's name, for the message.
        tensor: any shape, dtype and device.

    Raises:
        InputError: the tensor has NaN or Inf; the message says how many.
    """
    if not tensor.is_floating_point() or not tensor.numel() or all_finite(tensor):
        return
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise InputError(f"{name}: holds {nan} NaN and {inf} Inf among {tensor.numel()} values; finite ones are needed")
