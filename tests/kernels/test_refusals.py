"""What a launcher cannot handle is refused, by the name of the argument."""

import pytest
import torch
from helpers.kernel_inputs import DEVICE, row_state

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend

Z, ONES, MASK = torch.zeros(3, 4), torch.ones(4), torch.zeros(3, 4, dtype=torch.bool)
SQUARE, ROWS, INDEX = torch.zeros(4, 4), torch.zeros(3), torch.arange(3)
BITS = torch.zeros(3, 2, dtype=torch.uint8)
VALID = {
    "product": dict(E=Z, G=SQUARE),
    "gram_accumulate": dict(G=SQUARE, X=torch.zeros(5, 4)),
    "cross_accumulate": dict(B=Z, D=torch.zeros(5, 3), X=torch.zeros(5, 4)),
    "mirror_lower": dict(G=SQUARE),
    "lmo": dict(score=Z, k=2),
    "row_swaps": dict(W=Z, G=SQUARE, R=Z, V=MASK, limit=1),
    "conjugate_step": dict(Z=Z, R=Z, P=Z, U=Z, rz=ROWS, enough=ROWS, inverse=ONES, mask=MASK),
    "removed": dict(W=Z, mask=MASK),
    "begin_fit": dict(W=Z, start=Z, mask=MASK),
    "row_errors": dict(W=Z, R=Z),
    "take_rows": dict(X=Z, Y=Z, taken=MASK[:, 0].clone()),
    "candidates": dict(Z=Z, R=Z, mask=MASK, inverse=ONES, root=ONES, margin=ROWS),
    "bound_scores": dict(W=Z, R=Z, M=Z, damping=ONES),
    "bound_sums": dict(score=Z, M=Z, V=MASK),
    "round_mask": dict(M=Z, saliency=Z, k=2),
    "adam_step": dict(W=ONES, gradient=ONES, index=INDEX, weight=ROWS, m=ROWS, v=ROWS, rate=0.1, step=1),
    "packed_product": dict(x=torch.zeros(5, 16), values=Z, mask=BITS),
    "unpack": dict(values=Z, mask=BITS, cols=16),
}
TURNED, HALF, EVERY_SECOND = torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(6)[::2]
CASES = [
    ("product", dict(E=Z.int()), TypeError, "E: expected .*float32.*got torch.int32"),
    ("product", dict(E=None), TypeError, "E: expected a tensor, got NoneType"),
    ("product", dict(G=torch.zeros(4, 4, device="meta")), ValueError, "G: expected device"),
    ("product", dict(out=TURNED), ValueError, r"out: expected shape \(3, 4\)"),
    ("product", dict(precision="fp8"), ValueError, "precision: expected one of ieee, tf32x3, tf32, bf16, got 'fp8'"),
    ("product", dict(add=True), ValueError, "add: needs out"),
    ("gram_accumulate", dict(X=torch.zeros(2, 5, 4)), ValueError, "X: expected two dimensions"),
    ("gram_accumulate", dict(precision="bf16"), ValueError, "precision: expected ieee or tf32, got 'bf16'"),
    ("cross_accumulate", dict(D=torch.zeros(5, 3, dtype=torch.bfloat16)), TypeError, "D: expected torch.float32"),
    ("mirror_lower", dict(G=Z), ValueError, r"G: expected shape \(4, 4\), got \(3, 4\)"),
    ("lmo", dict(k=5), ValueError, "k: expected 0 to 4, got 5"),
    ("lmo", dict(k=3, group=2), ValueError, "k: expected 0 to 2, got 3"),
    ("lmo", dict(group=3), ValueError, "group: expected a divisor of d = 4, got 3"),
    ("lmo", dict(k=torch.ones(4, dtype=torch.int32)), ValueError, "k: expected an int, or 3 integers"),
    ("lmo", dict(score=torch.zeros(3, 64), group=64), ValueError, "group: expected at most 32"),
    ("row_swaps", dict(R=TURNED.T), ValueError, "R: expected contiguous rows"),
    ("row_swaps", dict(limit=-1), ValueError, "limit: expected at least 0, got -1"),
    ("conjugate_step", dict(enough=EVERY_SECOND), ValueError, "enough: expected contiguous entries"),
    ("begin_fit", dict(start=TURNED), ValueError, r"start: expected shape \(3, 4\)"),
    ("take_rows", dict(Y=HALF), TypeError, "Y: expected torch.float32"),
    ("take_rows", dict(taken=MASK[:, 0]), ValueError, "taken: expected contiguous entries"),
    ("bound_scores", dict(damping=ROWS), ValueError, r"damping: expected shape \(4,\)"),
    ("adam_step", dict(gradient=HALF[0]), TypeError, "gradient: expected torch.float32"),
    ("adam_step", dict(index=ROWS), TypeError, "index: expected torch.int32 or torch.int64"),
    ("adam_step", dict(m=ONES), ValueError, r"m: expected shape \(3,\)"),
    ("adam_step", dict(v=EVERY_SECOND), ValueError, "v: expected contiguous entries"),
    ("packed_product", dict(x=Z), ValueError, r"mask: expected shape \(3, 1\), got \(3, 2\)"),
    ("packed_product", dict(x=torch.zeros(16, 5).T), ValueError, "x: expected contiguous entries"),
    ("packed_product", dict(starts=INDEX), ValueError, r"values: expected shape \(12,\)"),
    ("packed_product", dict(values=ONES, starts=INDEX), ValueError, r"starts: expected shape \(4,\)"),
    ("unpack", dict(values=Z.int()), TypeError, "values: expected .*float32.*got torch.int32"),
    ("unpack", dict(values=TURNED.T), ValueError, "values: expected contiguous entries"),
    ("unpack", dict(mask=BITS.bool()), TypeError, "mask: expected torch.uint8"),
    ("unpack", dict(last=4), ValueError, "first, last: expected rows of 3, got 0 to 4"),
]


def moved(arguments):
    """Tensors on the device, with the gaps that `to` would close; those on the meta device stay there."""
    return {
        name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)
        if isinstance(x, torch.Tensor) and x.device.type != "meta"
        else x
        for name, x in arguments.items()
    }


@pytest.mark.parametrize(
    ("operation", "change", "error", "match"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_arguments(operation, change, error, match):
    with pytest.raises(error, match=match):
        getattr(triton_ops, operation)(**moved(VALID[operation] | change))


@pytest.mark.parametrize("operation", VALID)
def test_the_arguments_that_cases_change_are_valid(operation):
    getattr(triton_ops, operation)(**moved(VALID[operation]))


@pytest.mark.parametrize(
    ("change", "numbers", "error", "match"),
    [
        (dict(diag=ROWS), {}, ValueError, r"diag: expected shape \(4,\)"),
        (dict(M=TURNED.T), {}, ValueError, "M: expected contiguous rows"),
        (dict(eta=EVERY_SECOND), {}, ValueError, "eta: expected contiguous entries"),
        ({}, dict(theta=ROWS, next_theta=torch.zeros(())), ValueError, r"theta: expected shape \(\)"),
        ({}, dict(eta=torch.zeros(())), TypeError, "theta: expected a tensor, got float"),
    ],
)
def test_states(change, numbers, error, match):
    state = row_state(*(x.to(DEVICE, copy=True) for x in (Z, ONES, Z, Z, Z, MASK, Z)), 2)
    vars(state).update(moved(change))
    with pytest.raises(error, match=match):
        triton_ops.row_step(state, **moved(numbers))


@pytest.mark.parametrize("precision", ["fp32", "", None, "IEEE"])
def test_precisions_and_budgets_by_any_kernel(precision):
    for call in (lambda: Backend(cpu, precision), lambda: cpu.round_operand(Z, precision)):
        with pytest.raises(ValueError, match=f"precision: expected one of ieee, tf32x3, tf32, bf16, got {precision!r}"):
            call()
    for k, group, match in ((5, 0, "k: expected 0 to 4"), (1, 3, "group: expected a divisor")):
        with pytest.raises(ValueError, match=match):
            cpu.lmo(Z, k, group=group)
