"""What the interpreter would let pass is found in every launch of a kernel's tests."""

import pytest
import torch
import triton
import triton.language as tl
from helpers.kernel_inputs import DEVICE
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="launches are checked in the interpreter")


@triton.jit
def _add_one_kernel(X, Y, limit, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + place * stride, mask=place < limit, other=0.0)
    tl.store(Y + place * stride, x + 1, mask=place < limit)


@triton.jit
def _sum_kernel(X, TOTAL, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    x = tl.sum(tl.load(X + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)))
    if ATOMIC:
        tl.atomic_add(TOTAL, x)
    else:
        tl.store(TOTAL, tl.load(TOTAL) + x)


def test_an_entry_past_the_end_is_found():
    X, Y = torch.zeros(24), torch.zeros(20)
    _add_one_kernel[(3,)](X=X, Y=Y, limit=20, stride=1, BLOCK=8)
    assert (Y == 1).all()
    with pytest.raises(InterpreterError, match=r"_add_one_kernel: store of Y at byte \d+, .* \(program \(2, 0, 0\)\)"):
        _add_one_kernel[(3,)](X=X, Y=Y, limit=21, stride=1, BLOCK=8)
    with pytest.raises(InterpreterError, match=r"_add_one_kernel: load of X/Y at byte -4, outside of its 96 bytes"):
        _add_one_kernel[(1,)](X=X, Y=X, limit=2, stride=-1, BLOCK=8)


def test_an_entry_between_those_of_a_view_is_found():
    X = torch.zeros(10, 2)[:, 0]
    _add_one_kernel[(2,)](X=X, Y=X, limit=10, stride=2, BLOCK=8)
    with pytest.raises(InterpreterError, match="load of X/Y at byte 4, where no element begins"):
        _add_one_kernel[(2,)](X=X, Y=X, limit=10, stride=1, BLOCK=8)


def test_programs_that_meet_are_found():
    X, total = torch.ones(32), torch.zeros(1)
    _sum_kernel[(1,)](X=X, TOTAL=total, BLOCK=32, ATOMIC=False)
    with pytest.raises(InterpreterError, match="load of TOTAL at byte 0, which another program has written"):
        _sum_kernel[(4,)](X=X, TOTAL=total, BLOCK=8, ATOMIC=False)
    # Nobody writes X, and the sums are atomic.
    _sum_kernel[(4,)](X=X, TOTAL=total.zero_(), BLOCK=8, ATOMIC=True)
    assert total == 32
