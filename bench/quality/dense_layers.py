"""Layers of a checkpoint with the Gram matrices of their inputs in the dense model, for studies of single layers."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from sparsefw import checkpoint, data
from sparsefw.kernels.backend import TORCH
from sparsefw.model import StreamedModel, embed
from sparsefw.model.layers import capture
from sparsefw.model.placement import BATCH_TOKENS

# The layers that are taken of every block: one for each kind of input.
KINDS = ("q_proj", "o_proj", "up_proj", "down_proj")


def dense_layers(
    folder: Path,
    calibration: Path,
    held_out: list[Path],
    blocks: list[int],
    *,
    nsamples: int,
    seqlen: int,
    limit: int | None = None,
) -> Iterator[tuple[int, str, Tensor, list[Tensor]]]:
    """Run texts through the dense model, block by block.

    Args:
        folder: the checkpoint.
        calibration: text that `nsamples` windows are drawn from.
        held_out: other texts, of which the first `limit` windows are taken.
        blocks: numbers of the blocks.
        nsamples, seqlen: number of windows, and tokens in each (at most the model's maximum).
        limit: most windows of each held-out text; None takes all.

    Yields:
        Block, kind, weight (rows, d) fp32, and the Gram matrix (d, d) fp32 of each text, the calibration's first.
    """
    with StreamedModel(checkpoint.inspect(folder), torch.device("cpu")) as model:
        seqlen = min(seqlen, model.max_seqlen or seqlen)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        windows = [data.calibration_windows(tokenizer, str(calibration), nsamples=nsamples, seqlen=seqlen, seed=0)]
        windows += [data.evaluation_windows(tokenizer, str(text), seqlen=seqlen, limit=limit) for text in held_out]
        states = [embed(model, text.ids, max(1, BATCH_TOKENS["cpu"] // seqlen)) for text in windows]
        for i in range(max(blocks) + 1):
            block = model.open(i)
            if i in blocks:
                captured = [capture(block, partial(s.output, i), range(len(s)), backend=TORCH) for s in states]
                for layer in captured[0].layers:
                    kind = layer.name.split(".")[-2]
                    if kind in KINDS:
                        yield i, kind, layer.weight.float(), [on_text.grams[layer.gram] for on_text in captured]
            if i < max(blocks):
                for hidden_states in states:
                    hidden_states.advance(i)
            model.close(i)
