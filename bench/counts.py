"""How many counts of a row its selection takes in the kernels: `python bench/counts.py`.

The bisection of `kernels/device.py`, row by row, on the scores that a solve of 30 steps at 60 % chooses by.
"""

from unittest import mock

import torch
from torch import Tensor

from sparsefw import frank_wolfe
from sparsefw.kernels import reference, selection

ROWS, STEPS = 64, 30


def order_key(score: Tensor) -> Tensor:
    """`device.order_key`, in int64."""
    bits = score.view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits < 0x80000000, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)


def counts(score: Tensor, k: int, positive: bool) -> Tensor:
    """Counts per row until exactly k reach the threshold, or all bits are known; (rows,)."""
    keys = order_key(score)
    if positive:
        keys = keys.masked_fill(score <= 0, 0)
    T = torch.ones(len(keys), dtype=torch.int64)
    n = (keys >= T[:, None]).sum(1)
    k, made, step = n.clamp(max=k), torch.ones_like(n), 1 << 31
    while step and (n > k).any():
        made += n > k
        reach = T + step
        m = (keys >= reach[:, None]).sum(1)
        higher = (m >= k) & (n > k)
        T, n, step = torch.where(higher, reach, T), torch.where(higher, m, n), step >> 1
    return made


def main() -> None:
    """Prints mean and maximum for rows of several lengths."""
    for d in (576, 1536, 4096):
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(2 * d, d, generator=generator) @ torch.randn(d, d, generator=generator) / d**0.5
        W, G, seen = torch.randn(ROWS, d, generator=generator), X.T @ X, []

        def spy(score, k, *, positive, seen=seen, **options):
            seen.append(counts(score, k, positive))
            return selection.select(score, k, positive=positive, **options)

        problem = frank_wolfe.pose(W, G, W.abs() * G.diagonal().sqrt(), int(0.4 * d))
        with mock.patch.object(reference, "select", spy):
            frank_wolfe.solve(problem, steps=STEPS)
        made = torch.cat(seen).double()
        print(f"d = {d}: {made.mean():.1f} counts a row, at most {int(made.max())}")


if __name__ == "__main__":
    main()
