"""What a model's forward does between its blocks is done again with what they really return, or it is refused."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import TOKENS, first_is_fast, save_model
from helpers.whole import BATCH, check_streamed, streamed
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sparsefw.data.batches import token_batch
from sparsefw.model.forward import embed, embed_batches
from sparsefw.model.trace import Trace


def change_forward(monkeypatch, forward):
    """Give Llama another forward around its blocks."""

    def whole(model, input_ids, use_cache=False):
        decoder = model.model

        def given(hidden):
            positions = torch.arange(hidden.shape[1])[None]
            return {"position_embeddings": decoder.rotary_emb(hidden, position_ids=positions)}

        hidden = forward(decoder.layers, decoder.embed_tokens(input_ids), given)
        return SimpleNamespace(logits=model.lm_head(decoder.norm(hidden)))

    monkeypatch.setattr(LlamaForCausalLM, "forward", whole)


def each(step):
    """A forward that calls step(block, hidden, kwargs) for each block."""

    def forward(blocks, hidden, given):
        for block in blocks:
            hidden = step(block, hidden, given(hidden))
        return hidden

    return forward


in_turn = each(lambda block, x, kwargs: block(x, **kwargs))


def skip(blocks, hidden, given):
    """What the first block returns is read after the last one."""
    made = []
    for block in blocks:
        hidden = block(hidden, **given(hidden))
        made.append(hidden)
    return hidden + made[0].tanh()


def two_streams(blocks, hidden, given):
    other = hidden.sin()
    for block in blocks:
        other, hidden = hidden, block(hidden + other, **given(hidden))
    return hidden - other


def in_place_on_its_own(blocks, hidden, given):
    for block in blocks:
        before = hidden
        hidden = block(hidden, **given(hidden)) + hidden
        changed = hidden.cos()
        changed *= 0.5
        changed.add_(before)
        hidden = hidden * changed
        hidden -= before.mean()
    return hidden


def once_more(blocks, hidden, given):
    return in_turn((*blocks, blocks[0]), hidden, given)


def weight_times_one(block, x, kwargs):
    block.mlp.up_proj.weight.mul_(1)
    return block(x, **kwargs)


@pytest.mark.parametrize("forward", [skip, two_streams, in_place_on_its_own, once_more, each(weight_times_one)])
def test_what_is_done_between_blocks_is_done_again(forward, tmp_path, monkeypatch):
    change_forward(monkeypatch, forward)
    check_streamed(save_model(tmp_path, "llama"))


def all_twice(blocks, hidden, given):
    return in_turn((*blocks, *blocks), hidden, given)


def by_value(block, x, kwargs):
    y = block(x, **kwargs)
    return y * 2 if y.sum() > 0 else y


def in_place_by_a_view(block, x, kwargs):
    y = block(x, **kwargs).sin()
    y[:, :1].mul_(2)
    return y


def changed_weight(block, x, kwargs):
    block.mlp.up_proj.weight.mul_(0.5)
    return block(x, **kwargs)


def changed_tensor(blocks, hidden, given):
    shared = given(hidden)
    for block in blocks:
        hidden = block(hidden, **shared)
        shared["position_embeddings"][0].mul_(0.5)
    return hidden


def changed_dict(block, x, kwargs):
    kept = {"last": x}
    y = block(x, kept=kept, **kwargs)
    kept["last"] = y.sin()
    return y


def read_after(blocks, hidden, given):
    kept = {}
    for block in blocks:
        hidden = block(hidden, kept=kept, **given(hidden))
    return hidden + sum(kept.values())


UNSEEN = "what its forward does around its blocks .*in a way that cannot be followed, or on chance"
REFUSED = {
    "in place": (each(lambda block, x, kwargs: block(x, **kwargs).add_(1)), "changes a Tensor that a block was given"),
    "in place by a view": (each(in_place_by_a_view), "layers.*is written to in place"),
    "all twice": (all_twice, r"layers\.0 runs more than once in a forward, and so do all blocks"),
    "by value": (each(by_value), r"layers\.\d: .*branches on the values of its output"),
    "a changed weight": (each(changed_weight), r"layers\.\d.*weight: .*its forward changes this weight of a block"),
    "a changed tensor": (changed_tensor, "its forward changes a Tensor that a block was given"),
    "a tensor that a block changes": (
        each(lambda block, x, kwargs: block(x, writes=True, **kwargs)),
        "changes a Tensor that a block was given",
    ),
    "a changed dict": (each(changed_dict), "its forward changes a dict that a block was given"),
    "a set": (each(lambda block, x, kwargs: block(x, kept={1}, **kwargs)), "its blocks take or return a set"),
    # The comparison of two forwards shows what no call of a torch function does.
    "by chance": (each(lambda block, x, kwargs: block(x, **kwargs) * torch.rand(1)), UNSEEN),
    "an object after": (read_after, UNSEEN),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_again_is_refused(case, tmp_path, monkeypatch):
    """The last block puts what it makes into the object that it is given."""
    forward, message = REFUSED[case]
    run = LlamaDecoderLayer.forward

    def layer(self, hidden, kept=None, writes=False, **kwargs):
        if writes:
            kwargs["position_embeddings"][0].add_(1)
        if isinstance(kept, dict) and self.self_attn.layer_idx == 2:
            kept[self.self_attn.layer_idx] = hidden * 0.1
        return run(self, hidden, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
    change_forward(monkeypatch, forward)
    with refused(message) as caught:
        streamed(save_model(tmp_path, "llama"))
    assert "unsupported model" in str(caught.value)


def test_objects_that_only_blocks_read_may_be_changed(tmp_path, monkeypatch):
    """Each block adds what the one before has put into the dict."""
    run = LlamaDecoderLayer.forward

    def layer(self, hidden, kept, **kwargs):
        hidden = run(self, hidden, **kwargs) + kept.get("last", 0)
        kept["last"] = hidden.sin()
        return hidden

    def forward(blocks, hidden, given):
        kept = {}
        return each(lambda block, x, kwargs: block(x, kept=kept, **kwargs))(blocks, hidden, given)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", layer)
    change_forward(monkeypatch, forward)
    check_streamed(save_model(tmp_path, "llama"))


def test_another_order_with_other_tokens_is_refused(tmp_path, monkeypatch):
    def forward(blocks, hidden, given):
        ordered = blocks if len(hidden) == 1 else [*reversed(blocks)]
        return in_turn(ordered, hidden, given)

    change_forward(monkeypatch, forward)
    model = streamed(save_model(tmp_path, "llama"))
    with refused("a block runs differently from one micro-batch to the next"):
        embed(model, TOKENS, BATCH)


@pytest.mark.parametrize("family", first_is_fast(["gemma3_text", "qwen3_moe"]))
def test_pieces_of_micro_batches_are_views_and_run_as_the_whole(family, tmp_path):
    """The last micro-batch is smaller, and so is its piece. The blocks of the first have masks as large as it."""
    ids, batches = TOKENS[:5], partial(map, token_batch)
    with streamed(save_model(tmp_path, family)) as model, torch.no_grad():
        states = embed_batches(model, batches(ids.split(4)), pieces=batches([ids[:2], ids[:1]]))
        for i in range(len(model.blocks)):
            model.open(i)
            pieces = states.some([1, 0])
            assert pieces.windows == [1, 2, 2]
            assert [x.data_ptr() for x in pieces.hidden][:2] == [x.data_ptr() for x in states.hidden.some([1, 0])]
            found = torch.cat([pieces.next_input(i, j) for j in range(3)])
            states.advance(i)
            torch.testing.assert_close(found, torch.cat([states.hidden[1], states.hidden[0]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "more", [{"batch_dependent": {0}}, {"objects": [{}]}, {"live": {0: [], 1: [1]}}, {"windows_first": False}]
)
def test_micro_batches_with_more_than_hidden_states_are_not_divided(more):
    trace = Trace({}, torch.zeros(1), {0: []})
    assert trace.divisible
    assert not replace(trace, **more).divisible
