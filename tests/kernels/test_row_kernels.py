"""Operations on rows: what holds for all of them, copies of rows, rounding of masks, and steps of Adam."""

import itertools

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import DEVICE, DTYPES, assert_near, example, normal, of_wider, shapes, uniform
from helpers.tensors import assert_equal

from sparsefw.kernels.operation import OPERATIONS, converted

WRITTEN = {
    "lmo": ["returned"],
    "row_step": ["M", "R", "V", "E", "eta", "error"],
    "row_swaps": ["R", "V"],
    "conjugate_step": ["Z", "R", "P", "rz"],
    "take_rows": ["X"],
}


@pytest.mark.parametrize(("name", "label"), [(name, label) for name in WRITTEN for label in OPERATIONS[name].settings])
def test_reruns_strides_and_other_rows_change_no_bit(row_backend, name, label):
    arguments, rows = example(name, 37, 132, **OPERATIONS[name].settings[label]), 37

    def outputs(convert):
        given = converted(arguments, convert)
        given["returned"] = getattr(row_backend, name)(**given)
        values = given | vars(given["state"]) if "state" in given else given
        return [values[key] for key in WRITTEN[name]]

    whole = outputs(torch.clone)
    again, wide, part = map(outputs, (
        torch.clone,
        lambda x: of_wider(x) if x.ndim == 2 else x.clone(),
        lambda x: x[:5].clone() if x.shape[:1] == (rows,) else x.clone(),
    ))  # fmt: skip
    assert all(map(torch.equal, whole, again))
    assert all(map(torch.equal, whole, wide))
    assert all(map(torch.equal, (x[:5] for x in whole), part))


@pytest.mark.parametrize("name", [*WRITTEN, "adam_step", "product"])
def test_no_rows(row_backend, name):
    returned = getattr(row_backend, name)(**example(name, 0, 132))
    assert returned is None or returned.shape == (0, 132)


@shapes
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_rows_that_are_taken(row_backend, dtype, shape):
    X, Y = (normal(*shape, seed=n) > 0 if dtype == torch.bool else normal(*shape, seed=n, dtype=dtype) for n in (0, 1))
    if dtype.is_floating_point:
        # NaN moves with its row only.
        Y[0], X[-1] = torch.nan, torch.nan
    for share in (0.0, 0.4, 1.0):
        taken, got = uniform(shape[0], seed=3) < share, of_wider(X)
        row_backend.take_rows(got, Y, taken)
        torch.testing.assert_close(got, torch.where(taken[:, None], Y, X), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", [0, 4])
def test_rounding_takes_the_highest_entries_in_order(row_backend, group):
    """All rows of two groups, or of one, with three values of M and two of the saliency."""
    every = [torch.tensor([*itertools.product(values, repeat=4)]) for values in ((0.0, 0.5, 1.0), (0.0, 3.0))]
    M, saliency = every[0].repeat_interleave(16, 0), every[1].repeat(81, 1)
    shape, given = (-1, 2 * group or 4), (M.to(DEVICE), saliency.to(DEVICE))
    for k in range(5):
        expected = torch.zeros_like(M, dtype=torch.bool)
        for row, (m, s) in enumerate(zip(M.tolist(), saliency.tolist(), strict=True)):
            best = sorted(range(4), key=lambda j: (-m[j], -s[j], j))
            expected[row, best[:k]] = True
        got = row_backend.round_mask(*(x.view(shape) for x in given), k, group=group)
        assert torch.equal(got.cpu(), expected.view(shape))
        assert_equal([x.cpu() for x in given], [M, saliency])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("entries", [1, 3000])
def test_a_step_of_adam(backend, entries, index_dtype, monkeypatch):
    """Some steps in a row, the third of which has no gradient and one of which has gradients whose squares vanish."""
    # As many entries a program as on a GPU.
    monkeypatch.setattr("sparsefw.kernels.adam.platform", lambda: "sm_80")
    for dtype in DTYPES:
        W = normal(entries, dtype=dtype)
        index = torch.nonzero(uniform(entries, seed=1) < 0.9).flatten().to(index_dtype)
        kept = W[index.long()].float(), *torch.zeros(2, len(index), device=DEVICE)
        plain, truth = ([x.to(wide or x.dtype, copy=True) for x in (W, *kept)] for wide in (None, torch.float64))
        expected = W.clone()
        for step, size in enumerate((1.0, 1e-3, 0.0, 1e-22, 10.0), 1):
            gradient = (size * normal(entries, seed=step)).to(dtype)
            backend.adam_step(W, gradient, index, *kept, rate=0.01, step=step)
            for other in (plain, truth):
                naive.adam_step(other[0], gradient, index, *other[1:], rate=0.01, step=step)
            list(map(assert_near, kept, plain[1:], truth[1:]))
            assert torch.equal(W, expected.index_copy_(0, index.long(), kept[0].to(dtype)))
