"""Prune an encoder on batches of its own inputs; here of sentences, and pixels work alike.

python examples/prune_encoder.py                                          # all-MiniLM-L6-v2 on sentences of STS-B
python examples/prune_encoder.py BAAI/bge-small-en-v1.5 bge-60/
"""

import sys

import torch
from datasets import load_dataset
from transformers import AutoModel, AutoTokenizer

from sparsefw import prune


def main(name="sentence-transformers/all-MiniLM-L6-v2", output="encoder-pruned/", sentences=None, **options):
    """Give a list of a thousand of your own sentences; options are those of `prune`."""
    model, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    sentences = sentences or load_dataset("sentence-transformers/stsb", split="train")["sentence1"][:1024]
    # A tower for images takes processor(images=some, return_tensors="pt").
    held_out, *batches = (
        tokenizer(sentences[i : i + 32], padding=True, truncation=True, return_tensors="pt")
        for i in range(0, len(sentences), 32)
    )

    def embeddings():
        with torch.no_grad():
            hidden = model(**held_out).last_hidden_state
        mask = held_out["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    dense = embeddings()
    # In place, and written to the folder with the tokenizer.
    prune(model, output, calibration=batches, tokenizer=tokenizer, **{"sparsity": 0.6} | options)
    cosine = torch.nn.functional.cosine_similarity(dense, embeddings()).mean()
    print(f"cosine of embeddings, pruned and dense, {len(dense)} held-out sentences: {cosine:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
