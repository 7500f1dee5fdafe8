"""lmo against the specification, entry by entry: it is exact."""

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import DEVICE, garbage, hard_scores, normal, strided, uniform

from sparsefw.kernels import topk
from sparsefw.kernels.launch import INTERPRET
from sparsefw.kernels.lmo import lmo

GROUPS = [(2, 4), (1, 3), (3, 5), (16, 32), (0, 4), (4, 4)]


def assert_equal_to_naive(backend, score, k, **options):
    expected = naive.lmo(score, k, **options)
    out = garbage(*score.shape, dtype=torch.bool)
    assert backend.lmo(score, k, out=out, **options) is out
    assert torch.equal(out, expected)
    return out


def tied(rows: int, d: int) -> torch.Tensor:
    """Scores with few distinct values, so that the k-th is always one of many equal ones."""
    return (2 * normal(rows, d)).round()


@pytest.mark.parametrize("score", [normal(37, 131), tied(37, 131), torch.zeros(37, 131, device=DEVICE)])
def test_rows(row_backend, score):
    for k in (0, 64, 131):
        assert (assert_equal_to_naive(row_backend, score, k).sum(1) == k).all()


def test_no_spread_of_the_scores_misleads_the_search(row_backend):
    # All in one launch, with budgets by row: what takes time in the interpreter is the number of launches.
    score = torch.cat([*hard_scores(15, 200).values()])
    assert_equal_to_naive(row_backend, score, torch.tensor((1, 2, 10, 80, 199), device=DEVICE).repeat(len(score) // 5))


@pytest.mark.skipif(not INTERPRET, reason="calls are counted in the interpreter, which runs where no GPU is")
@pytest.mark.parametrize("name", ["outliers", "any bits", "infinite"])
def test_the_search_never_takes_many_passes(name, monkeypatch):
    score, calls = hard_scores(1, 4000)[name], []
    for function in ("count_reaching", "highest_below"):
        counted = getattr(topk, function)
        monkeypatch.setattr(topk, function, lambda *args, counted=counted: calls.append(1) or counted(*args))
    for k in (1, 1600, 3998):
        calls.clear()
        lmo(score, k)
        assert 0 < len(calls) < 50


def test_k_may_differ_by_row(row_backend):
    k = torch.arange(37, device=DEVICE) * 101 % 132
    k[:2] = torch.tensor([0, 131])
    assert torch.equal(assert_equal_to_naive(row_backend, tied(37, 131), k).sum(1), k)
    strides = k.to(torch.int32).repeat_interleave(2)[::2]
    assert_equal_to_naive(row_backend, tied(37, 131), strides, positive=True)


@pytest.mark.parametrize("positive", [False, True])
def test_fixed_entries_are_kept(row_backend, positive):
    fixed = uniform(37, 131) < 0.1
    V = assert_equal_to_naive(row_backend, tied(37, 131) - 1, 60, fixed=fixed, positive=positive)
    assert (V | ~fixed).all()


@pytest.mark.parametrize("positive", [False, True])
def test_signed_zeros_tie_and_infinities_are_scores(row_backend, positive):
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3.4e38, -3.4e38], device=DEVICE)
    score = values.repeat(17)[:131].repeat(5, 1)
    score[1::2] = score[1::2].flip(1)
    assert_equal_to_naive(row_backend, score, torch.tensor([1, 20, 60, 100, 131], device=DEVICE), positive=positive)


@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_n_of_m(row_backend, n, m):
    for score in (normal(37, 6 * m), tied(37, 6 * m)):
        V = assert_equal_to_naive(row_backend, score, n, group=m)
        assert (V.view(37, 6, m).sum(2) == n).all()
    fixed = naive.lmo(normal(37, 6 * m, seed=7), n // 2, group=m)
    V = assert_equal_to_naive(row_backend, tied(37, 6 * m), n, group=m, fixed=fixed, positive=True)
    assert (V | ~fixed).all()


def test_the_longest_row(backend):
    assert_equal_to_naive(backend, tied(2, 65536), 30000)


def test_strided_scores(row_backend):
    score, fixed, out = tied(37, 131), uniform(37, 131) < 0.1, strided(garbage(37, 131, dtype=torch.bool))
    row_backend.lmo(strided(score), 60, fixed=strided(fixed), out=out)
    assert torch.equal(out, naive.lmo(score, 60, fixed=fixed))


@pytest.mark.parametrize("options", [dict(k=60), dict(k=60, positive=True), dict(k=60, fixed=True), dict(k=1, group=3)])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_is_an_error(row_backend, options, sign):
    score = normal(20, 132)
    score[17, 99] = sign * torch.nan
    if "fixed" in options:
        options = options | dict(fixed=torch.ones_like(score, dtype=torch.bool))
    with pytest.raises(ValueError, match="score: contains NaN"):
        row_backend.lmo(score, **options)
