"""How many counts of a row its topk_torch takes in the kernels: `python bench/counts.py`.

The search of `kernels/device.py`, row by row, and bisection on the bits of the key beside it, on the scores that a
solve of 30 steps at 60 % chooses by.
"""

from unittest import mock

import torch
from torch import Tensor

from sparsefw.kernels import cpu, device, topk_torch
from sparsefw.solver import frank_wolfe

ROWS, STEPS = 64, 30
PATIENCE = device.PATIENCE.value


def order_key(score: Tensor, positive: bool) -> Tensor:
    """`device.candidate_key`, in int64, of anything but NaN."""
    # 0 for -0, too.
    bits = (score + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    keys = torch.where(bits < 0x80000000, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)
    return keys.masked_fill(score <= 0, 0) if positive else keys


def bisection(keys: Tensor, k: int) -> Tensor:
    """Counts per row until exactly k reach a threshold, or all bits are known; (rows,)."""
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
    """Counts per row of `device.kth_key`, and one for `device.key_range`; (rows,)."""
    n, top = (keys > 0).sum(1), keys.amax(1) + 1
    k, T = n.clamp(max=k), torch.where(keys > 0, keys, 0xFFFFFFFF).amin(1)
    n_top, weight, rose, made = torch.zeros_like(n), torch.ones(len(n)), n < 0, torch.ones_like(n)
    while (running := (n > k) & (top - T > 1)).any():
        surplus, lack = (n - k) * torch.where(rose, 1, weight), (k - n_top) * torch.where(rose, weight, 1)
        part = surplus / (surplus + lack).clamp(min=1e-30) if made.max() <= PATIENCE else torch.full_like(weight, 0.5)
        made += running
        reach = T + ((top - T).float() * part).long()
        reach = torch.minimum(torch.maximum(reach, T + 1), top - 1)
        m = (keys >= reach[:, None]).sum(1)
        rises = m >= k
        weight, rose = torch.where(rises == rose, 0.5 * weight, 1), rises
        up, down = running & rises, running & ~rises
        T, n = torch.where(up, reach, T), torch.where(up, m, n)
        top, n_top = torch.where(down, reach, top), torch.where(down, m, n_top)
    return made


def main() -> None:
    """Prints mean and maximum for rows of several lengths."""
    for d in (576, 1536, 4096):
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(2 * d, d, generator=generator) @ torch.randn(d, d, generator=generator) / d**0.5
        W, G, seen = torch.randn(ROWS, d, generator=generator), X.T @ X, {counts: [], bisection: []}

        def spy(score, k, *, positive, seen=seen, **options):
            for search, found in seen.items():
                found.append(search(order_key(score, positive), k))
            return topk_torch.select(score, k, positive=positive, **options)

        problem = frank_wolfe.pose(W, G, W.abs() * G.diagonal().sqrt(), int(0.4 * d))
        with mock.patch.object(cpu, "select", spy):
            frank_wolfe.solve(problem, steps=STEPS)
        for search, found in seen.items():
            made = torch.cat(found).double()
            print(f"d = {d}: {made.mean():.1f} {search.__name__} a row, at most {int(made.max())}")


if __name__ == "__main__":
    main()
