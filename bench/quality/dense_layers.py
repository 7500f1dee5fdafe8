"""Layers of a checkpoint with the Gram matrices of their inputs in the dense model, for studies of single layers."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from sparsefw import checkpoint, data
from sparsefw.data.windows import Windows
from sparsefw.kernels import cpu
from sparsefw.model import layers
from sparsefw.model.placement import BATCH_TOKENS
from sparsefw.model.streamed import StreamedModel

# Of every block these: one of each kind of input.
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
        calibration: text to draw `nsamples` windows of.
        held_out: other texts, of which the first `limit` windows are taken.
        blocks: indices.
        nsamples, seqlen: windows, and tokens in each (at most the model's maximum).
        limit: None takes all windows.

    Yields:
        Block, kind, weight (rows, d) fp32, and the Gram matrix (d, d) fp32 of each text, the calibration's first.
    """
    model = StreamedModel(checkpoint.inspect(folder), torch.device("cpu"))
    seqlen = min(seqlen, model.max_seqlen or seqlen)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    windows: list[Windows] = [
        data.calibration_windows(tokenizer, str(calibration), nsamples=nsamples, seqlen=seqlen, seed=0)
    ]
    windows += [data.evaluation_windows(tokenizer, str(text), seqlen=seqlen, limit=limit) for text in held_out]
    streams = [model.start(text.ids, max(1, BATCH_TOKENS // seqlen)) for text in windows]
    for i in range(max(blocks) + 1):
        block = model.open(i)
        if i in blocks:
            captured = [
                layers.capture(block, partial(model.output, i, s), range(len(s.hidden)), ops=cpu, precision="ieee")
                for s in streams
            ]
            for layer in captured[0][0]:
                kind = layer.name.split(".")[-2]
                if kind in KINDS:
                    yield i, kind, layer.weight.float(), [grams[layer.gram] for _, grams, _ in captured]
        if i < max(blocks):
            for stream in streams:
                model.advance(i, stream)
        model.close(i)
