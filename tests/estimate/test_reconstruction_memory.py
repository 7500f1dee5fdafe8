"""The expected memory of a reconstruction is what its parts take."""

import pytest
import torch
from helpers.families import save_model
from helpers.memory import most_bytes

from sparsefw import checkpoint
from sparsefw.estimate import reconstruction_memory
from sparsefw.estimate.reconstruction_memory import logits_bytes
from sparsefw.model import StreamedModel, predictions
from sparsefw.model.predictions import divergence
from sparsefw.model.shape_of import shape_of

CPU = torch.device("cpu")
TOKENS, VOCABULARY = 64, 8192


@pytest.mark.parametrize("piece", [2**24, 4 * VOCABULARY])
# Gemma 2 caps its logits, and Mamba makes them in fp32.
@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba"])
def test_predictions_that_are_compared(family, piece, tmp_path, monkeypatch):
    for module in (predictions, reconstruction_memory):
        monkeypatch.setattr(module, "PIECE", piece)
    kinds = {"layer_types": ["full_attention"]} if family == "gemma2" else {}
    sizes = dict(num_hidden_layers=1, vocab_size=VOCABULARY)
    source = checkpoint.inspect(save_model(tmp_path, family, torch.bfloat16, **sizes, **kinds))
    shape, model, generator = shape_of(source), StreamedModel(source, CPU), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (2, TOKENS), generator=generator)
    hidden, dense = torch.randn(2, *ids.shape, shape.hidden, generator=generator).bfloat16()
    with model.outside():
        measured = most_bytes(lambda: divergence(model, ids, hidden, dense))
        of_step = most_bytes(lambda: divergence(model, ids, hidden.requires_grad_(), dense).backward())
    expected = logits_bytes(shape, TOKENS)
    # Hidden states come on top.
    assert 0.7 * expected < measured <= of_step <= 1.01 * expected
