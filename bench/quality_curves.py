"""Errors of Frank-Wolfe by step, relaxed and rounded, with and without the penalty: the paper's figure 4."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from sparsefw import checkpoint, data, frank_wolfe, layers, patterns
from sparsefw.driver import BATCH_TOKENS
from sparsefw.kernels import reference
from sparsefw.saliency import wanda
from sparsefw.stream import StreamedModel

# Of these layers of a block, at this sparsity, without fixed entries.
LAYERS, PATTERN = ("q_proj", "o_proj", "up_proj", "down_proj"), "0.6"
WITHOUT_PENALTY = {"no penalty, line search": "line-search", "no penalty, open loop": "open-loop"}
SEEN = (1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 80, 100, 130, 160, 200)
# With the penalty each is a solve of its own: the ramp depends on the number of steps.
WITH_PENALTY, SOLVES = "penalty, line search", (5, 10, 20, 30, 60, 100)


def measure_curves(
    folder: Path, calibration: Path, block: int, *, nsamples: int, seqlen: int
) -> dict[str, dict[str, list[list[float]]]]:
    """Errors of Frank-Wolfe by step in some layers of a block, whose inputs are the dense model's.

    Args:
        folder: the checkpoint.
        calibration: text to calibrate on.
        block: its index.
        nsamples, seqlen: windows, and tokens in each (at most the model's maximum).

    Returns:
        By layer type and curve: [steps, relaxed error, error of the rounded mask], both relative to the warm start's.
    """
    model = StreamedModel(checkpoint.inspect(folder), torch.device("cpu"))
    seqlen = min(seqlen, model.max_seqlen or seqlen)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    windows = data.calibration_windows(tokenizer, str(calibration), nsamples=nsamples, seqlen=seqlen, seed=0)
    stream = model.start(windows.ids, max(1, BATCH_TOKENS // seqlen))
    for i in range(block):
        model.open(i)
        model.advance(i, stream)
        model.close(i)
    run, batches = partial(model.output, block, stream), range(len(stream.hidden))
    found, grams, _ = layers.capture(model.open(block), run, batches, ops=reference, precision="ieee")
    chosen = {layer.name.split(".")[-2]: (layer.weight.float(), grams[layer.gram]) for layer in found}
    return {kind: curves(*chosen[kind]) for kind in LAYERS if kind in chosen}


def curves(W: Tensor, G: Tensor) -> dict[str, list[list[float]]]:
    """As `measure_curves`, of one layer: W (rows, d) and its Gram matrix G (d, d), fp32."""
    k = patterns.kept_in_row(patterns.parse(PATTERN), W.shape[1])
    problem = frank_wolfe.pose(W, G, wanda(W, G.diagonal()), k)
    warm = frank_wolfe.mask_error(W, problem.warm, G).double().sum().item()

    def point(t: int, state: frank_wolfe.Iterate) -> list[float]:
        rounded = frank_wolfe.mask_error(W, frank_wolfe.round_mask(problem, state.M), G)
        return [t, *(float(f"{error.double().sum().item() / warm:.6g}") for error in (state.error, rounded))]

    def steps(n: int, rule: str, penalty: float) -> Iterator[tuple[int, frank_wolfe.Iterate]]:
        options = {"precision": "ieee", "ops": reference}
        return enumerate(frank_wolfe.iterate(problem, steps=n, step_rule=rule, penalty=penalty, **options), 1)

    measured = {name: [[0, 1.0, 1.0]] for name in (*WITHOUT_PENALTY, WITH_PENALTY)}
    for name, rule in WITHOUT_PENALTY.items():
        measured[name] += [point(t, state) for t, state in steps(max(SEEN), rule, 0.0) if t in SEEN]
    for n in SOLVES:
        measured[WITH_PENALTY] += [point(t, state) for t, state in steps(n, "line-search", 1.0) if t == n]
    return measured
