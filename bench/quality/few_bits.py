"""Fewer bits for the weights of a checkpoint, dense or pruned: what they cost in quality, and how many bytes they take.

    python bench/quality/few_bits.py --model PRUNED --method gptq4 --dataset CALIBRATION.txt --output DIR
    python bench/quality/few_bits.py --bits DIR [DIR ...]

The first is a run of the product, which goes on after a kill, with these methods; DIR has the rounded weights in the
checkpoint's dtype. Zeros stay zeros.

    nearest8 ... nearest2   every weight rounded to the nearest number of its group
    gptq8 ... gptq2         one after the other, and those that are not rounded yet make up for the error (Frantar et
                            al., arXiv 2210.17323), also for what moves a zero, which is then rounded to 0
    bf16                    rounded to bf16

A group is 64 kept weights of a row that follow each other (gptq2x32: 32). It has a bf16 scale, of either sign.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors import safe_open
from torch import Tensor

import sparsefw.run
from sparsefw.solver.config import METHODS, Method
from sparsefw.solver.frank_wolfe import Problem
from sparsefw.solver.methods import CHOOSE, choice_of

# 128 does not divide the rows of SmolLM2, which llm-compressor refuses.
GROUP, SMALLER_GROUP, SCALE_BITS = 64, 32, 16
# Scales that are tried, as fractions of the largest weight of a group.
FRACTIONS = [sign * (1 - 0.05 * n) for n in range(11) for sign in (1, -1)]
# Addition to the diagonal of the Gram matrix, as a fraction of its mean; columns between two products.
DAMP, WIDTH = 0.01, 64


def to_grid(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest of scale * (-2^(bits - 1) ... 2^(bits - 1) - 1); 0 where the scale is 0."""
    half = 2 ** (bits - 1)
    return (x / scale.where(scale != 0, torch.inf)).round().clamp(-half, half - 1) * scale


def group_scales(w: Tensor, bits: int, size: int) -> Tensor:
    """The scale of every weight: that of its group, (rows, k) fp32, which leaves the least squared error."""
    rows, k = w.shape
    groups = torch.nn.functional.pad(w, (0, -k % size)).view(rows, -1, size)
    largest = groups.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 0.5)
    tried = torch.stack([(fraction * largest).bfloat16().float() for fraction in FRACTIONS])
    errors = torch.stack([(groups - to_grid(groups, scale, bits)).square().sum(2, keepdim=True) for scale in tried])
    best = tried.gather(0, errors.argmin(0, keepdim=True))[0]
    return best.expand_as(groups).reshape(rows, -1)[:, :k]


def gptq(W: Tensor, G: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round rows, the last column first.

    With G = R^T R, R upper triangular, ||R (w - q)||^2 is a sum over the rows of R, in which the j-th reads only the
    weights from j on. So the best q_j, once those behind it are rounded, is next to

        w_j + sum_(i > j) R_ji / R_jj (w_i - q_i)

    This is GPTQ from the last column to the first (Chen et al., arXiv 2507.18553), without the inverse.

    Args:
        W: (rows, d) fp32 weights.
        G: (d, d) fp32 Gram matrix, damped.
        scale: (rows, d) fp32, 0 for what stays 0.
        bits: of a weight.
    """
    R = torch.linalg.cholesky(G).mT
    R = R / R.diagonal()[:, None]
    # Columns lie in memory one by one.
    W, scale = W.mT.contiguous(), scale.mT.contiguous()
    Q, gap = torch.zeros_like(W), torch.zeros_like(W)
    for start in reversed(range(0, len(W), WIDTH)):
        end = min(start + WIDTH, len(W))
        target = W[start:end] + R[start:end, end:] @ gap[end:]
        for j in reversed(range(start, end)):
            Q[j] = to_grid(target[j - start] + R[j, j + 1 : end] @ gap[j + 1 : end], scale[j], bits)
            gap[j] = W[j] - Q[j]
    return Q.mT


def rounded(problem: Problem, bits: int, size: int, compensate: bool) -> tuple[Tensor, Tensor]:
    """The mask of nonzero weights, and the rounded weights, (rows, d) each."""
    W, kept = problem.W, problem.W != 0
    # The kept weights of each row in the order of their columns, before zeros where rows keep different numbers.
    columns = kept.byte().topk(max(int(kept.sum(1).max()), 1), dim=1).indices.sort(1).values
    scale = torch.zeros_like(W).scatter(1, columns, group_scales(W.gather(1, columns), bits, size)) * kept
    if not compensate:
        return kept, to_grid(W, scale, bits)
    # Columns with the largest inputs are rounded first, so they come last.
    order = problem.G.diagonal().argsort()
    G = problem.G[order][:, order]
    G.diagonal().add_(DAMP * G.diagonal().mean())
    Q = gptq(W[:, order], G, scale[:, order], bits)
    return kept, torch.empty_like(Q).scatter(1, order.expand_as(Q), Q)


def register() -> None:
    """Add the methods to those of this process."""

    def add(name: str, prune: Callable) -> None:
        METHODS[name] = Method(saliency="magnitude", changes_weights=True)
        CHOOSE[name] = lambda problem, _, backend: choice_of(problem, *prune(problem), backend)

    for bits in (2, 3, 4, 8):
        for suffix, size in (("", GROUP), (f"x{SMALLER_GROUP}", SMALLER_GROUP)):
            for name, compensate in (("nearest", False), ("gptq", True)):
                add(f"{name}{bits}{suffix}", lambda problem, how=(bits, size, compensate): rounded(problem, *how))
    add("bf16", lambda problem: (problem.W != 0, problem.W.bfloat16()))


def bits_of(folder: Path) -> str:
    """The size of a run's output: bits a weight of its matrices, with a mask where its source has zeros, and MB.

    Raises:
        SystemExit: a zero of the source is none here.
    """
    report = json.loads((folder / "report.json").read_text("utf-8"))
    arguments, names = report["arguments"], {layer["name"] for layer in report["layers"]}
    bits, size = (int(n or GROUP) for n in re.findall(r"(\d+)x?(\d*)$", arguments["method"])[0])
    source, output = (matrices(Path(path), names) for path in (arguments["model"], folder))
    stored, zeros, weights = 0, 0, 0
    for (name, before), (_, after) in zip(source, output, strict=True):
        if after[before == 0].any():
            raise SystemExit(f"{folder}: {name}: lost zeros")
        kept, masked = int(before.count_nonzero(1).max()), bool((before == 0).float().mean() > 0.1)
        scales = math.ceil(kept / size) * SCALE_BITS if bits < 16 else 0
        stored += len(before) * (before.shape[1] * masked + kept * bits + scales)
        zeros, weights = zeros + int((after == 0).sum()), weights + before.numel()
    return f"{folder}: zeros {zeros / weights:.3f}, {stored / weights:.2f} bits a weight, {stored / 8e6:.1f} MB"


def matrices(folder: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The matrices of these names in a checkpoint, in the order of their names."""
    where = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            where |= dict.fromkeys(shard.keys(), path)
    for name in sorted(names):
        with safe_open(where[name], "pt") as shard:
            yield name, shard.get_tensor(name)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--bits"]:
        print("\n".join(bits_of(Path(folder)) for folder in sys.argv[2:]))
    else:
        register()
        sys.exit(sparsefw.run.main(sys.argv[1:]))
