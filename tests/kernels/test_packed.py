"""Products with packed matrices and their expansion, on every level of instructions of this processor and by Triton."""

import ctypes
import mmap
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers.kernel_inputs import DEVICE, SUM_ERROR
from helpers.kernel_inputs import normal as drawn

from sparsefw.kernels import packed
from sparsefw.kernels.cpu import packed as packed_cpu

LEVELS = ["torch", *packed_cpu.LEVELS]
# Rows of x: all that the loops on a CPU tell apart, and one, a tile of Triton's, and more than that.
BATCHES, TILES = (1, 2, 3, 4, 5, 13, 16, 17), (1, 16, 17)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The rounding of a result, and of a sum in fp32.
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUM = SUM_ERROR if DEVICE == "cuda" else 2e-6


def normal(*shape, seed=0):
    return drawn(*shape, seed=seed).cpu()


def packed_matrix(rows, cols, dtype, *, ragged=False, share=0.4):
    """A matrix with zeros, and it packed: values, mask, starts."""
    scores = normal(rows, cols, seed=1)
    kept = scores > scores.quantile(1 - share) if ragged else scores >= scores.topk(int(share * cols)).values[:, -1:]
    W = (normal(rows, cols) * kept).to(dtype)
    bits = torch.nn.functional.pad(kept, (0, -cols % 8)).view(rows, -1, 8)
    mask = (bits.int() << torch.arange(8, dtype=torch.int32)).sum(-1).to(torch.uint8)
    if not ragged:
        return W, (W[kept].view(rows, -1), mask, None)
    return W, (W[kept], mask, torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]))


def on_gpu(operation):
    """An operation of tensors that are moved to the GPU, if there is one; its result is moved back."""

    def call(*tensors, **options):
        return operation(*(x if x is None else x.to(DEVICE) for x in tensors), **options).cpu()

    return call


@pytest.fixture(params=[*LEVELS, "triton"])
def level(request, monkeypatch):
    """The operations by Triton, or with a level of instructions, or torch, in place of the best one."""
    if request.param == "triton":
        return SimpleNamespace(
            **{name: on_gpu(vars(packed)[name]) for name in ("unpack", "packed_product")}, batches=TILES
        )
    best = packed_cpu.level()
    number = None if request.param == "torch" else packed_cpu.LEVELS.index(request.param)
    if number is not None and best is None:
        pytest.skip("packed.cpp was not compiled: the package was installed where no C++ compiler was found")
    if number is not None and number > best:
        pytest.skip(f"takes a processor with {request.param}")
    monkeypatch.setattr(packed_cpu, "level", lambda: number)
    return packed_cpu


def test_threads_may_launch_at_once():
    W, matrix = packed_matrix(33, 64, torch.float32)
    x = torch.eye(64)
    with ThreadPoolExecutor(4) as threads:
        # From 17 rows on the matrix is unpacked.
        products = list(threads.map(lambda n: on_gpu(packed.packed_product)(x[:n], *matrix), [16, 17] * 20))
    assert all(torch.equal(y, W[:, : len(y)].T) for y in products)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols", "ragged"), [(33, 64, False), (19, 1056, True), (3, 50, False), (4, 50, True)])
def test_packed_matrices_are_those_with_zeros(level, rows, cols, ragged, x_dtype, dtype):
    W, matrix = packed_matrix(rows, cols, dtype, ragged=ragged)
    assert torch.equal(level.unpack(*matrix, cols=cols), W)
    assert torch.equal(level.unpack(*matrix, cols=cols, first=1, last=3), W[1:3])
    for batch in getattr(level, "batches", BATCHES):
        x = normal(batch, cols, seed=batch).to(x_dtype)
        y = level.packed_product(x, *matrix)
        # Where torch multiplies, it gets W in the dtype of x.
        truth = x.double() @ W.double().T
        scale = x.double().abs() @ W.double().abs().T
        allowed = ROUNDING[x_dtype] * truth.abs() + SUM * scale
        if x_dtype != dtype:
            allowed += ROUNDING[x_dtype] * scale
        assert y.dtype == x_dtype
        assert ((y.double() - truth).abs() <= allowed).all(), batch


@pytest.mark.parametrize("level", LEVELS, indirect=True)
def test_threads_do_not_change_a_bit(level, set_threads):
    _, matrix = packed_matrix(70, 576, torch.bfloat16)
    for batch in (1, 16, 17):
        x, results = normal(batch, 576, seed=2).bfloat16(), []
        for threads in (1, 2, 3):
            set_threads(threads)
            results.append(level.packed_product(x, *matrix))
        assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_behind_the_values(level, dtype):
    """The values end where the memory does: to read one byte more ends the process."""
    W, (values, mask, _) = packed_matrix(4, 64, dtype, share=0.1)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(whole.data_ptr() + page), ctypes.c_size_t(page), 0) == 0
    size = values.numel() * values.element_size()
    moved = whole[page - size : page].view(dtype).view(values.shape)
    moved.copy_(values)
    assert torch.equal(level.unpack(moved, mask, cols=64), W)
    for batch in (1, 16):
        x = normal(batch, 64, seed=3).to(dtype)
        assert torch.equal(level.packed_product(x, moved, mask), level.packed_product(x, values, mask))


def test_matrices_without_columns_give_zeros(level):
    y = level.packed_product(torch.zeros(17, 0), torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.uint8))
    assert torch.equal(y, torch.zeros(17, 3))


def test_tensors_that_do_not_fit_are_refused(level):
    """Their memory would be read beyond its end."""
    _, (values, mask, _) = packed_matrix(8, 64, torch.float32)
    x = normal(2, 64)
    for arguments in (
        (normal(2, 96), values, mask),
        (x, values, mask[:, :4]),
        (x, values[:4], mask),
        (x, values, mask.short()),
        (x, values, mask, torch.zeros(3, dtype=torch.int64)),
    ):
        with pytest.raises((ValueError, TypeError), match="expected"):
            level.packed_product(*arguments)
    with pytest.raises((ValueError, TypeError), match="expected"):
        level.unpack(values[:4], mask, cols=64)
    with pytest.raises(ValueError, match="expected 0 <= first <= last <= 8, got 4 and 9"):
        level.unpack(values, mask, cols=64, first=4, last=9)
    assert level.packed_product(x[:0], values, mask).shape == (0, 8)
