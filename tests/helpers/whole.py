"""The whole model, next to a model that runs block by block."""

import torch
from helpers.families import TOKENS
from transformers import AutoModelForCausalLM

from sparsefw.checkpoint.source import inspect
from sparsefw.model.forward import embed
from sparsefw.model.head import logits
from sparsefw.model.skeleton import attention_implementation
from sparsefw.model.streamed import StreamedModel

CPU = torch.device("cpu")
BATCH = 4


def whole_model(model, folder):
    """The same model in memory. Products may depend on how weights lie there, so each has memory of its own."""
    same = {"attn_implementation": attention_implementation(model.model), "experts_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **same).eval()
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    return whole


def streamed(folder):
    """The model of a checkpoint, to run block by block."""
    return StreamedModel(inspect(folder), CPU)


def run_blocks(model, states):
    """Move the states through all blocks, one by one."""
    for i in range(len(model.blocks)):
        model.open(i)
        states.advance(i)
        model.close(i)


def check_streamed(folder):
    """The blocks one by one give the logits of the whole; returns the model."""
    with streamed(folder) as model:
        states = embed(model, TOKENS, BATCH)
        run_blocks(model, states)
        assert torch.equal(all_logits(model, states), plain_logits(whole_model(model, folder)))
    return model


def all_logits(model, states):
    """The logits of TOKENS, from hidden states after the last block."""
    with model.outside_loaded():
        batches = zip(TOKENS.split(BATCH), states.hidden, range(len(states)), strict=True)
        return torch.cat([logits(model, ids, hidden, states.after_last(j)) for ids, hidden, j in batches])


@torch.no_grad()
def plain_logits(whole):
    """The logits of TOKENS by the model's own forward."""
    return torch.cat([whole(ids, use_cache=False).logits for ids in TOKENS.split(BATCH)])
