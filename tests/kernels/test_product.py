"""product against the specification in float64."""

import pytest
import torch
from helpers import naive
from helpers.kernel_inputs import (
    DEVICE,
    DTYPES,
    PRODUCT_ERROR,
    SUM_ERROR,
    assert_near,
    garbage,
    gram,
    hard_scores,
    needs_bulk_copies,
    needs_gpu,
    normal,
    shapes,
    strided,
)

from sparsefw.kernels import product as product_module
from sparsefw.kernels import triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.definitions import PRECISIONS, round_operand
from sparsefw.kernels.product import product


def set_tiles(monkeypatch, m, n, k):
    """Small tiles, so that there are several groups of them."""
    config = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=2)
    monkeypatch.setattr(product_module, "configuration", lambda *_, **__: config)


def nearest(X, bits):
    """The nearest numbers with `bits` bits of mantissa, from the exponent of each number."""
    # |X| = mantissa 2^exponent with a mantissa in [0.5, 1). Numbers below 2^-126 have fewer bits.
    unit = torch.pow(2.0, torch.frexp(X).exponent.double().clamp(min=-125) - bits - 1)
    # float64 holds the quotient and the product exactly.
    return (torch.round(X.double() / unit) * unit).to(X.dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_operands_are_rounded_to_the_nearest_numbers(dtype):
    """Ties go to even; numbers below 2^-126, zeros, and overflow."""
    X = hard_scores(20, 100)["any bits"]
    X[0, :6] = torch.tensor([0.0, 3.4e38, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 2.0**-126])
    if dtype == torch.float64:
        X = normal(20, 100, dtype=dtype)
    X = X.to(dtype)
    wide = X.to(torch.promote_types(dtype, torch.float32))
    high = nearest(wide, 10)
    expected = dict(ieee=wide, tf32=high, tf32x3=high + nearest(wide - high, 10), bf16=nearest(wide, 7))
    for precision in PRECISIONS:
        # tf32x3 subtracts an infinity from itself.
        torch.testing.assert_close(round_operand(X, precision), expected[precision], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16])
@shapes
def test_as_close_to_float64_as_naive(backend, shape, g_dtype, precision):
    for e_dtype in DTYPES:
        E, G, out = normal(*shape, dtype=e_dtype), gram(shape[1]).to(g_dtype), garbage(*shape)
        assert backend.product(E, G, precision=precision, out=out) is out
        # bf16 operands multiply exactly at every precision.
        exact = e_dtype == g_dtype == torch.bfloat16
        plain = naive.product(E, G, precision="ieee" if exact else precision)
        assert_near(out, plain, naive.product(E.double(), G.double()), precision=precision)


def test_bf16_precision_rounds_to_nearest(backend):
    # 1 + 3/512 lies between the bf16 numbers 1 and 1 + 1/128, nearer to the upper one.
    E = torch.full((1, 1), 1 + 3 / 512, device=DEVICE)
    assert backend.product(E, torch.ones(1, 1, device=DEVICE), precision="bf16").item() == 1 + 1 / 128


@pytest.mark.parametrize("precision", PRECISIONS)
def test_transposed(backend, precision):
    """The matrix is not symmetric, operands have any strides: E C would be another product."""
    E, C = normal(37, 131), normal(131, 131, seed=3)
    plain, truth = naive.product(E, C.T, precision=precision), naive.product(E.double(), C.T.double())
    for matrix in (C, strided(C), C.T.contiguous().T):
        got = Backend(backend, precision).product_transposed(strided(E), matrix)
        assert_near(got, plain, truth, precision=precision)


def test_strided_operands_and_the_grouped_order(monkeypatch):
    """There are several groups of row tiles, and the last one is short."""
    set_tiles(monkeypatch, 16, 64, 128)
    E, G, out = normal(75, 131), gram(131), strided(garbage(75, 131))
    product(strided(E), strided(G), out=out)
    assert_near(out, naive.product(E, G), naive.product(E.double(), G.double()))


@needs_bulk_copies
@pytest.mark.parametrize(
    ("e_dtype", "g_dtype", "precision"),
    [
        (torch.bfloat16, torch.bfloat16, "bf16"),
        (torch.float32, torch.float32, "tf32"),
        (torch.float16, torch.bfloat16, "bf16"),
    ],
)
def test_through_descriptors(own_tiles, e_dtype, g_dtype, precision, monkeypatch):
    """Rows are aligned, though not contiguous; there are more tiles than programs, and edges inside of tiles."""
    set_tiles(monkeypatch, 64, 128, 64)
    monkeypatch.setattr(product_module, "_product_kernel", None)
    for rows, d in ((1, 8), (150, 264)):
        E = torch.full((rows, d + 16), torch.nan, dtype=e_dtype, device=DEVICE)[:, 8:-8].copy_(normal(rows, d))
        G, out = gram(d).to(g_dtype), garbage(rows, d)
        product(E, G, precision=precision, out=out)
        assert_near(out, naive.product(E, G, precision=precision), naive.product(E.double(), G.double()))


def test_unaligned_operands_are_read_without_descriptors(monkeypatch):
    monkeypatch.setattr(product_module, "_descriptor_kernel", None)
    for E in (normal(37, 131), normal(38, 136)[1:, 1:-3], strided(normal(37, 132))):
        G = gram(E.shape[1])
        expected = naive.product(E, G, precision="tf32")
        assert_near(product(E, G, precision="tf32"), expected, naive.product(E.double(), G.double()))


@pytest.mark.parametrize("n", [128, 64], ids=["descriptors", "pointers"])
def test_adds_to_what_there_is(backend, n, monkeypatch):
    set_tiles(monkeypatch, 64, n, 64)
    E, G, start = normal(70, 136, dtype=torch.bfloat16), gram(136).bfloat16(), 1000 * normal(70, 136, seed=1)
    out = start.clone()
    assert backend.product(E, G, precision="bf16", out=out, add=True) is out
    plain, truth = naive.product(E, G, out=start.clone(), add=True), start.double() + E.double() @ G.double()
    assert_near(out, plain, truth)


def test_reruns_and_other_rows_change_no_bit(backend):
    """The part ends where a tile does: some products of libraries depend on a row's place there."""
    E, G = normal(150, 260), gram(260)
    whole = backend.product(E, G, precision="tf32")
    assert whole.dtype == torch.float32
    assert torch.equal(whole, backend.product(E, G, precision="tf32"))
    if backend is triton_ops or DEVICE == "cpu":
        # On a GPU a library takes other tiles for fewer rows.
        assert torch.equal(whole[:128], backend.product(E[:128], G, precision="tf32"))


@needs_gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensor_cores_keep_the_bits_of_their_precision(precision):
    E, G = normal(512, 4096), gram(4096)
    error = product(E, G, precision=precision).double() - naive.product(E.double(), G.double())
    bound = (PRODUCT_ERROR[precision] + SUM_ERROR) * (E.double().abs() @ G.double().abs())
    assert (error.abs() <= bound).all()
