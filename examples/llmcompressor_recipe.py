"""Prune a model inside of llm-compressor, and quantise it in the same recipe.

pip install -e '.[llmcompressor]'
python examples/llmcompressor_recipe.py                                   # SmolLM2, 2:4 and FP8
python examples/llmcompressor_recipe.py meta-llama/Llama-3.1-8B llama-2-4-fp8/
"""

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from sparsefw.llmcompressor import SparseFWModifier


def main(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    output="pruned-fp8/",
    dataset="open_platypus",
    **options,
):
    """Options are those of `oneshot`: num_calibration_samples, max_seq_length."""
    recipe = [
        SparseFWModifier(mask_structure="2:4", ignore=["lm_head"]),
        # It rounds each weight by itself, and 0 stays 0. GPTQModifier moves errors on to removed weights, too.
        QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC", ignore=["lm_head"]),
    ]
    oneshot(model=model, recipe=recipe, dataset=dataset, output_dir=output, **options)

    for name, module in AutoModelForCausalLM.from_pretrained(output).named_modules():
        if "layers.0." in name and isinstance(module, torch.nn.Linear):
            print(f"{name}: {(module.weight.float() == 0).float().mean():.1%} zeros, {module.weight.dtype}")


if __name__ == "__main__":
    main(*sys.argv[1:])
