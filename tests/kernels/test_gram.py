"""gram_accumulate against the specification in float64."""

import pytest
import torch
from helpers.kernel_inputs import (
    DEVICE,
    DTYPES,
    PRODUCT_ERROR,
    SUM_ERROR,
    assert_near,
    gram,
    needs_gpu,
    normal,
    strided,
)

from sparsefw.kernels import gram as gram_module
from sparsefw.kernels import naive, triton_ops
from sparsefw.kernels.gram import gram_accumulate


def assert_accumulates(backend, X, G, **options):
    """The lower triangle of G is right, whatever stands above it."""
    plain = naive.gram_accumulate(G.clone(), X, **options)
    truth = naive.gram_accumulate(G.double(), X.double())
    G[tuple(torch.triu_indices(*G.shape, 1))] = torch.nan
    assert backend.gram_accumulate(G, X, **options) is G
    assert_near(G.tril(), plain.tril(), truth.tril())


@pytest.mark.parametrize("shape", [(1, 1), (1, 131), (300, 37), (37, 131), (200, 260), (150, 600)])
def test_gram_is_as_close_to_float64_as_naive(backend, shape):
    assert_accumulates(backend, normal(*shape), gram(shape[1]))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_of_every_dtype(backend, dtype, precision):
    assert_accumulates(backend, normal(200, 131, dtype=dtype), gram(131), precision=precision)


@pytest.mark.slow
def test_every_tile_of_a_large_triangle_is_written(monkeypatch):
    # One tile, and many of them: the walk over the triangle meets every tile once.
    config = dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=64, GROUP_M=2)
    monkeypatch.setattr(gram_module, "configuration", lambda *_: config)
    assert_accumulates(triton_ops, normal(20, 250), torch.zeros(250, 250, device=DEVICE))


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 64), (64, 16)])
def test_tiles_need_not_be_square(monkeypatch, block_m, block_n):
    config = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, GROUP_M=2)
    monkeypatch.setattr(gram_module, "configuration", lambda *_: config)
    assert_accumulates(triton_ops, normal(20, 150), gram(150))


def test_gram_accumulates_over_batches(backend):
    X = normal(200, 131)
    whole, parts = torch.zeros(131, 131, device=DEVICE), torch.zeros(131, 131, device=DEVICE)
    backend.gram_accumulate(whole, X)
    for batch in X.split(70):
        backend.gram_accumulate(parts, batch)
    assert_near(parts.tril(), whole.tril(), (X.double().T @ X.double()).tril())


def test_gram_of_strided_operands(backend):
    G, X = gram(131), normal(200, 131)
    assert_accumulates(backend, strided(X), strided(G))


def test_gram_repeats_bit_by_bit(backend):
    X = normal(200, 260)
    once, again = (backend.gram_accumulate(gram(260), X) for _ in range(2))
    assert torch.equal(once.tril(), again.tril())


def test_no_tokens_leave_the_gram_as_it_is(backend):
    G = gram(131)
    assert torch.equal(backend.gram_accumulate(G.clone(), torch.empty(0, 131, device=DEVICE)), G)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(X=torch.zeros(5, 4, dtype=torch.int8)), TypeError, "X: expected"),
        (dict(X=torch.zeros(2, 5, 4)), ValueError, "X: expected two dimensions"),
        (dict(G=torch.zeros(5, 5)), ValueError, r"G: expected shape \(4, 4\), got \(5, 5\)"),
        (dict(G=torch.zeros(4, 4, dtype=torch.bfloat16)), TypeError, "G: expected torch.float32"),
        (dict(precision="bf16"), ValueError, "precision: expected ieee or tf32, got 'bf16'"),
    ],
)
def test_gram_refuses_bad_input(change, error, match):
    arguments = dict(G=torch.zeros(4, 4), X=torch.zeros(5, 4), precision="ieee") | change
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(error, match=match):
        gram_accumulate(moved.pop("G"), moved.pop("X"), **moved)


@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]
)
def test_tensor_cores_keep_the_bits_of_their_precision(dtype, precision):
    X = normal(2048, 4096, dtype=dtype)
    G = gram_accumulate(torch.zeros(4096, 4096, device=DEVICE), X, precision=precision)
    X = X.double()
    bound = (PRODUCT_ERROR[precision] + SUM_ERROR) * (X.abs().T @ X.abs())
    assert ((G.double() - X.T @ X).abs() <= bound).tril().sum() == 4096 * 4097 // 2
