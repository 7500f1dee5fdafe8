"""conjugate_step against the specification in float64, and the properties of conjugate gradients."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, SHAPES, assert_near, garbage, gram, in_float64, normal, uniform

from sparsefw.kernels import conjugate as conjugate_module
from sparsefw.kernels import cpu, naive_fits, triton_ops
from sparsefw.kernels.conjugate import conjugate_step

PLACES = {"first": dict(first=True), "between": {}, "last": dict(last=True), "only": dict(first=True, last=True)}


@pytest.fixture(params=["cpu", "one chunk", "chunks"])
def backend(request, monkeypatch):
    """cpu.py; the Triton kernel with rows in one chunk, and in chunks of 64 columns."""
    if request.param == "chunks":

        def configuration(rows: int, d: int) -> dict[str, int]:
            return dict(BLOCK_R=32, BLOCK_D=64)

        monkeypatch.setattr(conjugate_module, "configuration", configuration)
    return cpu if request.param == "cpu" else triton_ops


def arguments(
    rows: int, d: int, *, masked: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor | None]:
    """The middle of a descent: P and its product; some rows have little or nothing left to gain."""
    G, P = gram(d), normal(rows, d, seed=2)
    rz = uniform(rows, seed=3) + 0.5
    enough = 1e-12 * rz
    if rows > 4:
        P[1], P[2], rz[2], enough[3] = 0, 0, 0, 2 * rz[3]
    mask = uniform(rows, d, seed=4) < 0.4 if masked else None
    return dict(
        Z=normal(rows, d), R=normal(rows, d, seed=1), P=P.to(dtype), U=P.to(dtype).float() @ G, rz=rz, enough=enough,
        inverse=1 / G.diagonal().contiguous(), mask=mask,
    )  # fmt: skip


def copy(state: dict) -> dict:
    return {name: tensor if tensor is None else tensor.clone() for name, tensor in state.items()}


def check(backend, state: dict, place: dict) -> None:
    plain, truth = copy(state), in_float64(state)
    naive_fits.conjugate_step(**truth, **place)
    naive_fits.conjugate_step(**plain, **place)
    backend.conjugate_step(**state, **place)
    for name in ("Z", "R", "P", "rz", "enough"):
        assert_near(state[name], plain[name], truth[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_step_is_as_close_to_float64_as_naive(backend, place, masked, dtype):
    state = arguments(37, 262, masked=masked, dtype=dtype)
    check(backend, state, PLACES[place])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000)])
@pytest.mark.parametrize("place", PLACES)
def test_step_of_odd_shapes(backend, place, shape):
    state = arguments(*shape)
    check(backend, state, PLACES[place])


@pytest.mark.parametrize("place", PLACES)
def test_what_a_step_leaves_alone(backend, place):
    state = arguments(37, 262)
    start = copy(state)
    backend.conjugate_step(**state, **PLACES[place])
    written = {"first": {"P", "rz", "enough"}, "between": {"Z", "R", "P", "rz"}, "last": {"Z", "R"}, "only": set()}
    for name, before in start.items():
        assert torch.equal(state[name], before) == (name not in written[place]), name


def test_the_first_step_reads_nothing_of_what_it_writes(backend):
    state = arguments(37, 262)
    blank = state | dict(P=garbage(37, 262), U=garbage(37, 262), rz=garbage(37), enough=garbage(37))
    backend.conjugate_step(**state, first=True)
    backend.conjugate_step(**blank, first=True)
    for name in ("Z", "R", "P", "rz", "enough"):
        assert torch.equal(state[name], blank[name]), name


def test_rows_that_are_done_stay(backend):
    state = arguments(37, 262)
    start = copy(state)
    backend.conjugate_step(**state)
    # A direction of zeros, a direction without gain, and a gain at the limit.
    for row in (1, 2, 3):
        assert torch.equal(state["Z"][row], start["Z"][row])
        assert torch.equal(state["R"][row], start["R"][row])
    assert not torch.equal(state["Z"][0], start["Z"][0])
    # Rows that had nothing left to gain begin a new direction.
    anew = copy(state)
    backend.conjugate_step(**anew, first=True)
    assert torch.equal(state["P"][2], anew["P"][2])


def test_as_many_steps_as_weights_end_at_the_solution(backend):
    rows, d, kept = 7, 96, 6
    G, B = gram(d).double() / 300, normal(rows, d, seed=1).double()
    mask = torch.zeros(rows, d, dtype=torch.bool, device=DEVICE)
    mask[:, 5 : 5 + 16 * kept : 16] = True
    Z, P, U = torch.zeros(rows, d, device=DEVICE), garbage(rows, d), garbage(rows, d)
    state = dict(Z=Z, R=B.float(), P=P, U=U, rz=garbage(rows), enough=garbage(rows))
    state |= dict(inverse=1 / G.diagonal().float(), mask=mask)
    backend.conjugate_step(**state, first=True)
    for _ in range(2 * kept):
        U.copy_((P.double() @ G).float())
        backend.conjugate_step(**state)
    chosen = mask[0].nonzero().squeeze(1)
    solution = torch.linalg.solve(G[chosen][:, chosen], B[:, chosen].T).T
    torch.testing.assert_close(Z[:, chosen].double(), solution, rtol=1e-4, atol=1e-5)
    assert not Z[~mask].any()


def test_rows_of_a_wider_matrix_and_bit_identical_reruns(backend):
    state = arguments(37, 131)
    wide = copy(state)
    for name in ("Z", "R", "P", "U", "mask"):
        around = torch.zeros(37, 200, dtype=state[name].dtype, device=DEVICE)
        around[:, 9:140] = state[name]
        wide[name] = around[:, 9:140]
    again = copy(state)
    for each in (state, wide, again):
        backend.conjugate_step(**each)
    for name in ("Z", "R", "P", "rz"):
        assert torch.equal(state[name], wide[name]), name
        assert torch.equal(state[name], again[name]), name


def test_a_nan_stays_in_its_row_and_shows(backend):
    state = arguments(37, 131)
    state["U"][5, 7] = torch.nan
    expected = copy(state)
    expected["U"][5, 7] = 0
    backend.conjugate_step(**state)
    backend.conjugate_step(**expected)
    others = torch.arange(37, device=DEVICE) != 5
    assert state["R"][5].isnan().any()
    for name in ("Z", "R", "P", "rz"):
        assert torch.equal(state[name][others], expected[name][others]), name


def test_step_of_no_rows(backend):
    backend.conjugate_step(**arguments(0, 131))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(Z=torch.zeros(3, 4, dtype=torch.bfloat16)), TypeError, "Z: expected torch.float32"),
        (dict(P=torch.zeros(3, 4, dtype=torch.float16)), TypeError, "P: expected torch.float32 or torch.bfloat16"),
        (dict(R=torch.zeros(4, 3)), ValueError, r"R: expected shape \(3, 4\)"),
        (dict(P=torch.zeros(4, 3).T), ValueError, "P: expected contiguous rows"),
        (dict(U=torch.zeros(3, 4, device="meta")), ValueError, "U: expected device"),
        (dict(rz=torch.zeros(4)), ValueError, r"rz: expected shape \(3,\)"),
        (dict(enough=torch.zeros(6)[::2]), ValueError, "enough: expected contiguous entries"),
        (dict(inverse=torch.zeros(3)), ValueError, r"inverse: expected shape \(4,\)"),
        (dict(mask=torch.zeros(3, 4)), TypeError, "mask: expected torch.bool"),
    ],
)
def test_step_refuses_bad_input(change, error, match):
    zeros = torch.zeros(3, 4)
    given = dict(Z=zeros, R=zeros, P=zeros, U=zeros, rz=zeros[:, 0].clone(), enough=zeros[:, 0].clone(),
                 inverse=zeros[0], mask=zeros.bool()) | change  # fmt: skip
    moved = {name: x if x.device.type == "meta" else x.to(DEVICE) for name, x in given.items()}
    with pytest.raises(error, match=match):
        conjugate_step(**moved)
