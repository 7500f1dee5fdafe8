"""Prune a model inside of llm-compressor, and quantise it in the same recipe.

pip install -e '.[llmcompressor]'
python examples/llmcompressor_recipe.py                                   # SmolLM2, 2:4 and 4 bits
python examples/llmcompressor_recipe.py meta-llama/Llama-3.1-8B llama-2-4-w4a16/
"""

import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from sparsefw.llmcompressor import SparseFWModifier


def main(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    output="pruned-w4a16/",
    dataset="open_platypus",
    **options,
):
    """Options are those of `oneshot`: num_calibration_samples, max_seq_length."""
    recipe = [
        SparseFWModifier(mask_structure="2:4", ignore=["lm_head"]),
        # It rounds each weight by itself, and 0 stays 0. GPTQ moves errors to other weights, removed ones among them.
        QuantizationModifier(targets=["Linear"], scheme="W4A16", ignore=["lm_head"]),
    ]
    oneshot(model=model, recipe=recipe, dataset=dataset, output_dir=output, **options)

    plain = CompressedTensorsConfig(run_compressed=False)
    loaded = AutoModelForCausalLM.from_pretrained(output, quantization_config=plain)
    for name, weight in loaded.named_parameters():
        if "layers.0." in name and weight.dim() == 2:
            print(f"{name}: {(weight == 0).float().mean():.1%} zeros")


if __name__ == "__main__":
    main(*sys.argv[1:])
