"""A whole Frank-Wolfe iteration (product and row step) by shape and precision; bare is the library's product alone.

For a bf16 weight and bf16 products the row step reads and writes 26 bytes an entry, and the product does 2 d flops. On
a card that does f flops in the time of a byte, both one after the other take at least 1 + 13 f / d of the product's
time.
"""

import cost
import pytest
import torch
from bare import bare_product, operands, topk_step
from cost import Cost
from operations import WEIGHT, assert_equal_enough, cases, gram, measure, normal, numbers, row_state

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.definitions import RowState

THETAS = dict(theta=0.5, next_theta=0.6)
# Product and row step of each way. Only ways that do both are checked for correctness.
WAYS = {
    "torch": (cpu.product, cpu.row_step),
    "topk": (cpu.product, topk_step),
    "triton": (triton_ops.product, triton_ops.row_step),
    "bare": (bare_product, None),
}


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize(("way", "shape"), cases(WAYS), ids=str)
def test_iteration(benchmark, way, shape, precision):
    rows, d = shape
    k, G = int(0.4 * d), gram(d)
    W, diag = normal(rows, d, dtype=WEIGHT), G.diagonal().contiguous()
    backend = Backend(cpu, precision)
    G = backend.operand(G)
    V, warm = (cpu.lmo(normal(rows, d, seed=seed), k) for seed in (1, 2))
    R = cpu.product(W.masked_fill(warm, 0), G, precision=precision)
    E = backend.operand(W.masked_fill(V, 0))
    if way == "bare":
        E, G = operands(E, G, precision)
    product, step = WAYS[way]
    thetas = numbers(way, **THETAS)

    def fresh() -> tuple:
        # The step works in place: every call starts from the same state.
        return (row_state(W, diag, warm.float(), R.clone(), torch.empty_like(R), V.clone(), E.clone(), k),)

    def iteration(state: RowState, product=product, step=step, thetas=thetas) -> RowState:
        product(state.E, G, precision=precision, out=state.U)
        if step:
            step(state, **thetas)
        return state

    if step:
        expected = iteration(*fresh(), *WAYS["torch"], THETAS)
        assert_equal_enough(iteration(*fresh()).error, expected.error, 1e-3)
    parts = cost.product(rows, d, E=E.itemsize, G=G.itemsize), cost.row_step(rows, d, W=W.itemsize, E=E.itemsize)
    parts = parts if step else parts[:1]
    least = Cost(sum(part.flops for part in parts), sum(part.bytes for part in parts))
    measure(benchmark, iteration, least, unit=precision, setup=fresh)
