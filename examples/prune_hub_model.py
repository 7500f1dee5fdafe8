"""Prune a model of the Hub, and write text with what comes out.

python examples/prune_hub_model.py                                        # SmolLM2 on C4
python examples/prune_hub_model.py meta-llama/Llama-3.1-8B llama-60/      # on a GPU
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsefw import prune


def main(model="HuggingFaceTB/SmolLM2-135M-Instruct", output="pruned/", **options):
    """Options are those of `prune`: sparsity="2:4", dataset="my.jsonl", evaluate=["wikitext"], preset="fast"."""
    print(prune(model, output, **{"sparsity": 0.6} | options))

    # The output loads like any other checkpoint.
    tokenizer, pruned = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    tokens = tokenizer("The history of", return_tensors="pt")
    print(tokenizer.decode(pruned.generate(**tokens, max_new_tokens=20)[0]))
    print(f"It has a model card: hf upload YOUR_NAME/YOUR_MODEL {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
