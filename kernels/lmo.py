"""lmo: choose the vertex of the mask polytope that keeps the k best scores of every row, or n of every m.

    score (rows, d) fp32     fixed (rows, d) bool or None     V (rows, d) bool

Exactly k entries of a row are kept; with `positive` fewer, if fewer scores are above 0. Equal scores go to the lower
index, -0.0 equals +0.0, a fixed entry counts as +inf, and NaN is an error.

`topk.py` says how the k-th best score is found. The search holds the keys of a row of up to 32768 entries in registers.
Of a longer row it holds the first 16384 keys in registers, and reads the other keys from the cache for every count. A
row of more than 4096 entries is read again after the search, when its entries are chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .definitions import check_budget
from .device import columns
from .launch import BOOL, FP32, check, check_matrix, interpreter_tile, launch_rows, platform, row_strides, warps
from .operation import ALL, Arguments, Cost, Size, launch, metadata, operation
from .topk import NAN_KEY, key_range, kth_key, load_budget, load_keys, lowest_key, take, take_of_groups

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.uint8, torch.int8)


def reference(
    score: Tensor,
    k: int | Tensor,
    *,
    group: int = 0,
    fixed: Tensor | None = None,
    positive: bool = False,
    check_nan: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the operation in plain torch, by sorting."""
    check_budget(score.shape, k, group)
    if check_nan and score.isnan().any():
        raise ValueError("score: contains NaN")
    if fixed is not None:
        score = score.masked_fill(fixed, torch.inf)
    units = score.reshape(-1, group) if group else score
    # Adding +0 makes +0 of -0.
    order = (units + 0.0).sort(dim=1, descending=True, stable=True).indices
    rank = order.argsort(dim=1)
    V = rank < (k[:, None] if isinstance(k, Tensor) else k)
    if positive:
        V &= units > 0
    V = V.view(score.shape)
    return V if out is None else out.copy_(V)


def cost(score: Tensor, fixed: Tensor | None = None) -> Cost:
    """Read the scores and `fixed`, and write V."""
    return Cost(0, score.numel() * (score.itemsize + 1 + (fixed is not None)))


def example(size: Size, *, group: int = 0, fixed: bool = False) -> Arguments:
    """Keep two of five normal scores, or half of each group. With `fixed` only positive scores are kept."""
    options = dict(fixed=size.mask(seed=1), positive=True) if fixed else {}
    # A check for NaN would wait for the GPU, and a solve makes none.
    return dict(score=size.matrix(), k=group // 2 or int(0.4 * size.d), group=group, check_nan=False, **options)


def library(score: Tensor, k: int, *, group: int = 0, **_: object) -> Tensor:
    """Do the operation by `torch.topk` and a scatter, except that ties go to any of the equal scores."""
    units = score.reshape(-1, group or score.shape[1])
    return torch.zeros_like(units, dtype=torch.bool).scatter_(1, units.topk(k, dim=1).indices, True).view(score.shape)


def configuration(rows: int, d: int, group: int) -> dict[str, int]:
    """Choose tile sizes and launch options: BLOCK_R rows, chunks of BLOCK_D columns, SEARCH_D keys in registers."""
    width = triton.next_power_of_2(padded_d(d, group))
    if platform() == "interpreter":
        tile = interpreter_tile(rows, width)
        return tile | dict(SEARCH_D=tile["BLOCK_D"])
    if width <= 4096 or group:
        BLOCK_D = max(min(width, 1024 if group else 4096), triton.next_power_of_2(max(group, 1)))
        tile = dict(BLOCK_R=max(1, 1024 // BLOCK_D), BLOCK_D=BLOCK_D, SEARCH_D=BLOCK_D)
        return tile | dict(num_warps=warps(max(4, BLOCK_D // 512)))
    # A thread has 16 keys, or 32 keys of a row of up to 32768. With more keys some versions of the compiler spill.
    search = width if width <= 32768 else 16384
    return dict(BLOCK_R=1, BLOCK_D=4096, SEARCH_D=search, num_warps=warps(min(32, width // 512)))


def padded_d(d: int, group: int) -> int:
    """Return the length of a row after each group is padded to a power of two, see `device.columns`."""
    return d // group * triton.next_power_of_2(group) if group else d


def selection_options(d: int, k: int | Tensor, group: int, config: dict[str, int]) -> dict[str, object]:
    """Return the arguments that describe a selection to a kernel, except for tensors and tile sizes."""
    return dict(
        d=d,
        padded_d=padded_d(d, group),
        stride_k=k.stride(0) if isinstance(k, Tensor) else 0,
        PER_ROW=isinstance(k, Tensor),
        GROUP=group,
        PADDED=triton.next_power_of_2(group) if group else 0,
        ONE_CHUNK=padded_d(d, group) <= config["BLOCK_D"] == config["SEARCH_D"],
        WHOLE=d <= config["SEARCH_D"],
    )


@triton.jit(launch_metadata=metadata(cost), do_not_specialize=["k"])
def _lmo_kernel(
    SCORE, FIXED, V, NAN, k, rows, d, padded_d,
    stride_sr, stride_sd, stride_fr, stride_fd, stride_vr, stride_vd, stride_k,
    POSITIVE: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr,
    ONE_CHUNK: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SEARCH_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid_r = row < rows
    row = row.to(tl.int64)
    SCORE += row[:, None] * stride_sr
    if FIXED is not None:
        FIXED += row[:, None] * stride_fr
    V += row[:, None] * stride_vr
    scores = SCORE, FIXED, d, valid_r, stride_sd, stride_fd, lowest_key(POSITIVE)

    if GROUP:
        nan = tl.zeros((BLOCK_R,), tl.int1)
        for start in range(0, padded_d, BLOCK_D):
            keys = load_keys(scores, start, BLOCK_D, GROUP, PADDED)
            nan = nan | (tl.max(keys, axis=1) == NAN_KEY)
            chosen = take_of_groups(keys, k, GROUP, PADDED, BLOCK_R, BLOCK_D)
            column, _, valid = columns(start, d, valid_r, BLOCK_D, GROUP, PADDED, 16)
            tl.store(V + column[None, :].to(tl.int64) * stride_vd, chosen, mask=valid)
    else:
        budget = load_budget(k, row, valid_r, stride_k, PER_ROW, BLOCK_R)
        first_keys = load_keys(scores, 0, SEARCH_D)
        ends, budget, high = key_range(budget, first_keys, scores, WHOLE)
        nan = high == NAN_KEY
        threshold, ties_kept, tied = kth_key(ends, budget, first_keys, scores, WHOLE)
        passed = tl.zeros((BLOCK_R,), tl.int32)
        for start in range(0, d, BLOCK_D):
            # Keys are loaded again, since registers cannot hold those of a long row and the running count of ties.
            keys = first_keys if ONE_CHUNK else load_keys(scores, start, BLOCK_D)
            chosen, passed = take(keys, threshold, ties_kept, tied, passed)
            column, _, valid = columns(start, d, valid_r, BLOCK_D)
            tl.store(V + column[None, :].to(tl.int64) * stride_vd, chosen, mask=valid)
    tl.store(NAN + row, nan, mask=valid_r)


def check_selection(rows: int, d: int, k: int | Tensor, group: int, fixed: Tensor | None, like: Tensor) -> None:
    """Raise unless k, group and fixed describe a selection from a (rows, d) matrix."""
    check_budget(torch.Size((rows, d)), k, group)
    if group > 32:
        raise ValueError(f"group: expected at most 32, got {group}")
    if isinstance(k, Tensor):
        check("k", k, (rows,), INTEGERS, like)
    if fixed is not None:
        check("fixed", fixed, (rows, d), BOOL, like)


@operation(
    reference, cost, example, settings={"": {}, "2:4": dict(group=4)}, library=library,
    # Ties do not change the sum of the kept scores, and any other choice changes it by more than the tolerance.
    result=lambda arguments, V: ((arguments["score"].double() * V).sum(1),), tolerance=1e-12,
    launches=(*(launch(ALL, d=d, fixed=True) for d in (14336, 28672, 65536)), launch(ALL, group=32)),
)  # fmt: skip
def lmo(
    score: Tensor,
    k: int | Tensor,
    *,
    group: int = 0,
    fixed: Tensor | None = None,
    positive: bool = False,
    check_nan: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Choose the vertex that keeps the k best scores of every row.

    Args:
        score: (rows, d) fp32, any strides.
        k: number of kept entries of a row, an int or an int tensor (rows,). With `group` it is an int, the number of
            kept entries of a group.
        group: 0 for whole rows, m for n:m; up to 32.
        fixed: (rows, d) bool, True for entries whose score counts as +inf.
        positive: whether to keep only scores above 0.
        check_nan: whether to raise if a score is NaN, for which the host waits for the kernel.
        out: (rows, d) bool, written and returned; allocated when None.

    Raises:
        ValueError, TypeError: an argument does not fit this description, or `check_nan` is set and a score is NaN, in
            which case `out` has been written.
    """
    rows, d = check_matrix("score", score, FP32)
    check_selection(rows, d, k, group, fixed, score)
    if out is None:
        out = torch.empty(rows, d, dtype=torch.bool, device=score.device)
    check("out", out, (rows, d), BOOL, score)
    if out.numel() == 0:
        return out
    nan = torch.empty(rows, dtype=torch.bool, device=score.device)
    config = configuration(rows, d, group)
    launch_rows(
        _lmo_kernel, config, score, fixed, out, nan, k,
        **row_strides(sr=score, fr=fixed, vr=out),
        stride_sd=score.stride(1), stride_fd=0 if fixed is None else fixed.stride(1), stride_vd=out.stride(1),
        POSITIVE=positive, **selection_options(d, k, group, config),
    )  # fmt: skip
    if check_nan and bool(nan.any()):
        raise ValueError("score: contains NaN")
    return out
