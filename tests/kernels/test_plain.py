"""Operations in plain torch, against their formulas in float64."""

import pytest
import torch
from helpers.kernel_inputs import (
    DEVICE,
    DTYPES,
    assert_near,
    garbage,
    gram,
    in_float64,
    normal,
    of_wider,
    shapes,
    uniform,
)
from helpers.tensors import assert_equal

from sparsefw.estimate.live_bytes import LiveBytes
from sparsefw.kernels import plain
from sparsefw.kernels.operation import converted


@pytest.fixture(autouse=True)
def few_rows_in_a_block(monkeypatch):
    for name in ("BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(plain, name, 300)


def inputs(rows, d, dtype=torch.float32):
    """Arguments of all operations by their names. W has another row stride than the others."""
    mask, diagonal = uniform(rows, d, seed=4) < 0.4, gram(d).diagonal()
    R, Z = 300 * normal(rows, d, seed=1), normal(rows, d, seed=2) * mask
    return dict(
        W=of_wider(normal(rows, d, dtype=dtype)), R=R, X=R, score=R, Z=Z, start=Z,
        M=uniform(rows, d, seed=3), mask=mask, V=mask, kept=mask, target_gap=0.1 * normal(rows, d, seed=5),
        support=uniform(rows, d, seed=6) < 0.8, margin=uniform(rows, seed=7), damping=uniform(d, seed=8),
        inverse=1 / diagonal, root=diagonal.sqrt(),
    )  # fmt: skip


def results(operation, names, given):
    """What an operation returns for the named arguments, as a tuple."""
    returned = operation(**{name: given[name] for name in names.split()})
    return returned if isinstance(returned, tuple) else (returned,)


def formula_of_candidates(Z, R, mask, inverse, root, margin=None, support=None):
    moved = ~mask if support is None else ~mask & support
    candidate = Z + moved * R * inverse
    return candidate, candidate.abs() * root * (1 + (0 if margin is None else margin[:, None] * mask))


def formula_of_bound_scores(W, R, M, target_gap=0, damping=0):
    r = R - (target_gap + W * (1 - M)) * damping
    return W * r, target_gap * r


# Where an operation sums the entries of a row, its formula does not.
FORMULAS = {
    plain.candidates: formula_of_candidates,
    plain.bound_scores: formula_of_bound_scores,
    plain.bound_sums: lambda score, M, V: score * (1 + M - 2 * V.float()),
    plain.row_errors: lambda W, R, Z=0: (W - Z) * R,
}
CASES = [
    (plain.candidates, "Z R mask inverse root"),
    (plain.candidates, "Z R mask inverse root margin support"),
    (plain.bound_scores, "W R M"),
    (plain.bound_scores, "W R M target_gap"),
    (plain.bound_scores, "W R M damping"),
    (plain.bound_scores, "W R M target_gap damping"),
    (plain.bound_sums, "score M V"),
    (plain.row_errors, "W R"),
    (plain.row_errors, "W R Z"),
]
# Operations with a test of their own.
OTHERS = [
    (plain.removed, "W mask"),
    (plain.removed, "W mask target_gap"),
    (plain.begin_fit, "W start mask"),
    (plain.lowest, "X kept"),
]


@shapes
@pytest.mark.parametrize(("operation", "names"), CASES)
def test_formulas(operation, names, shape):
    for dtype in DTYPES:
        given, formula = inputs(*shape, dtype), FORMULAS[operation]
        truth = results(formula, names, in_float64(given))
        close = results(formula, names, converted(given, lambda x: x.float() if x.is_floating_point() else x))
        for got, near, exact in zip(results(operation, names, given), close, truth, strict=True):
            assert got.dtype == torch.float32
            if got.ndim == 1:
                # Within 8 roundings of the sum of the sizes of the terms, which have any sign.
                assert ((got.double() - exact.sum(1)).abs() <= 8 * 2.0**-24 * exact.abs().sum(1)).all()
            else:
                assert_near(got, near, exact)


@shapes
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_once(dtype, shape):
    W, start, mask = normal(*shape, dtype=dtype), normal(*shape, seed=1), uniform(*shape, seed=4) < 0.4
    for target_gap in (None, 0.1 * normal(*shape, seed=5)):
        truth = W.double() * ~mask + (0 if target_gap is None else target_gap.double())
        assert torch.equal(plain.removed(W, mask, target_gap), truth.to(dtype if target_gap is None else torch.float32))
        out = garbage(*shape, dtype=torch.bfloat16)
        assert plain.removed(of_wider(W), of_wider(mask), target_gap, out=out) is out
        assert torch.equal(out, truth.float().bfloat16())
    # Entries outside of the mask do not matter.
    start[~mask] = torch.nan
    for e_dtype in (torch.float32, torch.bfloat16):
        Z, E = plain.begin_fit(W, of_wider(start), of_wider(mask), dtype=e_dtype)
        assert torch.equal(Z, torch.where(mask, start, 0))
        assert torch.equal(E, (W.float() - Z).to(e_dtype))


def test_kept_weights_stay_whatever_their_residual():
    given = inputs(37, 131)
    given["R"][given["mask"]] = torch.inf
    candidate, _ = results(*CASES[0], given)
    assert torch.equal(candidate[given["mask"]], given["Z"][given["mask"]])


def test_a_long_rows_rounding_does_not_grow_with_its_length():
    """All terms are positive: the sum of 28672 of them is as close as a few roundings."""
    E = uniform(3, 28672).bfloat16()
    R = E.float() * 3
    truth = (E.double() * R.double()).sum(1)
    # A sum term by term would be off by up to 28672 roundings of 2^-24.
    assert ((plain.row_errors(E, R).double() - truth).abs() <= 12 * 2.0**-24 * truth).all()


@shapes
def test_the_lowest_kept_entry(shape):
    X, kept = normal(*shape), uniform(*shape, seed=4) < 0.4
    kept[0] = False
    assert torch.equal(plain.lowest(X, kept), X.masked_fill(~kept, torch.inf).amin(1))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU may sum the rows of another block in another order")
def test_blocks_change_no_bit_and_no_argument(monkeypatch):
    given, found = inputs(37, 131), []
    before = converted(given)
    for entries in (100, 1000, 1 << 20):
        monkeypatch.setattr(plain, "BLOCK", entries)
        found.append([x for case in (*CASES, *OTHERS) for x in results(*case, given)])
    for other in found[1:]:
        assert_equal(other, found[0])
    assert_equal(given, before)


def test_temporaries_have_the_size_of_a_block(monkeypatch):
    """By the bytes that a GPU would hold, on the meta device: two fp32 matrices and a mask of a block at most."""
    monkeypatch.setattr(plain, "GPU_BLOCK", entries := 1 << 13)
    given = converted(inputs(64, 1024, torch.bfloat16), lambda x: x.to("meta"))
    for case in (*CASES, *OTHERS):
        with LiveBytes() as count:
            found = results(*case, given)
        assert max(count.points) - count.live <= 9 * entries + 4 * len(given["W"])
        del found


def test_no_rows():
    given = inputs(0, 8)
    for case in (*CASES, *OTHERS):
        assert all(x.shape in ((0,), (0, 8)) for x in results(*case, given))
