"""Time the text that a packed or dense checkpoint generates: `python bench/runs/packed.py CHECKPOINT DTYPE [THREADS]`.

It prints the seconds to load the checkpoint, the memory of the process, and tokens a second of greedy text. Products
with packed matrices are timed by `python -m bench packed_product`.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
import torch
from transformers import AutoModelForCausalLM

import sparsefw.packed  # noqa: F401  # tells transformers how to load packed checkpoints

TOKENS = 64


def main(checkpoint: str, dtype: str, threads: str = "1") -> None:
    """Load the checkpoint, and generate text."""
    torch.set_num_threads(int(threads))
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    print(f"loaded in {time.perf_counter() - begin:.1f} s")
    prompt = torch.arange(1, 17).view(1, 16)
    # The first tokens warm up.
    for tokens in (4, TOKENS):
        begin = time.perf_counter()
        model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        rate = tokens / (time.perf_counter() - begin)
    print(f"{psutil.Process().memory_full_info().uss / 1e9:.2f} GB, {rate:.2f} tokens a second")


if __name__ == "__main__":
    main(*sys.argv[1:])
