"""Whether a model computes in its own dtype, or in fp32 since half precision is slow on this processor.

Processors without instructions for bf16 or fp16 take many times as long for products in it. Weights of such a model are
read and written in its own dtype all the same.
"""

import time
from functools import cache

import torch
from torch.nn.functional import linear

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
    times = f"{slowdown(dtype):.0f} times as long"
    return f"read and written in {own}, computed in fp32: products in {own} take {times} on this processor"
