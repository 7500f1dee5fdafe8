"""How many passes over a row a selection takes in the kernels: `python bench/counts.py`.

A pass is a count of the keys that reach a threshold, or the look-up of one key (`kernels/topk.py`). On the scores of a
solve, row by row, it compares the search from the last step's threshold, as in `row_step`; the search anew, as in
`lmo`; and bisection on the bits of the key. Without arguments the scores are those of random layers. With the arguments
of `sparsefw.run` they are those of the run:

    python bench/counts.py --model FOLDER --dataset TEXT --nsamples 32 --seqlen 512 --output /tmp/pruned
"""

import math
import sys
from collections import defaultdict
from unittest import mock

import torch
from torch import Tensor

from sparsefw.kernels import cpu, topk
from sparsefw.run import main as run
from sparsefw.solver import frank_wolfe

ROWS, STEPS = 16, 30
# Rows of up to 256 entries share a program with three others, for which it waits.
TILE = 4
PATIENCE, SPREAD, LEAST_KEY, ZERO_KEY, INF_KEY, NAN_KEY = (
    getattr(topk, name).value for name in ("PATIENCE", "SPREAD", "LEAST_KEY", "ZERO_KEY", "INF_KEY", "NAN_KEY")
)


def order_key(score: Tensor, positive: bool = False) -> Tensor:
    """`topk.candidate_key`, in int64, of scores without NaN."""
    # Adding 0 turns -0 into +0.
    bits = (score + 0.0).view(torch.int32).long() & NAN_KEY
    keys = torch.where(bits < ZERO_KEY, bits ^ ZERO_KEY, bits ^ NAN_KEY)
    return keys.masked_fill(score <= 0, 0) if positive else keys


def key_score(keys: Tensor) -> Tensor:
    """`topk.key_score`."""
    bits = torch.where(keys >= ZERO_KEY, keys ^ ZERO_KEY, keys ^ NAN_KEY)
    return torch.where(bits < ZERO_KEY, bits, bits - 2 * ZERO_KEY).int().view(torch.float32)


def bisection(keys: Tensor, k: int) -> Tensor:
    """Passes per row (rows,) until exactly k keys reach a threshold, or all bits are known."""
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


def anew(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Passes and thresholds per row (rows,) of `topk.key_range` and `topk.kth_key`."""
    n, top, T = (keys > 0).sum(1), keys.amax(1) + 1, torch.where(keys > 0, keys, NAN_KEY).amin(1)
    return search(keys, T, n, top, torch.zeros_like(n), n.clamp(max=k))


def from_threshold(keys: Tensor, k: int, start: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    """Passes and thresholds per row (rows,) of `topk.bracket` and `topk.kth_key`; `start` (rows,) int64 are keys."""
    least = ZERO_KEY + 1 if positive else LEAST_KEY
    reach = start.clamp(least, INF_KEY)
    m = (keys >= reach[:, None]).sum(1)
    T, n = torch.where(m >= k, reach, least), torch.where(m >= k, m, 0)
    top, n_top = torch.where(m >= k, INF_KEY + 1, reach), torch.where(m >= k, -1, m)
    return search(keys, T, n, top, n_top, torch.full_like(n, k))


def search(keys: Tensor, T: Tensor, n: Tensor, top: Tensor, n_top: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """`topk.kth_key`: passes per row (rows,), one of them for the bracket that is given, and thresholds."""
    stride, weight, rose, made = torch.zeros(len(n)), torch.ones(len(n)), n_top < 0, torch.ones_like(n)
    while (running := (n != k) & (top - T > (n > 0))).any():
        surplus, shortage = (n - k).clamp(min=0).float(), (k - n_top).float()
        stride = torch.maximum(4 * stride, torch.where(n == 0, shortage, surplus) * (SPREAD / keys.shape[1]))
        stride = stride.clamp(max=2.0**31)
        jump = torch.minimum(stride.long(), top - T)
        surplus, shortage = surplus * torch.where(rose, 1, weight), shortage * torch.where(rose, weight, 1)
        share = surplus / (surplus + shortage).clamp(min=1e-30)
        share = torch.where(made <= PATIENCE, share, 0.5)
        between = T + ((top - T).float() * share).long()
        reach = torch.where(n == 0, top - jump, torch.where(n_top < 0, T + jump, between))
        reach = torch.minimum(torch.maximum(reach, T + (n > 0)), top - 1)
        drops, adds = running & (n == k + 1), running & (n_top == k - 1) & (n != k + 1)
        lowest = torch.where(keys >= T[:, None], keys, NAN_KEY).amin(1)
        highest = torch.where(keys < top[:, None], keys, 0).amax(1)
        nearest = torch.minimum(torch.maximum(torch.where(drops, lowest, highest), T), top - 1)
        T, top = torch.where(drops, nearest, T), torch.where(adds, nearest + 1, top)
        reach = torch.where(drops, nearest + 1, torch.where(adds, nearest, reach))
        made += running.long() + (drops | adds)
        m = (keys >= reach[:, None]).sum(1)
        rises = m >= k
        weight, rose = torch.where(rises == rose, 0.5 * weight, 1), rises
        up, down = running & rises, running & ~rises
        T, n = torch.where(up, reach, T), torch.where(up, m, n)
        top, n_top = torch.where(down, reach, top), torch.where(down, m, n_top)
    return made, T


class Passes:
    """Passes of each search on the first rows of every row step, by the length of a row."""

    def __init__(self) -> None:
        self.made: defaultdict[tuple[int, str], list[Tensor]] = defaultdict(list)
        self.row_step = cpu.row_step

    def __call__(self, W, diag, M, R, U, V, E, k, *, next_theta, threshold, group=0, **options):
        """`cpu.row_step`; counts, and replaces the threshold as the kernel does."""
        given = dict(next_theta=next_theta, threshold=threshold, group=group) | options
        numbers = self.row_step(W, diag, M, R, U, V, E, k, **given)
        if group or isinstance(k, Tensor) or options.get("fixed") is not None:
            return numbers
        # U has half of the next scores.
        keys, positive, first = order_key(2 * U[:ROWS], next_theta < 1), next_theta < 1, threshold[:ROWS]
        passes, T = from_threshold(keys, k, order_key(first), positive)
        threshold[:ROWS] = key_score(T)
        for name, made in (("from a threshold", passes), ("anew", anew(keys, k)[0]), ("bisection", bisection(keys, k))):
            self.made[W.shape[1], name].append(made)
        return numbers

    def table(self) -> str:
        """Passes of each search for each length of a row, in Markdown."""
        lines = [f"| d | search | mean | of the slowest of {TILE} rows | most |", "| --- | --- | --- | --- | --- |"]
        for (d, name), made in sorted(self.made.items()):
            rows = torch.cat(made).double()
            slowest = torch.cat([each[: len(each) // TILE * TILE].view(-1, TILE).amax(1) for each in made]).double()
            lines.append(f"| {d} | {name} | {rows.mean():.1f} | {slowest.mean():.1f} | {int(rows.max())} |")
        return "\n".join(lines)


def solve_random_layers() -> None:
    """Solves of one random layer for each of several lengths of a row."""
    for d in (576, 1536, 4096):
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(2 * d, d, generator=generator) @ torch.randn(d, d, generator=generator) / math.sqrt(d)
        W, G = torch.randn(ROWS, d, generator=generator), X.T @ X
        problem = frank_wolfe.make_problem(W, G, W.abs() * G.diagonal().sqrt(), int(0.4 * d))
        frank_wolfe.solve(problem, steps=STEPS)


def main(arguments: list[str]) -> None:
    """Print the table, of random layers or of the run that the arguments describe."""
    passes = Passes()
    with mock.patch.object(cpu, "row_step", passes):
        if arguments:
            run(arguments)
        else:
            solve_random_layers()
    print(passes.table())


if __name__ == "__main__":
    main(sys.argv[1:])
