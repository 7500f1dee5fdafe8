"""What a setting is worth: errors on held-out text of single layers, each setting varied alone, at every pattern.

A perplexity for every setting and pattern would take days on a CPU. The inputs are the dense model's, so that every
setting sees the same ones, and weights approximate the layer's own.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from quality_cells import EVAL_WINDOWS, NSAMPLES, PATTERNS, SEQLEN
from quality_tables import markdown
from torch import Tensor
from transformers import AutoTokenizer

from sparsefw.checkpoint.source import inspect
from sparsefw.cli import run_parser, settings_of
from sparsefw.data.windows import calibration_windows, evaluation_windows
from sparsefw.kernels.backend import TORCH
from sparsefw.model import StreamedModel, embed
from sparsefw.model.activations import BATCH_TOKENS
from sparsefw.model.measure import capture
from sparsefw.solver.layer import prune_layers

# The layers that are taken of every block: one for each kind of input.
KINDS = ("q_proj", "o_proj", "up_proj", "down_proj")

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
        for setting in varied.split("--")[1:]:
            name, *values = setting.split()
            found += [(*base, f"--{name}", value) for value in values]
    return found


def dense_layers(
    folder: Path, calibration: Path, held_out: list[Path], blocks: list[int]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Run texts through the dense model, block by block.

    Yields:
        Weight (rows, d) fp32 of each of the KINDS in these blocks, and the Gram matrix (d, d) fp32 of each text, the
        calibration's first.
    """
    with StreamedModel(inspect(folder), torch.device("cpu")) as model:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        size = dict(seqlen=min(SEQLEN, model.max_seqlen or SEQLEN))
        windows = [calibration_windows(tokenizer, str(calibration), nsamples=NSAMPLES, seed=0, **size)]
        windows += [evaluation_windows(tokenizer, str(text), limit=EVAL_WINDOWS, **size) for text in held_out]
        states = [embed(model, text.ids, max(1, BATCH_TOKENS["cpu"] // size["seqlen"])) for text in windows]
        for i in range(max(blocks) + 1):
            block = model.open(i)
            if i in blocks:
                captured = [capture(block, partial(s.output, i), range(len(s)), backend=TORCH) for s in states]
                for layer in captured[0].layers:
                    if layer.name.split(".")[-2] in KINDS:
                        yield layer.weight.float(), [on_text.grams[layer.gram] for on_text in captured]
            if i < max(blocks):
                for hidden_states in states:
                    hidden_states.advance(i)
            model.close(i)


def measure(
    model: Path, calibration: Path, held_out: list[Path], blocks: list[int]
) -> dict[str, dict[str, list[float]]]:
    """Errors by pattern, then by flags: on the calibration text and on each held-out one, relative to Wanda's mask."""
    ratios: dict[str, dict[str, list[list[float]]]] = {pattern: {} for pattern in PATTERNS}
    for weight, grams in dense_layers(model, calibration, held_out, blocks):
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
    _, config, _ = settings_of(run_parser(None).parse_args([*flags, "--kernel", "torch"]))
    Z = W.clone()
    prune_layers([("layer", Z)], grams[0].clone(), config.method, config, TORCH)
    E = (W - Z).double()
    return [(E * (E @ G.double())).sum().item() for G in grams]


def table(measured: dict[str, dict[str, list[float]]]) -> str:
    """Markdown with a row for each setting; its columns are the mean errors on held-out text, by pattern."""
    flags = dict.fromkeys(flags for by_flags in measured.values() for flags in by_flags)
    rows = [[f"`{name}`", *(f"{fmean(by[name][1:]):.3f}" for by in measured.values())] for name in flags]
    return markdown(["", *measured], rows)
