"""What blocks hand on beside hidden states arrives at later blocks as in the whole model, in every stream by itself."""

import copy
import re
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from helpers.families import HANDING_ON, TOKENS, save_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparsefw import checkpoint
from sparsefw.errors import InputError
from sparsefw.model import StreamedModel, embed, logits, perplexity, shape_of
from sparsefw.model.activations import DeviceActivations, make_activations
from sparsefw.model.transformers_private import attention_implementation

CPU = torch.device("cpu")
BATCH = 4
PLACES = {"gpu": DeviceActivations, "file": partial(make_activations, "file", CPU)}


def prune(module):
    """Change the matrices of a module, its experts' as well."""
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            parameter.data[..., ::3] = 0


def whole_model(model, folder):
    """The same model in memory. Products may depend on how weights lie there, so each has memory of its own."""
    same = {"attn_implementation": attention_implementation(model.model), "experts_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **same).eval()
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()
    return whole


def blocks_of(whole, model):
    return whole.get_submodule(model.names[0].rpartition(".")[0])


def all_logits(model, states):
    with model.outside():
        batches = zip(TOKENS.split(BATCH), states.hidden, range(len(states)), strict=True)
        return torch.cat([logits(model, ids, hidden, states.behind_last(j)) for ids, hidden, j in batches])


@torch.no_grad()
def plain_logits(whole):
    return torch.cat([whole(ids, use_cache=False).logits for ids in TOKENS.split(BATCH)])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", HANDING_ON)
def test_streams_equal_the_whole_models(family, place, tmp_path):
    """A dense stream and two pruned ones, which take turns; four windows in a micro-batch, and two."""
    folder = save_model(tmp_path, family)
    with StreamedModel(checkpoint.inspect(folder), CPU) as model:
        dense = embed(model, TOKENS, BATCH, PLACES[place])
        pruned, other = dense.fork(), dense.fork()
        for i in range(len(model.blocks)):
            block = copy.deepcopy(model.open(i))
            dense.advance(i)
            # The first run of a stream is not what counts.
            for j in range(len(pruned)):
                pruned.output(i, j)
            prune(model.blocks[i])
            pruned.advance(i)
            prune(block)
            other.advance(i, block)
            model.close(i)
        whole = whole_model(model, folder)
        expected = plain_logits(whole)
        prune(blocks_of(whole, model))
        expected_pruned = plain_logits(whole)
        assert (expected - expected_pruned).abs().max() > 0.1
        assert torch.equal(all_logits(model, dense), expected)
        assert torch.equal(all_logits(model, pruned), expected_pruned)
        assert torch.equal(all_logits(model, other), expected_pruned)
        loss = nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        assert perplexity(dense, TOKENS) == pytest.approx(loss.exp().item(), rel=1e-5)
        for states in (dense, pruned, other):
            states.close()


@pytest.mark.parametrize("family", HANDING_ON)
def test_expected_size_is_what_lies_between_blocks(family, tmp_path):
    """Bytes of a window, from windows of other lengths."""
    source, seqlen = checkpoint.inspect(save_model(tmp_path, family)), TOKENS.shape[1]
    shape, most = shape_of(source), 0
    with StreamedModel(source, CPU) as model:
        # Windows of one micro-batch each, so that what differs between them shows.
        states = embed(model, TOKENS, 1)
        for i in range(len(model.blocks)):
            model.open(i)
            for j in range(len(states)):
                states.leave(i, j, states.output(i, j))
            most = max(most, sum(x.nbytes for x in states.carried.tensors()))
            states.arrive(states.position)
        before = sum(states.constants[0, n].nbytes for n in states.constants._lists)
    expected = shape.of_stream(seqlen)
    # Indices are as many as there are tokens, up to a limit that few tokens do not reach.
    assert expected[0] == states.hidden[0].nbytes
    assert most <= sum(expected[1:]) <= (4 if family == "glm_moe_dsa" else 1) * most
    assert before == sum(shape.of_text(seqlen))


class _Changed:
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
        self.model = StreamedModel(checkpoint.inspect(folder), CPU)
        self.folder = folder

    def check(self):
        states = embed(self.model, TOKENS, BATCH)
        for i in range(len(self.model.blocks)):
            self.model.open(i)
            states.advance(i)
        assert torch.equal(all_logits(self.model, states), plain_logits(whole_model(self.model, self.folder)))


def _scaled(blocks, hidden, given):
    for block in blocks:
        hidden = block(hidden, **given(hidden)) * 0.5 + 0.1
    return hidden


def _first_again(blocks, hidden, given):
    first = hidden
    for block in blocks:
        hidden = block(hidden, **given(hidden)) + first
    return hidden


def _skip(blocks, hidden, given):
    """What the first block returns is read behind the last one."""
    made = []
    for block in blocks:
        hidden = block(hidden, **given(hidden))
        made.append(hidden)
    return hidden + made[0].tanh()


def _two_streams(blocks, hidden, given):
    other = hidden.sin()
    for block in blocks:
        other, hidden = hidden, block(hidden + other, **given(hidden))
    return hidden - other


def _masked_in_place(blocks, hidden, given):
    for block in blocks:
        before = hidden
        hidden = block(hidden, **given(hidden)) + hidden
        changed = hidden.cos()
        changed *= 0.5
        changed.add_(before)
        hidden = hidden * changed
        hidden -= before.mean()
    return hidden


def _twice(blocks, hidden, given):
    for block in (*blocks, blocks[0]):
        hidden = block(hidden, **given(hidden))
    return hidden


def _backwards(blocks, hidden, given):
    for block in reversed(blocks):
        hidden = block(hidden, **given(hidden))
    return hidden


@pytest.mark.parametrize("forward", [_scaled, _first_again, _skip, _two_streams, _masked_in_place, _twice, _backwards])
def test_what_is_done_between_blocks_is_done_again(forward, tmp_path, monkeypatch):
    _Changed(tmp_path, monkeypatch, forward).check()


def _all_twice(blocks, hidden, given):
    for block in (*blocks, *blocks):
        hidden = block(hidden, **given(hidden))
    return hidden


def _in_place(blocks, hidden, given):
    for block in blocks:
        hidden = block(hidden, **given(hidden))
        hidden += 1
    return hidden


def _by_value(blocks, hidden, given):
    for block in blocks:
        hidden = block(hidden, **given(hidden))
        if hidden.sum() > 0:
            hidden = hidden * 2
    return hidden


def _out_of_sight(blocks, hidden, given):
    for block in blocks:
        hidden = block(torch.tensor(hidden.tolist()), **given(hidden))
    return hidden


def _to_numpy(blocks, hidden, given):
    for block in blocks:
        hidden = block(hidden + torch.from_numpy(np.asarray(hidden).copy()), **given(hidden))
    return hidden


def _written_weight(blocks, hidden, given):
    for block in blocks:
        block.mlp.up_proj.weight.mul_(0.5)
        hidden = block(hidden, **given(hidden))
    return hidden


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (_in_place, "what is made of its output is written to in place"),
        (_all_twice, "model.layers.0 runs more than once in a forward, and so do all blocks"),
        (_by_value, "what follows it depends on the values that it returns"),
        (_to_numpy, "what follows it depends on the values that it returns"),
        (_out_of_sight, "what follows it depends on the values that it returns"),
        (_written_weight, "its forward changes this weight of a block"),
    ],
)
def test_what_cannot_be_done_again_is_refused(forward, said, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"unsupported model LlamaForCausalLM: ") as caught:
        _Changed(tmp_path, monkeypatch, forward)
    assert re.search(r"model\.layers\.\d", str(caught.value))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def _by_text(blocks, hidden, given):
    for block in blocks:
        # The text of a tensor shows its values.
        hidden = block(hidden + zlib.crc32(repr(hidden).encode()), **given(hidden))
    return hidden


def _by_chance(blocks, hidden, given):
    for block in blocks:
        hidden = block(hidden, **given(hidden)) * torch.rand(1)
    return hidden


def _reads_between(blocks, hidden, given):
    kept = {}
    for block in blocks:
        hidden = block(hidden, kept=kept, **given(hidden)) * (1 + len(kept))
    return hidden


def _reads_one(blocks, hidden, given):
    for block in blocks:
        kept = {}
        hidden = block(hidden, kept=kept, **given(hidden))
        hidden = hidden + sum(kept.values())
    return hidden


def _reads_behind(blocks, hidden, given):
    kept = {}
    for block in blocks:
        hidden = block(hidden, kept=kept, **given(hidden))
    return hidden + sum(kept.values())


def _needs(blocks, hidden, given):
    kept = {}
    for block in blocks:
        hidden = block(hidden, kept=kept, **given(hidden))
    return hidden + kept[2]


def _reads_attribute(blocks, hidden, given):
    for block in blocks:
        hidden = block(hidden, **given(hidden))
        hidden = hidden + getattr(block, "seen", 0)
    return hidden


@pytest.mark.parametrize(
    ("forward", "place"),
    [
        (_by_text, "before model.layers.1"),
        (_by_chance, "before model.layers.1"),
        (_reads_between, "before model.layers.1"),
        (_reads_one, "behind the last block"),
        (_reads_behind, "behind the last block"),
        (_needs, ""),
        (_reads_attribute, "before model.layers.1"),
    ],
)
def test_what_is_not_seen_is_refused(forward, place, tmp_path, monkeypatch):
    """Only the last block puts something into the object that it is given."""
    run = LlamaDecoderLayer.forward

    def layer(self, hidden, kept=None, **kwargs):
        self.seen = hidden * 0.1
        if kept is not None and (self.self_attn.layer_idx == 2 or forward is _reads_between):
            kept[self.self_attn.layer_idx] = self.seen
        return run(self, hidden, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
    said = rf"^unsupported model LlamaForCausalLM: .*{place} .*in a way that cannot be followed"
    with pytest.raises(InputError, match=said) as caught:
        _Changed(tmp_path, monkeypatch, forward)
    assert "\n" not in str(caught.value)


def _writes_to_tensor(blocks, hidden, given):
    shared = given(hidden)
    for block in blocks:
        hidden = block(hidden, **shared)
        shared["position_embeddings"][0].mul_(0.5)
    return hidden


def _writes_to_first(blocks, hidden, given):
    first = hidden
    for block in blocks:
        hidden = block(hidden, **given(hidden))
        first.mul_(0.5)
    return hidden


def _changes_dict(blocks, hidden, given):
    for block in blocks:
        kept = {}
        hidden = block(hidden, kept=kept, **given(hidden))
        kept["last"] = hidden.sin()
    return hidden


def _gives_set(blocks, hidden, given):
    for block in blocks:
        hidden = block(hidden, kept={1}, **given(hidden))
    return hidden


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (_writes_to_tensor, "its forward changes a Tensor that a block was given"),
        (_writes_to_first, "its forward changes a Tensor that a block was given"),
        (_changes_dict, "its forward changes a dict that a block was given"),
        (_gives_set, "its blocks are given or return a set"),
    ],
)
def test_changes_of_what_blocks_are_given_are_refused(forward, said, tmp_path, monkeypatch):
    run = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer, "forward", lambda self, hidden, kept=None, **kwargs: run(self, hidden, **kwargs)
    )
    with pytest.raises(InputError, match=said):
        _Changed(tmp_path, monkeypatch, forward)


def test_objects_that_only_blocks_read_may_be_changed(tmp_path, monkeypatch):
    """Each block adds what the one before has put into the dict."""
    run = LlamaDecoderLayer.forward

    def layer(self, hidden, kept, **kwargs):
        hidden = run(self, hidden, **kwargs) + kept.get("last", 0)
        kept["last"] = hidden.sin()
        return hidden

    def forward(blocks, hidden, given):
        kept = {}
        for block in blocks:
            hidden = block(hidden, kept=kept, **given(hidden))
        return hidden

    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
    _Changed(tmp_path, monkeypatch, forward).check()


def test_another_order_with_other_tokens_is_refused(tmp_path, monkeypatch):
    def forward(blocks, hidden, given):
        for block in blocks if len(hidden) == 1 else reversed(blocks):
            hidden = block(hidden, **given(hidden))
        return hidden

    changed = _Changed(tmp_path, monkeypatch, forward)
    with pytest.raises(InputError, match="a block runs differently from one micro-batch to the next"):
        embed(changed.model, TOKENS, BATCH)


def test_a_weight_that_is_multiplied_with_one_is_not_changed(tmp_path, monkeypatch):
    def forward(blocks, hidden, given):
        for block in blocks:
            block.mlp.up_proj.weight.mul_(1)
            hidden = block(hidden, **given(hidden))
        return hidden

    embed(_Changed(tmp_path, monkeypatch, forward).model, TOKENS, BATCH)


def test_a_block_that_writes_to_what_it_is_given_is_refused(tmp_path):
    """Other streams would see it."""
    model = StreamedModel(checkpoint.inspect(save_model(tmp_path, "llama")), CPU)
    states = embed(model, TOKENS, BATCH)
    block = model.open(0)
    run = block.self_attn.forward

    def forward(*args, position_embeddings, **kwargs):
        position_embeddings[0].add_(1)
        return run(*args, position_embeddings=position_embeddings, **kwargs)

    block.self_attn.forward = forward
    with pytest.raises(InputError, match=r"model\.layers\.0: .* the block writes to a tensor that it is given"):
        states.advance(0)


def test_a_block_that_returns_something_else_is_refused(tmp_path):
    model = StreamedModel(checkpoint.inspect(save_model(tmp_path, "llama")), CPU)
    states = embed(model, TOKENS, BATCH)
    block = model.open(0)
    run = block.forward
    block.forward = lambda *args, **kwargs: (run(*args, **kwargs), torch.ones(1))
    with pytest.raises(InputError, match=r"model\.layers\.0: .* does not return the same as other blocks of its class"):
        states.advance(0)
