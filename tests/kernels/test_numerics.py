"""The rounding of a GPU that `--numerics` pretends, and the tests of kernels that come nearest to their limits."""

from fractions import Fraction
from math import floor, frexp

import numpy as np
import pytest
from helpers.all_on_gpu import run_fast_tests
from helpers.numerics import TARGETS, block_product, moved, product, sum_by_threads


def drawn(*shape, seed=0):
    """fp32 numbers of bf16, whose sizes differ widely."""
    draws = np.random.default_rng(seed)
    x = (draws.standard_normal(shape) * np.exp(3 * draws.standard_normal(shape))).astype(np.float32)
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)


def towards_zero(x, bits_below):
    """A fraction as a multiple of 2^-bits_below, cut off."""
    multiple = floor(abs(x) * Fraction(2) ** bits_below)
    return (1 if x >= 0 else -1) * multiple / Fraction(2) ** bits_below


def exponent(x):
    return frexp(float(x))[1] if x else -1000


@pytest.mark.parametrize("target", TARGETS)
def test_tensor_cores_by_exact_fractions(target):
    cores = TARGETS[target]
    a, b, start = drawn(2, 37), drawn(37, 3, seed=1), drawn(2, 3, seed=2)
    got = block_product(a, b, start, cores.wide, cores.extra)
    for i, j in np.ndindex(got.shape):
        total = Fraction(float(start[i, j]))
        for first in range(0, 37, cores.wide):
            terms = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[i], b[:, j], strict=True)]
            terms = [*terms[first : first + cores.wide], total]
            kept = 24 + cores.extra - max(map(exponent, terms))
            total = sum(towards_zero(term, kept) for term in terms)
            total = towards_zero(total, 24 - exponent(total))
        assert got[i, j] == total


def test_what_tells_the_generations_apart():
    """Products of half a unit in the last place of the sum: one more bit loses them, two more bits keep them."""
    ones, small = np.ones((1, 16), np.float32), np.full((16, 1), 2.0**-25, np.float32)
    sums = {name: product(ones, small, ones[:, :1], "IEEE", cores) for name, cores in TARGETS.items()}
    assert sums["ampere"] == 1
    assert sums["hopper"] == 1 + 2.0**-21


def test_tf32_is_cut_off_and_fp32_fused():
    x, one = np.array([[1 + 2.0**-11 + 2.0**-12]], np.float32), np.ones((1, 1), np.float32)
    got = {name: product(x, x, -one, name, TARGETS["hopper"]).item() for name in ("IEEE", "TF32", "TF32x3")}
    # The square is rounded once, after the subtraction.
    exact = float(x[0, 0]) ** 2 - 1
    assert got["IEEE"] == np.float32(exact)
    assert got["TF32"] == 0
    assert got["TF32x3"] == pytest.approx(exact, rel=2.0**-10)


def test_sums_go_by_threads():
    """A thread has entries 0 to 3, and 512 to 515. The others follow by halves."""
    x = np.zeros(1024, np.float32)
    x[[0, 1, 512]] = 2.0**24, 1, 1
    x[256] = -(2.0**24)
    assert sum_by_threads(x, 0) == 0
    assert sum_by_threads(x[None, ::-1].copy(), 1).shape == (1, 1)
    x[[1, 512]] = 0
    x[[257, 258]] = 1
    assert sum_by_threads(x, 0) == 2


def test_a_fast_division_is_off_by_two_units_at_most():
    x = np.float32([1.5, 3.1, -7.7, 1e-3, 1.0, 0.0, np.inf])
    units = moved(x, 2).view(np.int32) - x.view(np.int32)
    assert 0 < np.abs(units).max() <= 2
    assert not units[-3:].any()


# The files whose tests come nearest to their limits (0.97 of one by "ampere"), and those that compare bits.
FILES = [f"kernels/test_{name}.py" for name in ("accumulate", "product", "conjugate", "operation")]
FILES += ["kernels/test_step.py::test_a_solve_carries_thresholds_from_step_to_step"]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_pass_with_the_rounding_of_a_gpu(target):
    run_fast_tests(FILES, "--numerics", target)
