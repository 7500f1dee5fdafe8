"""What a setting is worth: errors on held-out text of single layers, each setting varied alone, at every pattern.

A perplexity for every setting and pattern would take days on a CPU. The inputs are the dense model's, so that every
setting sees the same ones, and weights approximate the layer's own.
"""

from collections.abc import Sequence
from pathlib import Path

from dense_layers import dense_layers
from torch import Tensor

import sparsefw.run
from sparsefw import patterns
from sparsefw.kernels import reference
from sparsefw.methods import METHODS, Rows, weight_error
from sparsefw.saliency import wanda

# Rows of a layer, spread over all of it.
SAMPLE_ROWS = 96

# Flags of the two ways to prune, and of each the values of a setting beside its default.
MASKS, REFITTED = ("--target", "layer", "--refit", "0"), ("--target", "layer")
VARIED = {
    MASKS: {
        "alpha": (0.25, 0.5, 0.75, 0.9),
        "penalty": (0, 0.5),
        "steps": (20, 30, 60),
        "swaps": (0,),
        "damp": (0, 0.1, 0.4),
    },
    REFITTED: {
        "alpha": (0.5, 0.9),
        "penalty": (0,),
        "steps": (20, 60),
        "refit": (2, 8),
        "rounds": (0, 6),
        "damp": (0.03, 0.2, 0.4),
    },
}


def settings_of_study() -> list[tuple[str, ...]]:
    """The flags of every row of the study: the two ways by themselves, then each with one setting changed."""
    rows = []
    for base, settings in VARIED.items():
        rows.append(base)
        rows += [(*base, f"--{name}", f"{value:g}") for name, values in settings.items() for value in values]
    return rows


def measure_settings(
    folder: Path,
    calibration: Path,
    held_out: list[Path],
    blocks: list[int],
    every: Sequence[str],
    *,
    nsamples: int,
    seqlen: int,
    limit: int,
) -> dict[str, dict[str, list[float]]]:
    """Errors by pattern and flags.

    Args:
        folder, calibration, held_out, blocks, nsamples, seqlen, limit: see `dense_layers`.
        every: patterns.

    Returns:
        By pattern, then by flags: on the calibration text and on each held-out one the error relative to Wanda's mask
        there, mean over the layers.
    """
    sums: dict[str, dict[str, list[float]]] = {}
    layers = list(dense_layers(folder, calibration, held_out, blocks, nsamples=nsamples, seqlen=seqlen, limit=limit))
    for text in every:
        pattern = patterns.parse(text)
        for _, _, weight, grams in layers:
            W = weight[:: -(-len(weight) // SAMPLE_ROWS)].contiguous()
            saliency = wanda(W, grams[0].diagonal())
            k = patterns.budget(pattern, saliency)
            warm = W.masked_fill(~reference.lmo(saliency, k, group=pattern.group), 0)
            before = [_error(W, warm, G) for G in grams]
            rows = Rows(W, grams[0], saliency, k, W.dtype)
            for flags in settings_of_study():
                settings = sparsefw.run.settings_of(sparsefw.run.parse_arguments([*flags, "--sparsity", text]))
                choice = METHODS["sparsefw"].choose(rows, settings, reference)
                Z = W.masked_fill(~choice.mask, 0) if choice.weight is None else choice.weight
                shares = [_error(W, Z, G) / e / len(layers) for G, e in zip(grams, before, strict=True)]
                row = sums.setdefault(text, {}).setdefault(" ".join(flags), [0.0] * len(grams))
                row[:] = [a + b for a, b in zip(row, shares, strict=True)]
    return {text: {flags: [round(x, 5) for x in row] for flags, row in rows.items()} for text, rows in sums.items()}


def _error(W: Tensor, Z: Tensor, G: Tensor) -> float:
    return weight_error(W, Z, G, reference).double().sum().item()


def table(measured: dict[str, dict[str, list[float]]], texts: list[str]) -> str:
    """Markdown: a row for each setting, and for each pattern the error on every held-out text.

    Args:
        measured: from `measure_settings`.
        texts: names of the held-out texts.
    """
    head = ["flags", *(f"{text}, {name}" for text in measured for name in texts)]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head))]
    for flags in dict.fromkeys(flags for rows in measured.values() for flags in rows):
        values = [f"{x:.3f}" for rows in measured.values() for x in rows[flags][1:]]
        lines.append(f"| {' | '.join([f'`{flags}`', *values])} |")
    return "\n".join(lines)
