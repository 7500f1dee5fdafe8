"""mirror_lower, and the order in which kernels walk the lower triangle."""

import pytest
import torch
import triton
import triton.language as tl
from helpers.kernel_inputs import DEVICE, normal, strided

from sparsefw.kernels import cpu, naive, triton_ops
from sparsefw.kernels import mirror as mirror_module
from sparsefw.kernels.device import triangle_tile
from sparsefw.kernels.launch import triangle_tiles
from sparsefw.kernels.mirror import mirror_lower


@pytest.fixture(params=[naive, cpu, triton_ops], ids=["naive", "cpu", "triton"])
def mirror(request):
    return request.param.mirror_lower


def lower_of(G):
    """G with NaN above the diagonal."""
    return torch.where(torch.ones_like(G, dtype=torch.bool).tril(), G, torch.nan)


@pytest.mark.parametrize("d", [1, 2, 37, 131, 600])
def test_every_entry_above_the_diagonal_is_its_mirror_image(mirror, d):
    original = normal(d, d)
    G = lower_of(original)
    assert mirror(G) is G
    assert torch.equal(G.tril(), original.tril())
    assert torch.equal(G, G.T)


def test_strides_may_be_any(mirror):
    original = normal(131, 131)
    for G in (strided(lower_of(original)), lower_of(original).T.contiguous().T):
        assert torch.equal(mirror(G), naive.mirror_lower(original.clone()))


def test_blocks_and_tiles_are_many(monkeypatch):
    monkeypatch.setattr(cpu, "MIRRORED", 16)
    monkeypatch.setattr(mirror_module, "configuration", lambda: dict(BLOCK=16))
    for d in (64, 75, 100):
        original = normal(d, d)
        expected = naive.mirror_lower(original.clone())
        for operations in (cpu, triton_ops):
            assert torch.equal(operations.mirror_lower(lower_of(original)), expected)


def test_nothing_is_mirrored(mirror):
    assert mirror(torch.empty(0, 0, device=DEVICE)).shape == (0, 0)


@pytest.mark.parametrize(
    ("G", "error", "match"),
    [
        (torch.zeros(4, 5), ValueError, r"G: expected shape \(5, 5\), got \(4, 5\)"),
        (torch.zeros(4), ValueError, "G: expected two dimensions"),
        (torch.zeros(4, 4, dtype=torch.bfloat16), TypeError, "G: expected torch.float32"),
        (None, TypeError, "G: expected a tensor, got NoneType"),
    ],
)
def test_mirror_refuses_bad_input(G, error, match):
    with pytest.raises(error, match=match):
        mirror_lower(G if G is None else G.to(DEVICE))


@triton.jit
def _walk_kernel(first, d, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    tile = tl.program_id(0)
    first_m, first_n = triangle_tile(tile, d, GROUP_M, BLOCK_M, BLOCK_N)
    tl.store(first + 2 * tile, first_m)
    tl.store(first + 2 * tile + 1, first_n)


@pytest.mark.parametrize("group_m", [1, 3])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (16, 64), (64, 16)])
@pytest.mark.parametrize("d", [1, 16, 17, 64, 100, 128, 130, 200, 256, 300])
def test_the_walk_meets_every_tile_of_the_triangle_once(d, block_m, block_n, group_m):
    tiles = triangle_tiles(d, block_m, block_n)
    first = torch.full((tiles, 2), -1, dtype=torch.int32, device=DEVICE)
    _walk_kernel[(tiles,)](first, d, GROUP_M=group_m, BLOCK_M=block_m, BLOCK_N=block_n)
    side = max(block_m, block_n)
    expected = {
        (m, n)
        for m in range(0, triton.cdiv(d, side) * side, block_m)
        for n in range(0, triton.cdiv(d, side) * side, block_n)
        if n // side <= m // side
    }
    assert len(expected) == tiles
    assert {tuple(x) for x in first.tolist()} == expected
