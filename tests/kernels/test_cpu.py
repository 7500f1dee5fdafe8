"""What the operations on a CPU are made of: rounding, masks as bytes, blocks of rows, selection in C++ and by bits."""

from functools import partial

import pytest
import torch
from helpers.kernel_inputs import DEVICE, DTYPES, copied, example, hard_scores, normal, uniform

from sparsefw.kernels import cpu, plain
from sparsefw.kernels.cpu import library, selection
from sparsefw.kernels.cpu.selection import kth_by_bits
from sparsefw.kernels.masks import masked

MASK = normal(7, 33, seed=1) > 0.3


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("per_row", [False, True])
def test_blocks_of_rows_change_nothing(per_row, group, monkeypatch):
    whole = example("row_step", 37, 24)["state"]
    whole.k, whole.group = 2 if group else torch.arange(37, device=DEVICE) % 25 if per_row else 9, group
    whole.fixed = cpu.lmo(normal(37, 24, seed=5), 0 if per_row else 1, group=group)
    blocks = copied(whole)
    cpu.row_step(whole, theta=0.4, next_theta=1.0)
    for name in ("BLOCK", "GPU_BLOCK"):
        monkeypatch.setattr(plain, name, 100)
    assert len(plain.row_blocks(blocks.M)) > 1
    cpu.row_step(blocks, theta=0.4, next_theta=1.0)
    for name in ("eta", "error", "M", "R", "V", "E"):
        assert torch.equal(getattr(whole, name), getattr(blocks, name))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_masked_gives_the_very_entries_and_zeros(dtype):
    X = normal(7, 33, dtype=dtype)
    X[~MASK & (X > 1)] = torch.nan
    X[~MASK & (X < -1)] = -torch.inf
    for given, mask in ((X, MASK), (X.T.contiguous().T, MASK), (X, MASK.T.contiguous().T)):
        kept = masked(given, mask)
        assert kept.dtype == dtype
        assert torch.equal(kept, X.masked_fill(~MASK, 0))
        # No -0, which would get into the checkpoint.
        assert not kept[~MASK].signbit().any()


@pytest.mark.parametrize("k", [0, 1, 30, 59, 60, torch.tensor([[0], [17], [60]])])
def test_selection_by_bits_is_that_of_a_sort(k):
    """Numbers of both signs and all sizes, zeros of both signs, ties, and what is chosen or left out before."""
    special = torch.tensor([-0.0, 0.0, 2.0**-149, -(2.0**-149), 3e38, -3e38, 1.0, 1.0, torch.inf, -torch.inf])
    score = torch.cat([normal(3, 50).cpu(), special.expand(3, -1)], 1)
    score[1] = 0.0
    score[2, 5:] = -torch.inf
    at = torch.as_tensor(k).clamp(min=1).expand(3, 1) - 1
    assert torch.equal(kth_by_bits(score, k), score.sort(dim=1, descending=True).values.gather(1, at))


@pytest.fixture(params=library.LEVELS[:3])
def compiled(request, monkeypatch):
    """Selection in C++ with a level of instructions, and by torch, as two functions of the same arguments."""
    best, number = library.level(), library.LEVELS.index(request.param)
    if best is None:
        pytest.skip("selection.cpp was not compiled: the package was installed where no C++ compiler was found")
    if number > best:
        pytest.skip(f"takes a processor with {request.param}")

    def select(level, score, k, **options):
        monkeypatch.setattr(selection, "level", lambda: level)
        options = dict(group=0, fixed=None, positive=False) | options
        return selection.select(score, k, **options, out=torch.ones(score.shape, dtype=torch.bool))

    return partial(select, number), partial(select, None)


def scores(rows, d):
    """Scores of all kinds, some with ties, infinities, zeros of both signs, or NaN, (kinds, rows, d)."""
    x, some = normal(rows, d).cpu(), uniform(rows, d, seed=4).cpu() < 0.2
    kinds = [x, (2 * x).round(), -0.0 * x, *(score.cpu() for score in hard_scores(rows, d).values())]
    kinds += [torch.where(some, value, kinds[1]) for value in (torch.inf, -torch.inf, torch.nan, -torch.nan)]
    return torch.stack([*kinds, torch.where(some, x, torch.nan)])


@pytest.mark.parametrize("d", [1, 31, 64, 65, 131, 4096])
def test_cpp_selects_as_torch(compiled, d):
    rows = 5
    fixed = uniform(rows, d, seed=6).cpu() < 0.1
    per_row = torch.tensor([0, d, d // 2, 1, max(d - 1, 0)], dtype=torch.int32)
    for score in scores(rows, d):
        for k in (0, 1, d // 3, d - 1, d, per_row):
            for options in (dict(), dict(positive=True), dict(fixed=fixed), dict(fixed=fixed, positive=True)):
                got, expected = (select(score, k, **options) for select in compiled)
                assert torch.equal(got, expected), (score, k, options)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 31, 32])
def test_cpp_selects_from_groups_as_torch(compiled, m):
    # More groups than one block has, and a last block that is not full.
    d = 75 * m
    fixed = uniform(3, d, seed=6).cpu() < 0.1
    for score in scores(3, d):
        for n in {0, 1, m // 2, m}:
            for options in (dict(group=m), dict(group=m, positive=True), dict(group=m, fixed=fixed)):
                got, expected = (select(score, n, **options) for select in compiled)
                assert torch.equal(got, expected), (score, n, options)


def test_cpp_takes_strides_and_threads(compiled, set_threads):
    score, fixed = normal(7, 300).cpu(), uniform(7, 300).cpu() < 0.1
    expected = compiled[1](score, 90, fixed=fixed)
    for threads in (1, 2, 3, 16):
        set_threads(threads)
        assert torch.equal(compiled[0](score.T.contiguous().T, 90, fixed=fixed.T.contiguous().T), expected)
        wide = torch.stack([score, score], 1)[:, 0]
        assert torch.equal(compiled[0](wide, 90, fixed=fixed), expected)
