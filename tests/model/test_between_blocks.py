"""What a model's forward does between its blocks is done again with what they really return, or it is refused."""

import re
import zlib

import numpy as np
import pytest
import torch
from helpers.families import TOKENS
from helpers.whole import BATCH, ChangedForward
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparsefw.errors import InputError
from sparsefw.model import embed
from sparsefw.model.flow import Step
from sparsefw.model.values import Value


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
    ChangedForward(tmp_path, monkeypatch, forward).check()


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
        ChangedForward(tmp_path, monkeypatch, forward)
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
        ChangedForward(tmp_path, monkeypatch, forward)
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
        ChangedForward(tmp_path, monkeypatch, forward)


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
    ChangedForward(tmp_path, monkeypatch, forward).check()


def test_another_order_with_other_tokens_is_refused(tmp_path, monkeypatch):
    def forward(blocks, hidden, given):
        for block in blocks if len(hidden) == 1 else reversed(blocks):
            hidden = block(hidden, **given(hidden))
        return hidden

    changed = ChangedForward(tmp_path, monkeypatch, forward)
    with pytest.raises(InputError, match="a block runs differently from one micro-batch to the next"):
        embed(changed.model, TOKENS, BATCH)


def test_a_weight_that_is_multiplied_with_one_is_not_changed(tmp_path, monkeypatch):
    def forward(blocks, hidden, given):
        for block in blocks:
            block.mlp.up_proj.weight.mul_(1)
            hidden = block(hidden, **given(hidden))
        return hidden

    embed(ChangedForward(tmp_path, monkeypatch, forward).model, TOKENS, BATCH)


def test_a_step_in_place_leaves_the_tensor_that_it_is_given():
    """It may be stored, or be another stream's."""
    x = torch.ones(3)
    step = Step(torch.Tensor.mul_, (Value(0), 2), {}, [1], in_place=True)
    ((number, made),) = step.run(lambda leaf: x)
    assert number == 1
    assert torch.equal(made, torch.full((3,), 2.0))
    assert torch.equal(x, torch.ones(3))
