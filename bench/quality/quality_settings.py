"""What a setting is worth: errors on held-out text of single layers, each setting varied alone, at every pattern.

A perplexity for every setting and pattern would take days on a CPU. The inputs are the dense model's, so that every
setting sees the same ones, and weights approximate the layer's own.
"""

from collections.abc import Sequence

from torch import Tensor

from sparsefw.cli import inputs_and_config, run_parser
from sparsefw.solver import patterns
from sparsefw.solver.choices import CHOOSE, Rows
from sparsefw.solver.objective import damped, weight_error
from sparsefw.solver.saliency import wanda

# Rows of a layer, spread over all of it.
SAMPLE_ROWS = 96

# Flags of the two ways to prune, and for each way the values of a setting beside its default.
MASKS, REFITTED = ("--refit", "0"), ("--target", "layer", "--reconstruct", "0")
VARIED = {
    MASKS: {
        "alpha": (0.25, 0.5, 0.75, 0.9),
        "penalty": (0, 0.5),
        "steps": (20, 30, 60),
        "swaps": (0,),
        "damp": (0, 0.1, 0.4),
        "precision": ("tf32", "bf16"),
    },
    REFITTED: {
        "alpha": (0.5, 0.9),
        "penalty": (0,),
        "steps": (20, 60),
        "refit": (2, 8),
        "rounds": (0, 6),
        "damp": (0.03, 0.2, 0.4),
        "precision": ("tf32", "bf16"),
    },
}


# Flags that compare a budget for every row with one for the whole matrix. SparseGPT has one for each block of columns.
WARM_OF_BUDGETS = ("--method", "wanda", "--sparsity", "0.6")
BUDGETS = (
    (*MASKS, "--sparsity", "0.6"),
    (*MASKS, "--sparsity", "layer:0.6"),
    ("--method", "sparsegpt", "--sparsity", "0.6"),
    (*REFITTED, "--sparsity", "0.6"),
    (*REFITTED, "--sparsity", "layer:0.6"),
)


def settings_of_study() -> list[tuple[str, ...]]:
    """The flags of every row of the study: each of the two ways by itself, then with one setting changed."""
    rows = []
    for base, settings in VARIED.items():
        rows.append(base)
        values = [(f"--{name}", value) for name, values in settings.items() for value in values]
        rows += [(*base, name, value if isinstance(value, str) else f"{value:g}") for name, value in values]
    return rows


def measure_settings(
    layers: list[tuple[int, str, Tensor, list[Tensor]]], every: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Errors by pattern and flags.

    Args:
        layers: from `dense_layers`.
        every: the patterns.

    Returns:
        By pattern, then by flags: on the calibration text and on each held-out one the error relative to Wanda's mask
        there, mean over the layers.
    """
    ratios: dict[str, dict[str, list[list[float]]]] = {}
    for pattern in every:
        for _, _, weight, grams in layers:
            W = weight[:: -(-len(weight) // SAMPLE_ROWS)].contiguous()
            warm = _errors(W, grams, ("--method", "wanda", "--sparsity", pattern))
            for flags in settings_of_study():
                errors = _errors(W, grams, (*flags, "--sparsity", pattern))
                rows = ratios.setdefault(pattern, {}).setdefault(" ".join(flags), [])
                rows.append([e / w for e, w in zip(errors, warm, strict=True)])
    return {pattern: {flags: _mean(rows) for flags, rows in by_flags.items()} for pattern, by_flags in ratios.items()}


def measure_budgets(layers: list[tuple[int, str, Tensor, list[Tensor]]]) -> dict[str, dict[str, list[float]]]:
    """Errors as in `measure_settings`, of all rows of the layers: by kind of layer, then by the flags of BUDGETS."""
    ratios: dict[str, dict[str, list[list[float]]]] = {}
    for _, kind, W, grams in layers:
        warm = _errors(W, grams, WARM_OF_BUDGETS)
        for flags in BUDGETS:
            errors = _errors(W, grams, flags)
            rows = ratios.setdefault(kind, {}).setdefault(" ".join(flags), [])
            rows.append([e / w for e, w in zip(errors, warm, strict=True)])
    return {kind: {flags: _mean(rows) for flags, rows in by_flags.items()} for kind, by_flags in ratios.items()}


def _errors(W: Tensor, grams: list[Tensor], flags: Sequence[str]) -> list[float]:
    """Prune a layer with these flags on the first Gram matrix; returns the errors on all of them."""
    _, config = inputs_and_config(run_parser(None).parse_args([*flags, "--kernel", "torch"]))
    saliency = wanda(W, grams[0].diagonal())
    k, H = patterns.kept(config.pattern, saliency), damped(grams[0], config.damp)
    rows = Rows(W, grams[0], saliency, k, W.dtype, damped=H)
    choice = CHOOSE[config.method](rows, config, config.backend)
    Z = W.masked_fill(~choice.mask, 0) if choice.weight is None else choice.weight
    return [weight_error(W, Z, G).double().sum().item() for G in grams]


def _mean(rows: list[list[float]]) -> list[float]:
    return [round(sum(column) / len(column), 5) for column in zip(*rows, strict=True)]


def table(measured: dict[str, dict[str, list[float]]], texts: list[str]) -> str:
    """Markdown with a row for each setting; its columns are the errors on every held-out text by pattern (or layer).

    Args:
        measured: from `measure_settings` or `measure_budgets`.
        texts: names of the held-out texts.
    """
    head = ["flags", *(f"{text}, {name}" for text in measured for name in texts)]
    lines = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head))]
    for flags in dict.fromkeys(flags for rows in measured.values() for flags in rows):
        values = [f"{x:.3f}" for rows in measured.values() for x in rows[flags][1:]]
        lines.append(f"| {' | '.join([f'`{flags}`', *values])} |")
    return "\n".join(lines)
