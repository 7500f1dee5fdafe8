"""What a setting is worth: errors on held-out text of single layers, each setting varied alone, at every pattern.

A perplexity for every setting and pattern would take days on a CPU. The inputs are the dense model's, so that every
setting sees the same ones, and weights approximate the layer's own.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from dense_layers import dense_layers
from quality_cells import EVAL_WINDOWS, NSAMPLES, PATTERNS, SEQLEN
from torch import Tensor

from sparsefw.cli import inputs_and_config, run_parser
from sparsefw.kernels.backend import TORCH
from sparsefw.solver import prune_layers

# Rows of a layer, spread over all of it.
SAMPLE_ROWS = 96
WANDA = ("--method", "wanda")
MASKS, REFITTED = ("--refit", "0"), ("--target", "layer", "--reconstruct", "0")
# By the two ways to prune: the values of a setting beside its default.
VARIED = {
    MASKS: "--alpha 0.25 0.5 0.75 0.9 --penalty 0 0.5 --steps 20 30 60 --swaps 0 --damp 0 0.1 0.4 "
    "--precision tf32 bf16",
    REFITTED: "--alpha 0.5 0.9 --penalty 0 --steps 20 60 --refit 2 8 --rounds 0 6 --damp 0.03 0.2 0.4 "
    "--precision tf32 bf16",
}


def rows() -> list[tuple[str, ...]]:
    """The flags of every row: each of the two ways by itself, then with one setting changed."""
    found: list[tuple[str, ...]] = []
    for base, varied in VARIED.items():
        found.append(base)
        for word in varied.split():
            if word.startswith("--"):
                name = word
            else:
                found.append((*base, name, word))
    return found


def measure(
    model: Path, calibration: Path, held_out: list[Path], blocks: list[int], nsamples: int = NSAMPLES
) -> dict[str, dict[str, list[float]]]:
    """Errors by pattern, then by flags: on the calibration text and on each held-out one, relative to Wanda's mask."""
    windows = dict(nsamples=nsamples, seqlen=SEQLEN, limit=EVAL_WINDOWS)
    ratios: dict[str, dict[str, list[list[float]]]] = {pattern: {} for pattern in PATTERNS}
    for _, _, weight, grams in dense_layers(model, calibration, held_out, blocks, **windows):
        W = weight[:: -(-len(weight) // SAMPLE_ROWS)].contiguous()
        for pattern, by_flags in ratios.items():
            warm = _errors(W, grams, (*WANDA, "--sparsity", pattern))
            for flags in rows():
                errors = _errors(W, grams, (*flags, "--sparsity", pattern))
                by_flags.setdefault(" ".join(flags), []).append([e / w for e, w in zip(errors, warm, strict=True)])
    return {
        pattern: {
            flags: [round(fmean(column), 5) for column in zip(*found, strict=True)] for flags, found in by.items()
        }
        for pattern, by in ratios.items()
    }


def _errors(W: Tensor, grams: list[Tensor], flags: Sequence[str]) -> list[float]:
    """Prune a layer with these flags on the first Gram matrix; returns the errors on all of them."""
    _, config = inputs_and_config(run_parser(None).parse_args([*flags, "--kernel", "torch"]))
    Z = W.clone()
    list(prune_layers([("layer", Z)], grams[0].clone(), config.method, config, TORCH))
    E = (W - Z).double()
    return [(E * (E @ G.double())).sum().item() for G in grams]


def table(measured: dict[str, dict[str, list[float]]]) -> str:
    """Markdown with a row for each setting; its columns are the mean errors on held-out text, by pattern."""
    flags = dict.fromkeys(flags for by_flags in measured.values() for flags in by_flags)
    lines = [["", *measured], ["---"] * (len(measured) + 1)]
    lines += [[f"`{name}`", *(f"{fmean(by[name][1:]):.3f}" for by in measured.values())] for name in flags]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
