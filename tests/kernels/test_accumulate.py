"""The kernel of bulk copies behind gram_accumulate and cross_accumulate, and the choice of it."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, SUM_ERROR, assert_near, gram, needs_gpu, normal, strided

from sparsefw.kernels import accumulate as accumulate_module
from sparsefw.kernels import cross as cross_module
from sparsefw.kernels import gram as gram_module
from sparsefw.kernels import naive, triton_ops
from sparsefw.kernels.accumulate import ENOUGH, TILES, TRANSPOSABLE, configuration, suits, tile_count
from sparsefw.kernels.launch import platform
from sparsefw.kernels.product import DESCRIPTORS

needs_bulk_copies = pytest.mark.skipif(
    platform() not in DESCRIPTORS, reason="bulk copies need an NVIDIA GPU, sm_90 or later"
)
# Edges inside of tiles, more tiles than programs, one token, and one tile.
SHAPES = [(1, 8, 8), (37, 136, 136), (100, 264, 136), (70, 8, 392), (50, 320, 320)]


@pytest.fixture(params=[(64, 128), (64, 64)], ids=str)
def only_bulk_copies(request, monkeypatch):
    """Every matrix that the kernel can add to is added to by it, in small tiles."""
    m, n = request.param
    options = dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=32, GROUP_M=2, num_warps=4, num_stages=2)
    monkeypatch.setattr(accumulate_module, "ENOUGH", 1)
    monkeypatch.setattr(accumulate_module, "TILES", ((1, options),))
    monkeypatch.setattr(gram_module, "_gram_kernel", None)
    monkeypatch.setattr(cross_module, "_cross_kernel", None)


def padded(X, dtype=torch.float32):
    """A view of X in dtype, whose rows are aligned but not contiguous. What stands beside it is NaN."""
    wide = torch.full((X.shape[0], X.shape[1] + 16), torch.nan, dtype=dtype, device=DEVICE)
    return wide[:, 8:-8].copy_(X)


@needs_bulk_copies
@pytest.mark.parametrize("dtype", TRANSPOSABLE)
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_through_bulk_copies(only_bulk_copies, shape, dtype):
    tokens, rows, d = shape
    D, X, B = normal(tokens, rows), normal(tokens, d, seed=1), normal(rows, d, seed=2)
    D, X, B = padded(D, dtype), padded(X, dtype), padded(B)
    plain, truth = naive.cross_accumulate(B.clone(), D, X), naive.cross_accumulate(B.double(), D.double(), X.double())
    assert triton_ops.cross_accumulate(B, D, X) is B
    assert_near(B, plain, truth)


@needs_bulk_copies
@pytest.mark.parametrize("dtype", TRANSPOSABLE)
@pytest.mark.parametrize(("tokens", "d"), sorted({(tokens, d) for tokens, _, d in SHAPES}))
def test_gram_through_bulk_copies(only_bulk_copies, tokens, d, dtype):
    X, G = padded(normal(tokens, d), dtype), padded(gram(d))
    plain, truth = naive.gram_accumulate(G.clone(), X), naive.gram_accumulate(G.double(), X.double())
    G[tuple(torch.triu_indices(d, d, 1))] = torch.nan
    assert triton_ops.gram_accumulate(G, X) is G
    assert_near(G.tril(), plain.tril(), truth.tril())
    triton_ops.mirror_lower(G)
    assert torch.equal(G, G.T)


@needs_bulk_copies
def test_what_stands_beside_the_sum_stays(only_bulk_copies):
    wide = torch.full((136, 152), 7.0, device=DEVICE)
    B, X = wide[:, 8:-8], normal(20, 136, dtype=torch.bfloat16)
    triton_ops.cross_accumulate(B, X, X)
    assert (wide[:, :8] == 7).all()
    assert (wide[:, -8:] == 7).all()


@needs_bulk_copies
def test_sums_over_many_calls_repeat_bit_by_bit(only_bulk_copies):
    X = normal(200, 136, dtype=torch.bfloat16)
    D = normal(200, 72, seed=1, dtype=torch.bfloat16)

    def sums():
        G, B = torch.zeros(136, 136, device=DEVICE), torch.zeros(72, 136, device=DEVICE)
        for x, y in zip(X.split(70), D.split(70), strict=True):
            triton_ops.gram_accumulate(G, x)
            triton_ops.cross_accumulate(B, y, x)
        return triton_ops.mirror_lower(G), B

    (G, B), (G_again, B_again) = sums(), sums()
    assert torch.equal(G, G_again)
    assert torch.equal(B, B_again)
    X, D = X.double(), D.double()
    assert_near(G, (X.float().T @ X.float()), X.T @ X)
    assert_near(B, (D.float().T @ X.float()), D.T @ X)


@needs_bulk_copies
def test_the_triangle_of_a_cross_matrix_is_the_gram_matrix(only_bulk_copies):
    """Every entry is summed in the same order, in whichever tile it stands."""
    X = normal(100, 200, dtype=torch.bfloat16)
    G, C = torch.zeros(200, 200, device=DEVICE), torch.zeros(200, 200, device=DEVICE)
    triton_ops.gram_accumulate(G, X)
    triton_ops.cross_accumulate(C, X, X)
    assert torch.equal(G.tril(), C.tril())


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
    monkeypatch.setattr(accumulate_module, "_accumulate_kernel", None)
    d = X.shape[1]
    G, B = torch.zeros(d, d, device=DEVICE), torch.zeros(d, d, device=DEVICE)
    truth = X.double().T @ X.double()
    plain = X.float().T @ X.float()
    assert_near(triton_ops.mirror_lower(triton_ops.gram_accumulate(G, X)), plain, truth)
    assert_near(triton_ops.cross_accumulate(B, X, X), plain, truth)


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("where", ["sm_90", "sm_80", "hip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_choice_depends_on_target_and_dtype(where, dtype, monkeypatch):
    monkeypatch.setattr(accumulate_module, "platform", lambda: where)
    S, X = on_meta(4096, 4096), on_meta(100, 4096, dtype=dtype)
    expected = where == "sm_90" and dtype != torch.float32
    assert suits(S, X, X, triangle=True) == suits(S, X, X, triangle=False) == expected


@pytest.mark.parametrize("which", ["S", "D", "X"])
@pytest.mark.parametrize("change", ["rows", "columns"])
def test_the_choice_depends_on_the_strides_of_every_operand(which, change, monkeypatch):
    monkeypatch.setattr(accumulate_module, "platform", lambda: "sm_90")
    operands = dict(
        S=on_meta(4096, 2048),
        D=on_meta(96, 4096, dtype=torch.bfloat16),
        X=on_meta(96, 2048, dtype=torch.bfloat16),
    )
    assert suits(**operands, triangle=False)
    (m, n), dtype = operands[which].shape, operands[which].dtype
    other = on_meta(n, m, dtype=dtype).T if change == "columns" else on_meta(m, n + 1, dtype=dtype)[:, :n]
    assert not suits(**operands | {which: other}, triangle=False)


@pytest.mark.parametrize(
    ("rows", "d", "triangle", "expected"),
    [
        (576, 576, True, False),
        (1920, 1920, True, False),
        (2048, 2048, True, True),
        (28672, 28672, True, True),
        (1024, 1920, False, False),
        (1024, 2048, False, True),
    ],
)
def test_the_choice_depends_on_the_number_of_tiles(rows, d, triangle, expected, monkeypatch):
    monkeypatch.setattr(accumulate_module, "platform", lambda: "sm_90")
    D, X = (on_meta(100, n, dtype=torch.bfloat16) for n in (rows, d))
    assert (tile_count(rows, d, triangle, 128, 128) >= ENOUGH) == expected
    assert suits(on_meta(rows, d), D, X, triangle=triangle) == expected


@pytest.mark.parametrize(
    ("rows", "d", "triangle", "programs", "columns"),
    [
        # 272 large tiles would take three rounds, the last one of 8 tiles; 528 small tiles fill four.
        (4096, 4096, True, 132, 128),
        (4096, 4096, True, 148, 256),
        # 1056 tiles are 8 rounds.
        (8192, 8192, True, 132, 256),
        (28672, 28672, True, 132, 256),
        (4096, 4096, False, 132, 256),
        (2048, 2048, True, 132, 256),
    ],
)
def test_tiles_are_those_that_fill_the_rounds(rows, d, triangle, programs, columns):
    assert configuration(rows, d, triangle, programs)["BLOCK_N"] == columns


@pytest.mark.parametrize("options", [options for _, options in TILES], ids=lambda options: str(options["BLOCK_N"]))
def test_stages_fit_shared_memory(options):
    """The operands of every stage stand beside a quarter of the tile and the barriers."""
    m, n, k = (options[f"BLOCK_{axis}"] for axis in "MNK")
    assert options["num_stages"] * (m + n) * k * 2 + m * n * 4 // 4 + 64 <= 227 * 1024


@needs_gpu
@pytest.mark.parametrize("d", [2056, 4104, 8192])
def test_edges_of_large_tiles_on_a_gpu(d):
    """Both sizes of tiles, with edges inside of them, an odd number of tokens, and more tiles than programs."""
    X, D = normal(1000, d, dtype=torch.bfloat16), normal(1000, 2056, seed=1, dtype=torch.bfloat16)
    G, B = torch.zeros(d, d, device=DEVICE), torch.zeros(2056, d, device=DEVICE)
    for _ in range(2):
        triton_ops.gram_accumulate(G, X)
        triton_ops.cross_accumulate(B, D, X)
    triton_ops.mirror_lower(G)
    assert torch.equal(G, G.T)
    X, D = 2**0.5 * X.double(), 2**0.5 * D.double()
    for got, left in ((G, X), (B, D)):
        bound = SUM_ERROR * (left.abs().T @ X.abs())
        assert ((got.double() - left.T @ X).abs() <= bound).all()
