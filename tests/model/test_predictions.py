"""The divergence of predicted tokens, and its gradient by hidden states."""

import pytest
import torch
from helpers.families import TOKENS, first_is_fast, save_model
from helpers.tensors import assert_equal
from helpers.whole import streamed
from transformers import AutoModelForCausalLM

from sparsefw.estimate.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.estimate.steps import tokens_and_steps
from sparsefw.model import forward, head
from sparsefw.model.forward import embed
from sparsefw.model.head import divergence, logits_are_tokenwise, tokens_of_pass

IDS = TOKENS[:3, :10]


@pytest.fixture(params=first_is_fast(["gemma2", "llama"]))
def opened(request, tmp_path):
    """A model, and hidden states after its last block, when it is pruned and when it is dense. One caps its logits."""
    kinds = {"layer_types": ["full_attention"]} if request.param == "gemma2" else {}
    source = save_model(tmp_path, request.param, num_hidden_layers=1, **kinds)
    model, generator = streamed(source), torch.Generator().manual_seed(1)
    states = embed(model, IDS, 2)
    hidden, dense = 3 * torch.randn(2, *IDS.shape, states.hidden[0].shape[-1], generator=generator)
    with model.outside_loaded():
        yield source, model, states, hidden, dense


def expected(source, hidden, dense, kept=slice(None)):
    """sum p (log p - log q), by transformers' own final norm and head, in double, over the tokens of `kept`."""
    model = AutoModelForCausalLM.from_pretrained(source).double()
    cap = getattr(model.config, "final_logit_softcapping", None)

    def log_probabilities(x):
        z = model.lm_head(model.model.norm(x))
        return (cap * (z / cap).tanh() if cap else z)[..., kept].log_softmax(-1)

    log_q, log_p = map(log_probabilities, (hidden, dense))
    return (log_p.exp() * (log_p - log_q)).sum()


@pytest.mark.parametrize("tokens", [0.5, 3, 100])
def test_divergence_and_gradient(tokens, opened, monkeypatch):
    """In pieces of a number of tokens, of one token at least."""
    source, model, states, hidden, dense = opened
    monkeypatch.setitem(head.PIECE, "cpu", int(tokens * model.model.config.vocab_size))
    assert logits_are_tokenwise(states, IDS, 1)
    x, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found, wanted = divergence(model, IDS, x, dense), expected(source, exact, dense.double())
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    # The gradient is scaled by what comes after the divergence.
    (7 * found).backward()
    (7 * wanted).backward()
    assert torch.allclose(x.grad.double(), exact.grad, rtol=1e-3, atol=1e-5 * exact.grad.abs().max().item())


def test_what_is_done_after_the_last_block_is_done_again_with_the_same_bits(opened, monkeypatch):
    """The model's own forward runs once for each shape."""
    _, model, _, hidden, dense = opened
    run, runs, found = forward.run_with_stubs, [], []

    def differentiated():
        x = hidden[:1].clone().requires_grad_()
        value = divergence(model, IDS[:1], x, dense[:1])
        value.backward()
        return value, x.grad

    monkeypatch.setattr(forward, "run_with_stubs", lambda *args: runs.append(args) or run(*args))
    found = [differentiated(), differentiated()]
    divergence(model, IDS[:1, ::3], hidden[:1, ::3], dense[:1, ::3])
    assert len(runs) == 2
    monkeypatch.setattr(head, "logits_after_blocks", lambda *args: forward.run_after_blocks(*args, {}).logits)
    for again in found:
        assert_equal(again, differentiated())


# By the sizes of the head and of the block's layers: small models; large vocabularies; a model of 70B.
@pytest.mark.parametrize(
    ("head_size", "layer", "seqlen", "every", "rounds"),
    [
        ((1024, 64), 49_152, 1, 1, [100]),
        ((1024, 64), 49_152, 2050, 8, [200]),
        ((49_152, 576), 3_540_000, 128, 2, [100, 30]),
        ((262_144, 640), 5_600_000, 2048, 32, [100, 77]),
        ((128_256, 8192), 856_000_000, 256, 1, [100]),
    ],
)
def test_passes_look_at_all_tokens_in_turn(head_size, layer, seqlen, every, rounds):
    """A step looks at some tokens of a window where the head costs more than the block."""
    vocabulary, hidden = head_size
    block = BlockShape(0, (), (LayerShape("linear", layer, 1, "linear"),))
    shape = ModelShape((block,), 0, hidden, vocabulary, 0, 2, 2, 0, (), ())
    assert tokens_and_steps(shape, seqlen, 100) == (every, rounds)
    passes = [[*range(seqlen)[tokens_of_pass(n, every)]] for n in range(2 * every)]
    assert min(map(len, passes)) >= min(seqlen, 8)
    assert sorted(n for tokens in passes[:every] for n in tokens) == [*range(seqlen)]
    assert passes[every:] == passes[:every]


def test_tokens_that_never_come_count_nothing(opened):
    """Some models mask tokens of their vocabulary, such as those of images."""
    source, model, _, hidden, dense = opened
    masked = torch.zeros(model.model.config.vocab_size)
    masked[7:90] = -torch.inf
    hook = model.model.lm_head.register_forward_hook(lambda module, args, out: out + masked)
    x = hidden.clone().requires_grad_()
    found = divergence(model, IDS, x, dense)
    found.backward()
    hook.remove()
    # A cap comes after the head.
    if not getattr(model.model.config, "final_logit_softcapping", None):
        wanted = expected(source, hidden.double(), dense.double(), masked.isfinite())
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert torch.isfinite(found)
    assert torch.isfinite(x.grad).all()
    assert x.grad.any()


def test_heads_that_do_not_predict_token_by_token(opened, monkeypatch):
    """One mixes tokens; others are of a classifier, or return none."""
    _, model, states, *_ = opened
    assert logits_are_tokenwise(states, IDS, 2)
    mixed = model.model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].cumsum(1),))
    model.after_blocks.clear()
    assert not logits_are_tokenwise(states, IDS, 2)
    mixed.remove()
    for logits in (torch.zeros(1, 3), torch.zeros(1, 1, 250), None):
        monkeypatch.setattr(head, "logits", lambda *args, x=logits: x)
        assert not logits_are_tokenwise(states, IDS, 1)
