"""How often the kernels count a row's keys in a selection: `python bench/counts.py`.

It compares the search of `kernels/topk.py`, row by row, with bisection on the bits of the key, on the scores of a solve
of 30 steps at 60 %.
"""

from unittest import mock

import torch
from torch import Tensor

from sparsefw.kernels import cpu, topk, topk_torch
from sparsefw.solver import frank_wolfe

ROWS, STEPS = 64, 30
PATIENCE = topk.PATIENCE.value


def order_key(score: Tensor, positive: bool) -> Tensor:
    """`topk.candidate_key`, in int64, of scores without NaN."""
    # Adding 0 turns -0 into +0.
    bits = (score + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    keys = torch.where(bits < 0x80000000, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)
    return keys.masked_fill(score <= 0, 0) if positive else keys


def bisection(keys: Tensor, k: int) -> Tensor:
    """Counts per row (rows,) until exactly k keys reach a threshold, or all bits are known."""
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


def counts(keys: Tensor, k: int) -> Tensor:
    """Counts per row (rows,) of `topk.kth_key`, plus one for `topk.key_range`."""
    n, top = (keys > 0).sum(1), keys.amax(1) + 1
    k, T = n.clamp(max=k), torch.where(keys > 0, keys, 0xFFFFFFFF).amin(1)
    n_top, weight, rose, made = torch.zeros_like(n), torch.ones(len(n)), n < 0, torch.ones_like(n)
    while (running := (n > k) & (top - T > 1)).any():
        surplus, shortage = (n - k) * torch.where(rose, 1, weight), (k - n_top) * torch.where(rose, weight, 1)
        share = (
            surplus / (surplus + shortage).clamp(min=1e-30) if made.max() <= PATIENCE else torch.full_like(weight, 0.5)
        )
        made += running
        reach = T + ((top - T).float() * share).long()
        reach = torch.minimum(torch.maximum(reach, T + 1), top - 1)
        m = (keys >= reach[:, None]).sum(1)
        rises = m >= k
        weight, rose = torch.where(rises == rose, 0.5 * weight, 1), rises
        up, down = running & rises, running & ~rises
        T, n = torch.where(up, reach, T), torch.where(up, m, n)
        top, n_top = torch.where(down, reach, top), torch.where(down, m, n_top)
    return made


def main() -> None:
    """Print the mean and the maximum of counts per row, for rows of several lengths."""
    for d in (576, 1536, 4096):
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(2 * d, d, generator=generator) @ torch.randn(d, d, generator=generator) / d**0.5
        W, G, seen = torch.randn(ROWS, d, generator=generator), X.T @ X, {counts: [], bisection: []}

        def spy(score, k, *, positive, seen=seen, **options):
            for search, made in seen.items():
                made.append(search(order_key(score, positive), k))
            return topk_torch.select(score, k, positive=positive, **options)

        problem = frank_wolfe.make_problem(W, G, W.abs() * G.diagonal().sqrt(), int(0.4 * d))
        with mock.patch.object(cpu, "select", spy):
            frank_wolfe.solve(problem, steps=STEPS)
        for search, made in seen.items():
            counted = torch.cat(made).double()
            print(f"d = {d}: {counted.mean():.1f} {search.__name__} a row, at most {int(counted.max())}")


if __name__ == "__main__":
    main()
