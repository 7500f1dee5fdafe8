"""A mixture of experts that puts out what a Llama does: `python bench/quality/checkpoint_mixture.py LLAMA DIR`.

No mixture that has learned a language is small enough for a study on a CPU. Here each MLP in the first blocks of a
Llama is copied into several experts of a Mixtral, and a random router sends every token to one of them. So the dense
model is the Llama, cut to these blocks, and each expert sees a part of the tokens, as in a real mixture.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

# The fields of the Llama's config that the mixture takes over.
SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


@torch.no_grad()
def build_mixture(source: Path, folder: Path, *, blocks: int, experts: int) -> None:
    """Write the mixture, and the tokenizer beside it.

    Args:
        source: checkpoint of a Llama without biases.
        folder: the mixture goes there.
        blocks: number of its blocks, the Llama's first ones.
        experts: number of experts in each.
    """
    llama = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    own = {name: getattr(llama.config, name) for name in SAME}
    config = MixtralConfig(**own, num_hidden_layers=blocks, num_local_experts=experts, num_experts_per_tok=1)
    mixture = MixtralForCausalLM(config).to(llama.dtype)
    generator = torch.Generator().manual_seed(0)
    for block, made in zip(llama.model.layers, mixture.model.layers, strict=False):
        for name in ("self_attn", "input_layernorm", "post_attention_layernorm"):
            _copy(getattr(block, name), getattr(made, name))
        made.mlp.experts.gate_up_proj.copy_(torch.cat([block.mlp.gate_proj.weight, block.mlp.up_proj.weight]))
        made.mlp.experts.down_proj.copy_(block.mlp.down_proj.weight)
        made.mlp.gate.weight.copy_(torch.randn(made.mlp.gate.weight.shape, generator=generator))
    for name in ("embed_tokens", "norm"):
        _copy(getattr(llama.model, name), getattr(mixture.model, name))
    _copy(llama.lm_head, mixture.lm_head)
    mixture.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _copy(module: nn.Module, other: nn.Module) -> None:
    other.load_state_dict(module.state_dict())


def main(argv: list[str] | None = None) -> None:
    """Write the mixture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="LLAMA", help="checkpoint of a Llama")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the mixture goes there")
    parser.add_argument("--blocks", type=int, default=4, metavar="N", help="number of its blocks (default: 4)")
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="number of experts (default: 8)")
    arguments = parser.parse_args(argv)
    build_mixture(arguments.source, arguments.folder, blocks=arguments.blocks, experts=arguments.experts)


if __name__ == "__main__":
    main()
