"""conjugate_step against the specification in float64."""

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import assert_near, copied, example, garbage, in_float64, shapes


def arguments(rows: int, d: int, dtype: torch.dtype = torch.float32) -> dict:
    """The middle of a descent, in which some rows have little or nothing left to gain."""
    given = example("conjugate_step", rows, d, dtype)
    if rows > 4:
        given["P"][1:3], given["U"][1:3], given["rz"][2] = 0, 0, 0
        given["enough"][3] = 2 * given["rz"][3]
    return given


@shapes
@pytest.mark.parametrize("place", [dict(first=True), {}, dict(last=True)])
def test_as_close_to_float64_as_naive(row_backend, place, shape):
    for dtype, change in ((torch.float32, {}), (torch.bfloat16, dict(mask=None))):
        state = arguments(*shape, dtype) | change
        plain, truth = copied(state), in_float64(state)
        for other in (truth, plain):
            naive.conjugate_step(**other, **place)
        row_backend.conjugate_step(**state, **place)
        for name in ("Z", "R", "P", "rz", "enough"):
            # The direction is rounded once where it is stored in bf16.
            rounding = 2.0**-8 * truth["P"].abs() if name == "P" and dtype == torch.bfloat16 else 0.0
            assert_near(state[name], plain[name], truth[name], rounding)


def test_the_first_step_reads_nothing_of_what_it_writes(row_backend):
    state = arguments(37, 262)
    blank = state | dict(P=garbage(37, 262), U=garbage(37, 262), rz=garbage(37), enough=garbage(37))
    row_backend.conjugate_step(**state, first=True)
    row_backend.conjugate_step(**blank, first=True)
    for name in ("Z", "R", "P", "rz", "enough"):
        assert torch.equal(state[name], blank[name]), name


def test_rows_that_are_done_stay(row_backend):
    state = arguments(37, 262)
    start = copied(state)
    row_backend.conjugate_step(**state)
    # A direction of zeros, a direction without gain, and a gain at the limit.
    for row in (1, 2, 3):
        assert torch.equal(state["Z"][row], start["Z"][row])
        assert torch.equal(state["R"][row], start["R"][row])
    assert not torch.equal(state["Z"][0], start["Z"][0])
    # Rows that had nothing left to gain begin a new direction.
    anew = copied(state)
    row_backend.conjugate_step(**anew, first=True)
    assert torch.equal(state["P"][2], anew["P"][2])
