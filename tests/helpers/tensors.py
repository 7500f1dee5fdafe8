"""Equal tensors: alone, in sequences, or by their names."""

from functools import partial

import torch

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)
