"""conjugate_step against the specification in float64."""

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import assert_near, copied, garbage, gram, in_float64, normal, shapes, uniform

PLACES = {"first": dict(first=True), "between": {}, "last": dict(last=True)}


def arguments(rows: int, d: int, *, masked: bool = True, dtype: torch.dtype = torch.float32) -> dict:
    """The middle of a descent: P and its product; some rows have little or nothing left to gain."""
    G, P = gram(d), normal(rows, d, seed=2)
    rz = uniform(rows, seed=3) + 0.5
    enough = 1e-12 * rz
    if rows > 4:
        P[1], P[2], rz[2], enough[3] = 0, 0, 0, 2 * rz[3]
    mask = uniform(rows, d, seed=4) < 0.4 if masked else None
    return dict(
        Z=normal(rows, d), R=normal(rows, d, seed=1), P=P.to(dtype), U=P.to(dtype).float() @ G, rz=rz, enough=enough,
        inverse=1 / G.diagonal().contiguous(), mask=mask,
    )  # fmt: skip


@shapes
@pytest.mark.parametrize("place", PLACES)
def test_as_close_to_float64_as_naive(row_backend, place, shape):
    for masked, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        state = arguments(*shape, masked=masked, dtype=dtype)
        start, plain, truth = copied(state), copied(state), in_float64(state)
        naive.conjugate_step(**truth, **PLACES[place])
        naive.conjugate_step(**plain, **PLACES[place])
        row_backend.conjugate_step(**state, **PLACES[place])
        written = {"first": {"P", "rz", "enough"}, "between": {"Z", "R", "P", "rz"}, "last": {"Z", "R"}}[place]
        for name, before in start.items():
            if name in written - {"P"}:
                assert_near(state[name], plain[name], truth[name])
            elif name in written:
                # The direction is rounded once where it is stored in bf16.
                rounding = 2.0**-8 * truth[name].abs() if dtype == torch.bfloat16 else 0.0
                assert_near(state[name], plain[name], truth[name], rounding)
            else:
                assert before is None or torch.equal(state[name], before), name


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
