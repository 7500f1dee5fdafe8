"""product against the specification in float64."""

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
)

from sparsefw.kernels import cpu, naive, triton_ops
from sparsefw.kernels import product as product_module
from sparsefw.kernels.launch import platform
from sparsefw.kernels.product import product


@pytest.mark.parametrize("precision", naive.PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_as_close_to_float64_as_naive(backend, shape, precision):
    E, G = normal(*shape), gram(shape[1])
    out = garbage(*shape)
    assert backend.product(E, G, precision=precision, out=out) is out
    truth = naive.product(E.double(), G.double())
    assert_near(out, naive.product(E, G, precision=precision), truth, precision=precision)


@pytest.mark.parametrize("precision", naive.PRECISIONS)
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("e_dtype", DTYPES)
def test_product_of_every_dtype(backend, e_dtype, g_dtype, precision):
    E, G = normal(37, 131, dtype=e_dtype), gram(131).to(g_dtype)
    got = backend.product(E, G, precision=precision)
    assert got.dtype == torch.float32
    assert_near(got, naive.product(E, G, precision=precision), naive.product(E.double(), G.double()))


def test_bf16_operands_multiply_exactly_at_every_precision(backend):
    E, G = normal(37, 131, dtype=torch.bfloat16), gram(131).bfloat16()
    truth = naive.product(E.double(), G.double())
    for precision in naive.PRECISIONS:
        assert_near(backend.product(E, G, precision=precision), naive.product(E, G), truth)


def test_bf16_precision_rounds_to_nearest(backend):
    # 1 + 3/512 lies between the bf16 numbers 1 and 1 + 1/128, nearer to the upper one.
    E = torch.full((1, 1), 1 + 3 / 512, device=DEVICE)
    assert backend.product(E, torch.ones(1, 1, device=DEVICE), precision="bf16").item() == 1 + 1 / 128


def test_product_of_strided_operands(backend):
    E, G = normal(37, 131), gram(131)
    out = strided(garbage(37, 131))
    backend.product(strided(E), strided(G), out=out)
    assert_near(out, naive.product(E, G), naive.product(E.double(), G.double()))


def test_the_grouped_order_meets_every_tile(monkeypatch):
    # There are several groups of row tiles, and the last one is short; the tests above have one group.
    config = dict(BLOCK_M=16, BLOCK_N=64, BLOCK_K=128, GROUP_M=2)
    monkeypatch.setattr(product_module, "configuration", lambda *_, **__: config)
    E, G = normal(75, 131), gram(131)
    assert_near(product(E, G, out=garbage(75, 131)), naive.product(E, G), naive.product(E.double(), G.double()))


@pytest.mark.slow
@pytest.mark.skipif(
    platform() not in product_module.DESCRIPTORS, reason="bulk copies need an NVIDIA GPU, sm_90 or later"
)
@pytest.mark.parametrize(("rows", "d"), [(1, 8), (37, 136), (300, 392)])
@pytest.mark.parametrize(
    ("e_dtype", "g_dtype", "precision"),
    [
        (torch.bfloat16, torch.bfloat16, "bf16"),
        (torch.float32, torch.float32, "tf32"),
        (torch.bfloat16, torch.float32, "tf32"),
        (torch.float16, torch.bfloat16, "bf16"),
    ],
)
def test_product_through_descriptors(e_dtype, g_dtype, precision, rows, d, monkeypatch):
    """Rows are aligned, though not contiguous; there are more tiles than programs, and edges inside of tiles."""
    config = dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=2)
    monkeypatch.setattr(product_module, "configuration", lambda *_, **__: config)
    monkeypatch.setattr(product_module, "_product_kernel", None)
    E = torch.full((rows, d + 16), torch.nan, dtype=e_dtype, device=DEVICE)[:, 8:-8].copy_(normal(rows, d))
    G = gram(d).to(g_dtype)
    out = garbage(rows, d)
    product(E, G, precision=precision, out=out)
    assert_near(out, naive.product(E, G, precision=precision), naive.product(E.double(), G.double()))


def test_unaligned_operands_are_read_without_descriptors(monkeypatch):
    monkeypatch.setattr(product_module, "_descriptor_kernel", None)
    for E in (normal(37, 131), normal(38, 136)[1:, 1:-3], strided(normal(37, 132))):
        G = gram(E.shape[1])
        expected = naive.product(E, G, precision="tf32")
        assert_near(product(E, G, precision="tf32"), expected, naive.product(E.double(), G.double()))


@pytest.mark.parametrize("through", ["descriptors", "pointers"])
def test_product_adds_to_what_there_is(backend, through, monkeypatch):
    config = dict(BLOCK_M=64, BLOCK_N=128 if through == "descriptors" else 64, BLOCK_K=32, GROUP_M=2)
    monkeypatch.setattr(product_module, "configuration", lambda *_, **__: config)
    E, G, start = normal(150, 264, dtype=torch.bfloat16), gram(264).bfloat16(), 1000 * normal(150, 264, seed=1)
    out = start.clone()
    assert backend.product(E, G, precision="bf16", out=out, add=True) is out
    plain, truth = naive.product(E, G, out=start.clone(), add=True), start.double() + E.double() @ G.double()
    assert_near(out, plain, truth)


def test_product_has_something_to_add_to():
    with pytest.raises(ValueError, match="add: there is no out"):
        product(normal(3, 4), gram(4), add=True)


def test_product_repeats_bit_by_bit(backend):
    E, G = normal(150, 260), gram(260)
    assert torch.equal(backend.product(E, G, precision="tf32"), backend.product(E, G, precision="tf32"))


def test_product_does_not_depend_on_the_other_rows():
    E, G = normal(150, 260), gram(260)
    assert torch.equal(product(E, G)[:128], product(E[:128], G))


@pytest.fixture(params=[naive, cpu, triton_ops], ids=["naive", "cpu", "triton"])
def operations(request):
    return request.param


@pytest.mark.parametrize("precision", naive.PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_is_as_close_to_float64_as_naive(operations, shape, precision):
    """The matrix is not symmetric: E C would be another product."""
    E, C = normal(*shape), normal(shape[1], shape[1], seed=3)
    truth, got = E.double() @ C.double().T, operations.product_transposed(E, C, precision=precision)
    assert_near(got, _rounded_product(E, C.T, precision), truth, precision=precision)
    assert shape[1] == 1 or (E.double() @ C.double() - truth).abs().max() > 0.1 * truth.abs().max()


@pytest.mark.parametrize("precision", naive.PRECISIONS)
@pytest.mark.parametrize("c_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("e_dtype", DTYPES)
def test_transposed_of_every_dtype(operations, e_dtype, c_dtype, precision):
    E, C = normal(37, 131, dtype=e_dtype), normal(131, 131, seed=3, dtype=c_dtype)
    got = operations.product_transposed(E, C, precision=precision)
    assert got.dtype == torch.float32
    assert_near(got, _rounded_product(E, C.T, precision), E.double() @ C.double().T)


def test_transposed_of_strided_operands(operations):
    E, C = normal(37, 131), normal(131, 131, seed=3)
    truth, plain = E.double() @ C.double().T, _rounded_product(E, C.T, "ieee")
    for matrix in (strided(C), C.T.contiguous().T):
        assert_near(operations.product_transposed(strided(E), matrix), plain, truth)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_transposed_does_not_depend_on_the_other_rows(operations, precision):
    """The parts begin where a tile of the interpreter does: some products of numpy depend on a row's place there."""
    E, C = normal(320, 260), normal(260, 260, seed=3)
    whole = operations.product_transposed(E, C, precision=precision)
    for first in range(0, 320, 128):
        part = operations.product_transposed(E[first : first + 128], C, precision=precision)
        assert torch.equal(part, whole[first : first + 128])


def _rounded_product(E, C, precision):
    """E C in fp32, of operands that are rounded as `precision` says."""
    return naive.round_operand(E, precision) @ naive.round_operand(C, precision)


def test_product_of_no_rows(backend):
    assert backend.product(torch.empty(0, 131, device=DEVICE), gram(131)).shape == (0, 131)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(E=torch.zeros(3, 4, dtype=torch.int32)), TypeError, "E: expected .*float32.*got torch.int32"),
        (dict(E=torch.zeros(4)), ValueError, "E: expected two dimensions"),
        (dict(E=None), TypeError, "E: expected a tensor, got NoneType"),
        (dict(G=torch.zeros(4, 5)), ValueError, r"G: expected shape \(4, 4\), got \(4, 5\)"),
        (dict(G=torch.zeros(4, 4, dtype=torch.float16)), TypeError, "G: expected"),
        (dict(G=torch.zeros(4, 4, device="meta")), ValueError, "G: expected device"),
        (dict(out=torch.zeros(3, 4, dtype=torch.bfloat16)), TypeError, "out: expected torch.float32"),
        (dict(out=torch.zeros(4, 3)), ValueError, r"out: expected shape \(3, 4\)"),
        (dict(precision="fp8"), ValueError, "precision: expected one of ieee, tf32x3, tf32, bf16, got 'fp8'"),
    ],
)
def test_product_refuses_bad_input(change, error, match):
    arguments = dict(E=torch.zeros(3, 4), G=torch.zeros(4, 4), out=None, precision="ieee") | change
    moved = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for name, value in arguments.items()
    }
    with pytest.raises(error, match=match):
        product(moved.pop("E"), moved.pop("G"), **moved)


@pytest.mark.parametrize("stored", [(2, 2), (2, 4), (4, 2), (4, 4)])
@pytest.mark.parametrize("size", [2, 4])
def test_stages_of_large_tiles_fit_shared_memory(size, stored, monkeypatch):
    """The stages fit beside a quarter of the output, also for operands that are rounded after they are loaded."""
    monkeypatch.setattr(product_module, "platform", lambda: "sm_90")
    config = product_module.configuration(8192, 8192, size, True, stored=stored)
    m, n, k = (config[f"BLOCK_{x}"] for x in "MNK")
    assert n == 256
    stages = config["num_stages"] * (m * stored[0] + n * stored[1]) * k
    assert config["num_stages"] >= 2
    assert stages + m * n * 4 // 4 < 227 * 1024


@pytest.mark.parametrize(("where", "precision"), [("hip", "ieee"), ("sm_80", "tf32x3"), ("sm_90", "tf32x3")])
def test_amd_multiplies_fp32_as_it_is(where, precision, monkeypatch):
    monkeypatch.setattr(product_module, "platform", lambda: where)
    assert product_module.dot_options((torch.float32, torch.float32), "tf32x3")["PRECISION"] == precision


@needs_gpu
@pytest.mark.parametrize("precision", naive.PRECISIONS)
def test_tensor_cores_keep_the_bits_of_their_precision(precision):
    E, G = normal(512, 4096), gram(4096)
    error = product(E, G, precision=precision).double() - naive.product(E.double(), G.double())
    bound = (PRODUCT_ERROR[precision] + SUM_ERROR) * (E.double().abs() @ G.double().abs())
    assert (error.abs() <= bound).all()
