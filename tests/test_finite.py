"""NaN and Inf are found and counted."""

import pytest
import torch
from helpers.checkpoints import refused

from sparsefw.finite import check_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_finite(dtype):
    tensor = torch.linspace(-1, 1, 37 * 131).view(37, 131).to(dtype)
    tensor[0, 0] = torch.finfo(dtype).max
    check_finite("w", tensor)
    check_finite("w", tensor.T)
    check_finite("w", tensor[:0])
    check_finite("n", torch.zeros(3, dtype=torch.int64))
    tensor[3, 5] = float("-inf")
    with refused("w: holds 0 NaN and 1 Inf among 4847 values"):
        check_finite("w", tensor)
    tensor[36, 130] = tensor[7, 7] = float("nan")
    with refused("w: holds 2 NaN and 1 Inf"):
        check_finite("w", tensor)
