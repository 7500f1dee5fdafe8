"""Sums over tokens: gram_accumulate with mirror_lower, cross_accumulate, and the bulk copies of both.

All are compared with the specification in float64.
"""

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import (
    DEVICE,
    DTYPES,
    PRODUCT_ERROR,
    SUM_ERROR,
    assert_near,
    gram,
    needs_bulk_copies,
    needs_gpu,
    normal,
    strided,
)

from sparsefw.kernels import accumulate as accumulate_module
from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels import mirror as mirror_module


def inputs(tokens, rows, d, dtype=torch.float32):
    """B (rows, d), D (tokens, rows) and X (tokens, d)."""
    return normal(rows, d, seed=2), normal(tokens, rows, dtype=dtype), normal(tokens, d, seed=1, dtype=dtype)


def precision_of(X):
    """That of the sums: products of 16-bit inputs are exact at every precision."""
    return "exact" if X.itemsize == 2 else "ieee"


def check_cross(backend, B, D, X, **options):
    plain = naive.cross_accumulate(B.clone(), D, X, **options)
    truth = naive.cross_accumulate(B.double(), D.double(), X.double())
    assert backend.cross_accumulate(B, D, X, **options) is B
    assert_near(B, plain, truth, precision=precision_of(X))


def check_gram(backend, G, X, **options):
    """The lower triangle of G is right, whatever stands above it, and mirrored it is a symmetric matrix."""
    plain, truth = naive.gram_accumulate(G.clone(), X, **options), naive.gram_accumulate(G.double(), X.double())
    G[tuple(torch.triu_indices(*G.shape, 1))] = torch.nan
    assert backend.gram_accumulate(G, X, **options) is G
    assert_near(G.tril(), plain.tril(), truth.tril(), precision=precision_of(X))
    lower = G.tril()
    assert backend.mirror_lower(G) is G
    assert torch.equal(G.tril(), lower)
    assert torch.equal(G, G.T)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (37, 131, 50), (200, 260, 131), (5, 8, 600)])
def test_as_close_to_float64_as_naive(backend, shape, dtype, precision):
    B, D, X = inputs(*shape, dtype)
    check_gram(backend, gram(shape[2]), X, precision=precision)
    check_cross(backend, B, D, X, precision=precision)


def test_strided_operands(backend):
    """Each operand has strides of its own, so that mixing them up shows."""
    B, D, X = inputs(100, 37, 131)
    check_gram(backend, strided(gram(131)), strided(X))
    for which in range(3):
        check_cross(backend, *(strided(Y) if i == which else Y.clone() for i, Y in enumerate((B, D, X))))


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16), (32, 32)])
def test_every_tile_is_written(monkeypatch, block_m, block_n):
    """Also of several groups of row tiles, of which the last is short."""
    config = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, GROUP_M=2)
    monkeypatch.setattr(accumulate_module, "configuration", lambda *_: config)
    monkeypatch.setattr(mirror_module, "configuration", lambda: dict(BLOCK=32))
    for rows, d in ((2 * block_m + 10, 90), (17, 2 * block_m + 10)):
        B, D, X = inputs(20, rows, d)
        check_cross(triton_ops, B, D, X)
        check_gram(triton_ops, gram(d), X)


def test_several_panels_of_rows():
    """A CPU's last panel is short."""
    check_gram(cpu, gram(1100), normal(20, 1100))


def test_sums_over_many_calls_repeat_bit_by_bit(backend):
    _, D, X = inputs(100, 37, 131)

    def sums(size):
        G, B = torch.zeros(131, 131, device=DEVICE), torch.zeros(37, 131, device=DEVICE)
        for x, y in zip(X.split(size), D.split(size), strict=True):
            backend.gram_accumulate(G, x)
            backend.cross_accumulate(B, y, x)
        return G.tril(), B

    once, again, whole = sums(70), sums(70), sums(100)
    assert all(map(torch.equal, once, again))
    truth = (X.double().T @ X.double()).tril(), D.double().T @ X.double()
    list(map(assert_near, once, whole, truth))


def test_no_entries_leave_the_sums_as_they_are(backend):
    for shape in ((0, 37, 131), (5, 0, 131), (5, 37, 0)):
        B, D, X = inputs(*shape)
        assert torch.equal(backend.cross_accumulate(B.clone(), D, X), B)
    G = gram(131)
    assert torch.equal(backend.gram_accumulate(G.clone(), torch.empty(0, 131, device=DEVICE)), G)
    assert backend.mirror_lower(torch.empty(0, 0, device=DEVICE)).shape == (0, 0)


def test_a_sum_of_squares_is_hardly_cut_off(monkeypatch):
    """Tensor cores cut sums off, by 2.7e-5 (sm_90) or 5e-5 (sm_80) here if fp32 did not add partial sums."""
    config = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=64, GROUP_M=8, PARTIAL=accumulate_module.PARTIAL)
    monkeypatch.setattr(accumulate_module, "configuration", lambda *_: config)
    X = normal(8200, 16, dtype=torch.bfloat16)
    exact = X.double().square().sum(0)
    G = triton_ops.gram_accumulate(torch.zeros(16, 16, device=DEVICE), X)
    assert ((G.diagonal() - exact) / exact).abs().max() <= 1.2e-5


@pytest.fixture(params=[(64, 128), (64, 64)], ids=str)
def only_bulk_copies(request, monkeypatch):
    """Every matrix that the kernel can add to is added to by it, in small tiles."""
    m, n = request.param
    options = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=64, GROUP_M=2, num_warps=4, num_stages=2)
    monkeypatch.setattr(accumulate_module, "ENOUGH", 1)
    monkeypatch.setattr(accumulate_module, "TILES", ((1, options),))
    monkeypatch.setattr(accumulate_module, "_pointer_kernel", None)


@needs_bulk_copies
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bulk_copies(own_tiles, only_bulk_copies, dtype):
    """One tile and one token; edges inside of tiles and more tiles than programs. What stands beside B and G stays.

    Rows are aligned but not contiguous, and beside the inputs there is NaN.
    """
    for shape in ((1, 8, 8), (100, 200, 200)):
        operands, around = [], []
        for Y, there, beside in zip(
            inputs(*shape), (torch.float32, dtype, dtype), (7, torch.nan, torch.nan), strict=True
        ):
            around.append(torch.full((Y.shape[0], Y.shape[1] + 16), beside, dtype=there, device=DEVICE))
            operands.append(around[-1][:, 8:-8].copy_(Y))
        B, D, X = operands
        check_cross(triton_ops, B, D, X)
        assert (around[0][:, :8] == 7).all()
        assert (around[0][:, -8:] == 7).all()
        check_gram(triton_ops, B if shape[1] != shape[2] else B.copy_(gram(shape[2])), X)
        # Every entry is summed in the same order, in whichever tile it stands.
        G, C = torch.zeros(2, shape[2], shape[2], device=DEVICE)
        assert torch.equal(triton_ops.gram_accumulate(G, X).tril(), triton_ops.cross_accumulate(C, X, X).tril())


@pytest.mark.parametrize(
    "X",
    [
        normal(50, 131, dtype=torch.bfloat16),
        normal(50, 136),
        normal(51, 137, dtype=torch.bfloat16)[1:, 1:],
        normal(50, 138, dtype=torch.bfloat16)[:, :136],
        strided(normal(50, 136, dtype=torch.bfloat16)),
    ],
    ids=["odd rows", "fp32", "unaligned start", "unaligned rows", "strided"],
)
def test_other_operands_take_the_other_kernels(X, monkeypatch):
    monkeypatch.setattr(accumulate_module, "ENOUGH", 1)
    monkeypatch.setattr(accumulate_module, "_bulk_kernel", None)
    d = X.shape[1]
    G, B = torch.zeros(d, d, device=DEVICE), torch.zeros(d, d, device=DEVICE)
    truth = X.double().T @ X.double()
    plain = X.float().T @ X.float()
    assert_near(triton_ops.mirror_lower(triton_ops.gram_accumulate(G, X)), plain, truth)
    assert_near(triton_ops.cross_accumulate(B, X, X), plain, truth)


@needs_gpu
@pytest.mark.parametrize("d", [2056, 4104, 8192])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]
)
def test_tensor_cores_keep_the_bits_of_their_precision(dtype, precision, d):
    """In both sizes of tiles, with edges inside of them, an odd number of tokens, and more tiles than programs."""
    X, D = normal(1001, d, dtype=dtype), normal(1001, 2056, seed=1, dtype=dtype)
    G, B = torch.zeros(d, d, device=DEVICE), torch.zeros(2056, d, device=DEVICE)
    for _ in range(2):
        triton_ops.gram_accumulate(G, X, precision=precision)
        triton_ops.cross_accumulate(B, D, X, precision=precision)
    assert torch.equal(triton_ops.mirror_lower(G), G.T)
    for got, left in ((G, 2 * X.double()), (B, 2 * D.double())):
        bound = (PRODUCT_ERROR[precision] + SUM_ERROR) * (left.abs().T @ X.double().abs())
        assert ((got.double() - left.T @ X.double()).abs() <= bound).all()
