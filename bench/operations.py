"""The operations that benchmarks measure: inputs of any size, the ways to do each, the check of its result, its cost.

On a GPU the shapes are those of Llama-3.1-8B, Llama-3-70B and Llama-3.1-405B, with the rows of one solve.
Without a GPU they are tiny, and the Triton kernels run in the interpreter, whose times say nothing about a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from bare import bare_product, topk_lmo
from timing import FLUSH, GPU
from torch import Tensor
from torch.nn import functional as F

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.cpu import packed as packed_cpu
from sparsefw.kernels.definitions import RowState
from sparsefw.solver.frank_wolfe import mask_error

DEVICE = "cuda" if GPU else "cpu"
# (rows, d): projections of 8B (q, down), of 70B (q, down) and of 405B (q, down).
LLAMA = [(4096, 4096), (4096, 14336), (8192, 8192), (4096, 28672), (4096, 16384), (2048, 53248)]
TINY = [(48, 96), (40, 131)]
SHAPES = LLAMA if GPU else TINY
TOKENS = 8192 if GPU else 100
PRECISION = "bf16" if GPU else "ieee"
WEIGHT = torch.bfloat16 if GPU else torch.float32

# Tolerances of products by precision, relative to the largest value.
PRECISIONS = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 2e-3, "bf16": 2e-2}
# Tensor cores cut off low bits of a sum, and the library may sum in parts. Over 16,384 tokens the difference is larger
# than that of rounding alone.
SUMS = 2.0**-14
# Rows that are compared at once: float64 copies of the largest matrices would not fit.
PIECE = 1024
SWAPS = 10
THETAS = dict(theta=0.5, next_theta=0.6)

COMPILE = "torch.compile"
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cost:
    """The least work of a call: flops, and bytes that pass between the chip and its memory.

    Each operand counts once, as if later reads of it came from a cache. The formula is in the docstring of
    each kernel; comparisons do not count as flops.
    """

    flops: int
    bytes: int

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Compute the least time of a call at these roofs, in seconds."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Operation:
    """An operation at one size.

    Attributes:
        ways: functions of the arguments by name; each returns the tensors of its result. The next call may overwrite
            them. "torch" is cpu.py, COMPILE the same by torch's compiler, "triton" the kernel; others are rivals.
        cost: least work of a call.
        check: asserts that one result is near enough to another.
        fresh: returns the arguments of a call; a way may change them.
        unit: precision of the products whose roof bounds the flops; None for operations bound by bytes.
    """

    ways: dict[str, Callable[..., Tensors]]
    cost: Cost
    check: Callable[[Tensors, Tensors], None]
    fresh: Callable[[], tuple] = tuple
    unit: str | None = None

    def result(self, way: str) -> Tensors:
        """Compute the result of a way, as a copy."""
        return tuple(x.clone() for x in self.ways[way](*self.fresh()))


def ways(name: str, call: Callable[..., Tensors], **rivals: Callable) -> dict[str, Callable[..., Tensors]]:
    """Make the ways to do the operation `name`: `call` takes an implementation of it and the fresh arguments."""
    plain = getattr(cpu, name)
    implementations = {"torch": plain, "triton": getattr(triton_ops, name)} | rivals
    if GPU:
        # torch's compiler takes seconds to import: not before it is called.
        made = cache(lambda: torch.compile(plain, dynamic=False))
        implementations[COMPILE] = lambda *args, **kwargs: made()(*args, **kwargs)
    return {label: partial(call, implementation) for label, implementation in implementations.items()}


def assert_near(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare two tensors; the tolerance is relative to the largest expected value."""
    difference, largest = 0.0, 0.0
    for a, b in zip(got.split(PIECE), expected.split(PIECE), strict=True):
        difference = max(difference, (a.double() - b.double()).abs().max().item())
        largest = max(largest, b.double().abs().max().item())
    assert difference <= tolerance * largest, f"differs by {difference}"


def near(*tolerances: float, lower: bool = False) -> Callable[[Tensors, Tensors], None]:
    """Make a check of the first tensors of a result, one for each tolerance, or of their lower triangles."""

    def check(got: Tensors, expected: Tensors) -> None:
        for a, b, tolerance in zip(got, expected, tolerances, strict=False):
            assert_near(*(x.tril() if lower else x for x in (a, b)), tolerance)

    return check


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Draw standard normal numbers from a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def gram(d: int) -> Tensor:
    """Make the Gram matrix (d, d) of random inputs."""
    X = normal(TOKENS, d)
    return cpu.mirror_lower(cpu.gram_accumulate(torch.zeros(d, d, device=DEVICE), X))


@cache
def thetas(implementation: Callable) -> dict[str, float | Tensor]:
    """Make the scalars of a step: tensors for the Triton kernel on a GPU, as in a solve; floats for other ways."""
    stored = GPU and implementation is triton_ops.row_step
    return {name: torch.tensor(value, device=DEVICE) if stored else value for name, value in THETAS.items()}


def budget(d: int, group: int) -> tuple[int, int]:
    """Choose k = 0.4 d; or k = 2 of every 4, and d rounded down to a multiple of 4. Returns (k, d)."""
    return (2, d - d % group) if group else (int(0.4 * d), d)


def product(rows: int, d: int, *, precision: str = PRECISION) -> Operation:
    """Multiply U = E G. The way "bare" is the library's product of two operands of one type."""
    E, G = normal(rows, d, dtype=WEIGHT), gram(d)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    G = G.to(dtype)
    of_one_type, out = (E.to(dtype), G), torch.empty(rows, d, device=DEVICE)
    times, unit = (3, "tf32") if precision == "tf32x3" else (1, precision)
    # U is written in fp32.
    least = Cost(times * 2 * rows * d * d, rows * d * (E.itemsize + 4) + d * d * G.itemsize)

    def call(multiply: Callable) -> Tensors:
        pair = of_one_type if multiply is bare_product else (E, G)
        return (multiply(*pair, precision=precision, out=out),)

    return Operation(ways("product", call, bare=bare_product), least, near(PRECISIONS[precision]), unit=unit)


def gram_accumulate(tokens: int, d: int) -> Operation:
    """Add X^T X to the lower triangle of G. The way "bare" is the library's full square."""
    X = normal(tokens, d, dtype=WEIGHT)
    square = lambda G, X: bare_product(X.T, X, precision="ieee")  # noqa: E731
    made = ways("gram_accumulate", lambda accumulate, G: (accumulate(G, X),), bare=square)
    # Products of one triangle, which is read and written.
    least = Cost(tokens * d * (d + 1), tokens * d * X.itemsize + 4 * d * (d + 1))
    return Operation(made, least, near(SUMS, lower=True), lambda: (torch.zeros(d, d, device=DEVICE),), PRECISION)


def cross_accumulate(tokens: int, rows: int, d: int) -> Operation:
    """Add D^T X to B. The way "bare" is the library's product."""
    D, X = normal(tokens, rows, dtype=WEIGHT), normal(tokens, d, dtype=WEIGHT, seed=1)
    multiply = lambda B, D, X: bare_product(D.T, X, precision="ieee")  # noqa: E731
    made = ways("cross_accumulate", lambda accumulate, B: (accumulate(B, D, X),), bare=multiply)
    least = Cost(2 * tokens * rows * d, tokens * (rows + d) * X.itemsize + 8 * rows * d)
    return Operation(made, least, near(SUMS), lambda: (torch.zeros(rows, d, device=DEVICE),), PRECISION)


def mirror_lower(d: int) -> Operation:
    """Copy the lower triangle of G to the upper one."""
    G = normal(d, d)
    made = ways("mirror_lower", lambda mirror: (mirror(G),))
    # One triangle is read, the other one is written, without the diagonal.
    return Operation(made, Cost(0, 4 * d * (d - 1)), near(0.0))


def lmo(rows: int, d: int, *, group: int = 0) -> Operation:
    """Select the k best scores of every row, or n of every m. The way "topk" is `torch.topk` and a scatter."""
    k, d = budget(d, group)
    score, out = normal(rows, d), torch.empty(rows, d, dtype=torch.bool, device=DEVICE)

    def call(select: Callable) -> Tensors:
        # As in a solve. A check for NaN would wait for the GPU, and the wait would count. `topk` makes no check.
        options = {} if select is topk_lmo else {"check_nan": False}
        return (select(score, k, group=group, out=out, **options),)

    return Operation(ways("lmo", call, topk=topk_lmo), Cost(0, 5 * rows * d), near(0.0))


def row_step(rows: int, d: int, *, group: int = 0, target_gap: bool = False) -> Operation:
    """Make a Frank-Wolfe step of weights, or of fp32 weights with a target gap."""
    k, d = budget(d, group)
    W, G = normal(rows, d, dtype=torch.float32 if target_gap else WEIGHT), gram(d)
    gap = 0.1 * normal(rows, d, seed=5) if target_gap else None
    diag = G.diagonal().contiguous()
    V, warm = (cpu.lmo(normal(rows, d, seed=seed), k, group=group) for seed in (1, 2))
    R, U = (cpu.product(W.masked_fill(mask, 0), G, precision=PRECISION) for mask in (warm, V))

    def fresh() -> tuple:
        # A step works in place: every call starts from the same state.
        E = torch.empty(rows, d, dtype=WEIGHT, device=DEVICE)
        eta, error = torch.empty(2, rows, device=DEVICE).unbind()
        state = W, diag, warm.float(), R.clone(), U.clone(), V.clone(), E, k, eta, error
        return (RowState(*state, group=group, target_gap=gap),)

    def call(step: Callable, state: RowState) -> Tensors:
        step(state, **thetas(step))
        return state.error, state.V, state.eta, state.M, state.R, state.E

    def check(got: Tensors, expected: Tensors) -> None:
        assert_near(got[0], expected[0], 1e-4)
        assert (got[1] != expected[1]).float().mean() < 1e-4

    # W, M, R, U, V and the gap are read; M, R, V, E are written.
    entry = W.itemsize + 13 + 4 * target_gap + 9 + WEIGHT.itemsize
    least = Cost(30 * rows * d, rows * d * entry)
    return Operation(ways("row_step", call), least, check, fresh)


def row_swaps(rows: int, d: int, *, group: int = 0) -> Operation:
    """Make the best 1-swaps of every row, as after Frank-Wolfe."""
    k, d = budget(d, group)
    W, G = normal(rows, d, dtype=WEIGHT), gram(d)
    # From Wanda's mask every row has enough swaps to make.
    V = cpu.lmo(W.float().abs() * G.diagonal().sqrt(), k, group=group)
    R = cpu.product(W.masked_fill(V, 0), G, precision=PRECISION)

    def call(swap: Callable, R: Tensor, V: Tensor) -> Tensors:
        swap(W, G, R, V, SWAPS, group=group)
        return R, V

    def check(got: Tensors, expected: Tensors) -> None:
        # Swaps that are equal up to rounding may be made in either order, so the final errors are compared.
        assert_near(*(mask_error(W.float(), V, G).double().sum(0, keepdim=True) for _, V in (got, expected)), 1e-3)

    # W, R, V are read, R and V written; three rows of G for every swap. Every row is taken to make all swaps.
    least = Cost(30 * SWAPS * rows * d, rows * d * (W.itemsize + 10) + 12 * SWAPS * rows * d)
    return Operation(ways("row_swaps", call), least, check, lambda: (R.clone(), V.clone()))


def conjugate_step(rows: int, d: int) -> Operation:
    """Make a step of conjugate gradients without its product."""
    G = gram(d)
    inverse, mask = 1 / G.diagonal(), normal(rows, d, seed=3) > 0
    Z, R = (normal(rows, d, seed=seed) for seed in range(2))
    P = Backend(cpu, PRECISION).operand(normal(rows, d, seed=2))
    U = cpu.product(P, G, precision=PRECISION)

    def fresh() -> tuple:
        rz = torch.ones(rows, device=DEVICE)
        return Z.clone(), R.clone(), P.clone(), U, rz, 1e-12 * rz, inverse

    def call(step: Callable, *state: Tensor) -> Tensors:
        step(*state, mask=mask)
        return state[:3]

    # Z, R, P, U and the mask are read; Z, R, P are written.
    least = Cost(12 * rows * d, rows * d * (21 + 2 * P.itemsize))
    return Operation(ways("conjugate_step", call), least, near(1e-4, 1e-4, 1e-2), fresh)


def adam_step(rows: int, d: int) -> Operation:
    """Make a step of Adam on two of five entries, as a reconstruction does for every matrix."""
    W, gradient = (normal(rows * d, dtype=WEIGHT, seed=seed) for seed in range(2))
    index = torch.nonzero(normal(rows * d, seed=2) > 0.25).flatten().int()
    weight, zeros = W[index.long()].float(), torch.zeros(len(index), device=DEVICE)

    def call(step: Callable, *state: Tensor) -> Tensors:
        step(W, gradient, index, *state, rate=0.01, step=1)
        return (*state, W)

    # The index, the entries, m and v are read, the last three written; W and its gradient go over whole.
    least = Cost(12 * len(index), 28 * len(index) + 3 * W.nbytes)
    made = ways("adam_step", call)
    return Operation(made, least, near(1e-5, 1e-5, 1e-5, 1e-2), lambda: (weight.clone(), zeros.clone(), zeros.clone()))


def packed_product(rows: int, d: int, *, batch: int = 1) -> Operation:
    """Multiply x W^T, with two of five weights of W packed. The way "bare" is the library's product with the zeros.

    A call multiplies with copies of W one after the other. Together they do not fit into a cache.
    """
    W, x = normal(rows, d, dtype=WEIGHT), normal(batch, d, dtype=WEIGHT, seed=1)
    kept = cpu.lmo(W.float().abs(), int(0.4 * d))
    W.masked_fill_(~kept, 0)
    bits = F.pad(kept, (0, -d % 8)).view(rows, -1, 8) * 2 ** torch.arange(8, device=DEVICE)
    values, mask = W[kept].view(rows, -1), bits.sum(-1).to(torch.uint8)
    copies = max(1, FLUSH // W.nbytes) if GPU else 1
    dense, packed = ([[t.clone() for t in each] for _ in range(copies)] for each in ((W,), (values, mask)))
    made: dict[str, Callable[..., Tensors]] = {
        "torch": lambda: tuple(packed_cpu.packed_product(x, *matrix) for matrix in packed),
        "triton": lambda: tuple(triton_ops.packed_product(x, *matrix) for matrix in packed),
        "bare": lambda: tuple(F.linear(x, *matrix) for matrix in dense),
    }
    least = copies * (values.nbytes + mask.nbytes + batch * (rows + d) * x.itemsize)
    return Operation(made, Cost(2 * copies * batch * rows * d, least), near(1e-2))


def copy(size: int) -> Operation:
    """Copy bytes on the device, each read once and written once: the roof of bytes."""
    source = torch.ones(size, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return Operation({"torch": lambda: (target.copy_(source),)}, Cost(0, 2 * size), near(0.0))
