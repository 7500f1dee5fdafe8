"""The whole model beside one that runs block by block, and models with another forward around their blocks."""

from functools import partial

import torch
from helpers.families import TOKENS, save_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sparsefw.checkpoint.source import inspect
from sparsefw.model import StreamedModel, embed
from sparsefw.model.head import logits
from sparsefw.model.skeleton import attention_implementation

CPU = torch.device("cpu")
BATCH = 4


def whole_model(model, folder):
    """The same model in memory. Products may depend on how weights lie there, so each has memory of its own."""
    same = {"attn_implementation": attention_implementation(model.model), "experts_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **same).eval()
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    return whole


def all_logits(model, states):
    """The logits of TOKENS, from hidden states behind the last block."""
    with model.outside():
        batches = zip(TOKENS.split(BATCH), states.hidden, range(len(states)), strict=True)
        return torch.cat([logits(model, ids, hidden, states.behind_last(j)) for ids, hidden, j in batches])


@torch.no_grad()
def plain_logits(whole):
    """The logits of TOKENS by the model's own forward."""
    return torch.cat([whole(ids, use_cache=False).logits for ids in TOKENS.split(BATCH)])


class ChangedForward:
    """A model with another forward around its blocks."""

    def __init__(self, tmp_path, monkeypatch, forward):
        class Decoder(nn.Module):
            def forward(self, decoder, ids):
                return forward(decoder.layers, decoder.embed_tokens(ids), partial(self.given, decoder))

            def given(self, decoder, hidden):
                positions = torch.arange(hidden.shape[1])[None]
                return {"position_embeddings": decoder.rotary_emb(hidden, position_ids=positions)}

        folder = save_model(tmp_path, "llama")

        def whole_forward(model, input_ids, use_cache=False):
            hidden = Decoder()(model.model, input_ids)
            output = type("Output", (), {})()
            output.logits = model.lm_head(model.model.norm(hidden))
            return output

        monkeypatch.setattr(LlamaForCausalLM, "forward", whole_forward)
        self.model = StreamedModel(inspect(folder), CPU)
        self.folder = folder

    def check(self):
        """The blocks one by one give the logits of the whole."""
        states = embed(self.model, TOKENS, BATCH)
        for i in range(len(self.model.blocks)):
            self.model.open(i)
            states.advance(i)
        assert torch.equal(all_logits(self.model, states), plain_logits(whole_model(self.model, self.folder)))
