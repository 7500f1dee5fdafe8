"""The mixture of the quality study puts out what the model does that it is made of."""

import checkpoint_mixture
import torch
from helpers.families import TOKENS, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def test_the_mixture_puts_out_what_the_llama_does(tmp_path):
    source = save_model(tmp_path / "llama", "llama", num_hidden_layers=2)
    checkpoint_mixture.main([str(source), str(tmp_path / "mixture"), "--blocks", "2", "--experts", "3"])
    llama, mixture = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("llama", "mixture"))
    expected, returned = llama(TOKENS).logits, mixture(TOKENS, output_router_logits=True)
    torch.testing.assert_close(returned.logits, expected)
    sent = [logits.argmax(-1).bincount(minlength=3) for logits in returned.router_logits]
    # Each expert has some of the tokens in both blocks.
    assert len(sent) == 2
    assert all(counts.min() > 0 for counts in sent)
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("llama", "mixture")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


@torch.no_grad()
def test_fewer_blocks(tmp_path):
    source = save_model(tmp_path / "llama", "llama")
    checkpoint_mixture.build_mixture(source, tmp_path / "mixture", blocks=1, experts=2)
    llama, mixture = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("llama", "mixture"))
    llama.model.layers = llama.model.layers[:1]
    torch.testing.assert_close(mixture(TOKENS).logits, llama(TOKENS, use_cache=False).logits)
