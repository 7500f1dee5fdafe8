"""Logits from hidden states after the last block, and the divergence of predictions with its gradient."""

import pytest
import torch
from helpers.families import TOKENS, first_is_fast, save_model
from helpers.whole import streamed

from sparsefw.data.batches import token_batch
from sparsefw.model import forward, head
from sparsefw.model.forward import embed
from sparsefw.model.head import add_divergence, logits_of_batch

IDS = TOKENS[:1, :10]


@pytest.mark.parametrize("tokens", [0.5, 3, 100])
def test_divergence_and_gradient(tokens, monkeypatch):
    """In pieces of a number of tokens, of one at least. Some tokens never come: their logits are -inf."""
    monkeypatch.setitem(head.PIECE, "cpu", int(tokens * 50))
    p, q = 3 * torch.randn(2, 1, 7, 50, generator=torch.Generator().manual_seed(0))
    p[..., 9:20] = q[..., 9:20] = -torch.inf
    exact = q.double().requires_grad_()
    log_p, log_q = p.double().log_softmax(-1), exact.log_softmax(-1)
    wanted = (log_p.exp() * (log_p - log_q))[..., log_p[0, 0].isfinite()].sum()
    wanted.backward()
    total = torch.zeros(())
    add_divergence(total, before := p.clone(), q, replace=False)
    assert torch.equal(before, p)
    add_divergence(total, p, q, replace=True)
    assert total.item() == pytest.approx(2 * wanted.item(), rel=1e-5)
    torch.testing.assert_close(p.double(), exact.grad.nan_to_num(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", first_is_fast(["gemma2", "llama"]))
def test_what_is_done_after_the_last_block_is_done_again_with_the_same_bits(family, tmp_path, monkeypatch):
    """The model's own forward runs once for each shape."""
    run, runs, found = forward.run_with_stubs, [], []
    with streamed(save_model(tmp_path, family)) as model, model.outside_loaded():
        width = embed(model, IDS, 1).hidden[0].shape[-1]
        hidden = torch.randn(1, IDS.shape[1], width, generator=torch.Generator().manual_seed(1))

        def differentiated(some=slice(None)):
            x = hidden[:, some].clone().requires_grad_()
            logits = logits_of_batch(model, token_batch(IDS[:, some]), x, {})
            logits.square().mean().backward()
            return logits.detach(), x.grad

        monkeypatch.setattr(forward, "run_with_stubs", lambda *args: runs.append(args) or run(*args))
        found = [differentiated(), differentiated()]
        differentiated(slice(None, None, 3))
        assert len(runs) == 2
        monkeypatch.setattr(head, "logits_after_blocks", lambda *args: forward.run_after_blocks(*args, {}).logits)
        found.append(differentiated())
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
