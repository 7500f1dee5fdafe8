"""convex_update against the specification in float64."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, SHAPES, assert_near, normal, strided, uniform

from sparsefw.kernels import naive
from sparsefw.kernels.update import convex_update


def state(rows, d):
    return uniform(rows, d), uniform(rows, d, seed=1) < 0.5, normal(rows, d), normal(rows, d, seed=1)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000)])
def test_update_is_as_close_to_float64_as_naive(backend, shape):
    M, V, R, U = state(*shape)
    eta = uniform(shape[0], seed=2)
    M_true, R_true, M_plain, R_plain = M.double(), R.double(), M.clone(), R.clone()
    naive.convex_update(M_true, V, R_true, U.double(), eta.double())
    naive.convex_update(M_plain, V, R_plain, U, eta)
    backend.convex_update(M, V, R, U, eta)
    assert_near(M, M_plain, M_true)
    assert_near(R, R_plain, R_true)
    assert ((M >= 0) & (M <= 1)).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_of_zero_stays_and_a_step_of_one_arrives(backend, eta):
    M, V, R, U = state(37, 131)
    M_start, R_start = M.clone(), R.clone()
    backend.convex_update(M, V, R, U, torch.full((37,), eta, device=DEVICE))
    assert torch.equal(M, V.float() if eta else M_start)
    assert torch.allclose(R, U if eta else R_start, rtol=0, atol=1e-6)


def test_update_of_strided_state(backend):
    M, V, R, U = state(37, 131)
    eta = uniform(37, seed=2)
    M_strided, R_strided = strided(M), strided(R)
    backend.convex_update(M_strided, strided(V), R_strided, strided(U), eta.repeat_interleave(2)[::2])
    backend.convex_update(M, V, R, U, eta)
    assert torch.equal(M_strided, M)
    assert torch.equal(R_strided, R)


def test_update_of_no_rows(backend):
    M, V, R, U = state(0, 131)
    assert backend.convex_update(M, V, R, U, torch.empty(0, device=DEVICE)) is None


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(M=torch.zeros(3, 4, dtype=torch.bfloat16)), TypeError, "M: expected torch.float32"),
        (dict(V=torch.zeros(3, 4)), TypeError, "V: expected torch.bool"),
        (dict(R=torch.zeros(4, 3)), ValueError, r"R: expected shape \(3, 4\)"),
        (dict(U=torch.zeros(3, 4, device="meta")), ValueError, "U: expected device"),
        (dict(eta=torch.zeros(4)), ValueError, r"eta: expected shape \(3,\)"),
        (dict(eta=0.5), TypeError, "eta: expected a tensor, got float"),
    ],
)
def test_update_refuses_bad_input(change, error, match):
    zeros = torch.zeros(3, 4)
    arguments = dict(M=zeros, V=zeros.bool(), R=zeros, U=zeros, eta=torch.zeros(3)) | change
    moved = [
        value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for value in arguments.values()
    ]
    with pytest.raises(error, match=match):
        convex_update(*moved)
