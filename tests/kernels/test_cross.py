"""cross_accumulate against the specification in float64."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, DTYPES, PRODUCT_ERROR, SUM_ERROR, assert_near, needs_gpu, normal, strided

from sparsefw.kernels import cross as cross_module
from sparsefw.kernels import naive, triton_ops
from sparsefw.kernels.cross import cross_accumulate


def inputs(tokens, rows, d, dtype=torch.float32):
    """D (tokens, rows) and X (tokens, d)."""
    return normal(tokens, rows, dtype=dtype), normal(tokens, d, seed=1, dtype=dtype)


def assert_accumulates(backend, B, D, X, **options):
    plain = naive.cross_accumulate(B.clone(), D, X, **options)
    truth = naive.cross_accumulate(B.double(), D.double(), X.double())
    assert backend.cross_accumulate(B, D, X, **options) is B
    assert_near(B, plain, truth)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 3, 131), (300, 37, 37), (37, 131, 50), (200, 260, 131), (150, 64, 600)]
)
def test_cross_is_as_close_to_float64_as_naive(backend, shape):
    assert_accumulates(backend, normal(*shape[1:], seed=2), *inputs(*shape))


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_of_every_dtype(backend, dtype, precision):
    assert_accumulates(backend, normal(37, 131, seed=2), *inputs(200, 37, 131, dtype), precision=precision)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (16, 64), (64, 16)])
def test_the_grouped_order_meets_every_tile(monkeypatch, block_m, block_n):
    # There are several groups of row tiles, and the last one is short; the tests above have one group.
    config = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64, GROUP_M=2)
    monkeypatch.setattr(cross_module, "configuration", lambda *_: config)
    assert_accumulates(triton_ops, normal(150, 90, seed=2), *inputs(20, 150, 90))


def test_cross_accumulates_over_batches(backend):
    D, X = inputs(200, 37, 131)
    whole, parts = torch.zeros(37, 131, device=DEVICE), torch.zeros(37, 131, device=DEVICE)
    backend.cross_accumulate(whole, D, X)
    for batches in zip(D.split(70), X.split(70), strict=True):
        backend.cross_accumulate(parts, *batches)
    assert_near(parts, whole, D.double().T @ X.double())


def test_cross_of_strided_operands(backend):
    B, (D, X) = normal(37, 131, seed=2), inputs(200, 37, 131)
    assert_accumulates(backend, strided(B), strided(D), strided(X))
    # Each operand has strides of its own, so that mixing them up shows.
    for which in range(3):
        assert_accumulates(backend, *(strided(Y) if i == which else Y.clone() for i, Y in enumerate((B, D, X))))


def test_cross_repeats_bit_by_bit(backend):
    once, again = (backend.cross_accumulate(normal(140, 260, seed=2), *inputs(200, 140, 260)) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("shape", [(0, 37, 131), (5, 0, 131), (5, 37, 0)])
def test_no_entries_leave_the_cross_matrix_as_it_is(backend, shape):
    B = normal(*shape[1:], seed=2)
    assert torch.equal(backend.cross_accumulate(B.clone(), *inputs(*shape)), B)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(X=torch.zeros(5, 4, dtype=torch.int8)), TypeError, "X: expected"),
        (dict(X=torch.zeros(2, 5, 4)), ValueError, "X: expected two dimensions"),
        (dict(D=torch.zeros(6, 3)), ValueError, r"D: expected shape \(5, 3\), got \(6, 3\)"),
        (dict(D=torch.zeros(5, 3, dtype=torch.bfloat16)), TypeError, "D: expected torch.float32, got torch.bfloat16"),
        (dict(D=None), TypeError, "D: expected a tensor, got NoneType"),
        (dict(B=torch.zeros(4, 3)), ValueError, r"B: expected shape \(3, 4\), got \(4, 3\)"),
        (dict(B=torch.zeros(3, 4, dtype=torch.bfloat16)), TypeError, "B: expected torch.float32"),
        (dict(precision="bf16"), ValueError, "precision: expected ieee or tf32, got 'bf16'"),
    ],
)
def test_cross_refuses_bad_input(change, error, match):
    arguments = dict(B=torch.zeros(3, 4), D=torch.zeros(5, 3), X=torch.zeros(5, 4), precision="ieee") | change
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(error, match=match):
        cross_accumulate(moved.pop("B"), moved.pop("D"), moved.pop("X"), **moved)


@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]
)
def test_tensor_cores_keep_the_bits_of_their_precision(dtype, precision):
    D, X = inputs(2048, 1024, 4096, dtype)
    B = cross_accumulate(torch.zeros(1024, 4096, device=DEVICE), D, X, precision=precision)
    D, X = D.double(), X.double()
    bound = (PRODUCT_ERROR[precision] + SUM_ERROR) * (D.abs().T @ X.abs())
    assert ((B.double() - D.T @ X).abs() <= bound).all()
