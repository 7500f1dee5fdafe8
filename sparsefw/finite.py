"""Refuse tensors with NaN or Inf."""

import torch
from torch import Tensor, aminmax

from sparsefw.errors import InputError


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
