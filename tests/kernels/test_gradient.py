"""gradient against the specification in float64, and finite differences."""

import pytest
import torch
from helpers.kernel_inputs import (
    DEVICE,
    DTYPES,
    PRODUCT_ERROR,
    SHAPES,
    SUM_ERROR,
    assert_near,
    garbage,
    gram,
    needs_gpu,
    normal,
    strided,
    uniform,
)

from sparsefw.kernels import naive
from sparsefw.kernels.gradient import gradient


def truth(W, M, G):
    return naive.gradient(W.double(), M.double(), G.double())


@pytest.mark.parametrize("precision", naive.PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_as_close_to_float64_as_naive(backend, shape, precision):
    W, M, G = normal(*shape), uniform(*shape), gram(shape[1])
    out = garbage(*shape)
    assert backend.gradient(W, M, G, precision=precision, out=out) is out
    assert_near(out, naive.gradient(W, M, G, precision=precision), truth(W, M, G), precision=precision)


@pytest.mark.parametrize("precision", naive.PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_every_dtype(backend, g_dtype, dtype, precision):
    W, M, G = normal(37, 131, dtype=dtype), uniform(37, 131), gram(131).to(g_dtype)
    assert_near(
        backend.gradient(W, M, G, precision=precision), naive.gradient(W, M, G, precision=precision), truth(W, M, G)
    )


def test_gradient_is_the_slope_of_the_error(backend):
    W, M, G = normal(3, 17).double(), uniform(3, 17).double(), gram(17).double()

    def error(M):
        return (W * (1 - M) * ((W * (1 - M)) @ G)).sum()

    direction, h = normal(3, 17, seed=5).double(), 1e-4
    slope = (error(M + h * direction) - error(M - h * direction)) / (2 * h)
    got = (backend.gradient(W.float(), M.float(), G.float()) * direction).sum()
    assert abs(got - slope) <= 1e-5 * abs(slope)


def test_a_kept_row_has_no_gradient(backend):
    W, G = normal(37, 131), gram(131)
    assert (backend.gradient(W, torch.ones_like(W), G) == 0).all()


def test_gradient_of_strided_operands(backend):
    W, M, G = normal(37, 131), uniform(37, 131), gram(131)
    out = strided(garbage(37, 131))
    backend.gradient(strided(W), strided(M), strided(G), out=out)
    assert_near(out, naive.gradient(W, M, G), truth(W, M, G))


def test_gradient_repeats_bit_by_bit(backend):
    W, M, G = normal(150, 260), uniform(150, 260), gram(260)
    assert torch.equal(backend.gradient(W, M, G, precision="bf16"), backend.gradient(W, M, G, precision="bf16"))


def test_gradient_of_no_rows(backend):
    empty = torch.empty(0, 131, device=DEVICE)
    assert backend.gradient(empty, empty, gram(131)).shape == (0, 131)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(W=torch.zeros(3, 4, dtype=torch.int8)), TypeError, "W: expected"),
        (dict(M=torch.zeros(3, 5)), ValueError, r"M: expected shape \(3, 4\), got \(3, 5\)"),
        (dict(M=torch.zeros(3, 4, dtype=torch.bool)), TypeError, "M: expected torch.float32, got torch.bool"),
        (dict(G=torch.zeros(3, 3)), ValueError, r"G: expected shape \(4, 4\)"),
        (dict(out=torch.zeros(3, 4, dtype=torch.float16)), TypeError, "out: expected torch.float32"),
        (dict(precision="half"), ValueError, "precision: expected one of"),
    ],
)
def test_gradient_refuses_bad_input(change, error, match):
    arguments = dict(W=torch.zeros(3, 4), M=torch.zeros(3, 4), G=torch.zeros(4, 4), out=None, precision="ieee") | change
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(error, match=match):
        gradient(moved.pop("W"), moved.pop("M"), moved.pop("G"), **moved)


@needs_gpu
@pytest.mark.parametrize("precision", naive.PRECISIONS)
def test_tensor_cores_keep_the_bits_of_their_precision(precision):
    W, M, G = normal(512, 4096), uniform(512, 4096), gram(4096)
    error = gradient(W, M, G, precision=precision).double() - truth(W, M, G)
    bound = (PRODUCT_ERROR[precision] + SUM_ERROR) * truth(W.abs(), M, G.abs()).abs()
    assert (error.abs() <= bound).all()
