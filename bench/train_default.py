"""Train the built-in model: `python bench/train_default.py [OUTPUT]`, some five minutes of one CPU core.

It makes a byte-level BPE tokenizer and a small Llama, both from `training_text`. The model is small and is trained for
long, so that it has few weights to spare and pruning shows. Validation windows of the training text decide which step
is kept. `python -m sparsefw.evaluate default --eval default --seqlen 128` tells the held-out perplexity.

The seed and a single thread fix the bytes of the result, on one kind of CPU, one version of torch and one version of
Python's topics.
"""

import argparse
import math
import sys
from pathlib import Path

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsefw.default.text import training_text
from sparsefw.inputs import DEFAULT_MODEL

END = "<|endoftext|>"
STEPS, WARMUP, BATCH, SEQLEN, VALIDATION_SEQLEN = 1500, 100, 6, 256, 128
VALIDATION_EVERY = 200
# The last rate is a fraction of the first one.
LEARNING_RATE, LAST_LEARNING_RATE = 8e-3, 0.02
# Share of each layer's output that is dropped in training. The text is small and seen 21 times: without dropout,
# validation perplexity gets down to 61 instead of 48. A wider model at 0.1 has weights to spare: one of three times the
# width lost 6 to 9 % by 60 % pruning, after 700 of 1200 steps; this one loses 80 to 90 %.
DROPOUT = 0.05


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; it can write any text and adds no special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=1024, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(**options))
    special = dict(bos_token=END, eos_token=END, clean_up_tokenization_spaces=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=SEQLEN, **special)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the random model. In training it drops a share of what the embedding and every layer add to the stream."""
    sizes = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, max_position_embeddings=SEQLEN, vocab_size=len(tokenizer))
    special = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **special, **sizes))

    def drop(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, DROPOUT, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)
    return model


def windows(ids: Tensor) -> Tensor:
    """Cut tokens into consecutive windows, (n, VALIDATION_SEQLEN); the rest is left out."""
    return ids[: len(ids) // VALIDATION_SEQLEN * VALIDATION_SEQLEN].view(-1, VALIDATION_SEQLEN)


def losses(model: LlamaForCausalLM, rows: Tensor, reduction: str) -> Tensor:
    """Compute the loss of every token of `rows` (n, seqlen) but the first of its window: the sum or the mean."""
    logits = model(rows).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Compute the perplexity of windows (n, seqlen)."""
    model.eval()
    total = sum(losses(model, batch, "sum").item() for batch in rows.split(32))
    return math.exp(total / rows[:, 1:].numel())


def learning_rate(step: int) -> float:
    """Compute the learning rate: linear warm-up, then a cosine down to the last rate; steps count from 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS))
    return LEARNING_RATE * min(step / WARMUP, 1.0) * (LAST_LEARNING_RATE + (1 - LAST_LEARNING_RATE) * cosine)


def train(model: LlamaForCausalLM, ids: Tensor) -> None:
    """Train on tokens (n,), and leave the model at the step with the best validation perplexity."""
    pieces = ids.chunk(32)
    validation = torch.cat([windows(pieces[7]), windows(pieces[23])])
    fit = torch.cat([*pieces[:7], *pieces[8:23], *pieces[24:]])
    # Weight decay on matrices only.
    matrices, others = ([p for p in model.parameters() if (p.ndim >= 2) is large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(0)
    best, best_state = math.inf, {}
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        offsets = torch.randint(len(fit) - SEQLEN + 1, (BATCH, 1), generator=draw)
        model.train()
        loss = losses(model, fit[offsets + torch.arange(SEQLEN)], "mean")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % VALIDATION_EVERY == 0 or step == STEPS:
            current = perplexity(model, validation)
            print(f"step {step}: loss {loss.item():.3f}, validation perplexity {current:.3f}", flush=True)
            if current < best:
                best, best_state = current, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_state)


def main(output: Path) -> None:
    """Train, and save in bf16."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = training_text()
    tokenizer = train_tokenizer(text)
    model = make_model(tokenizer)
    train(model, torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
    # The annotation of `to` is lost in a decorator of transformers.
    model.to(torch.bfloat16).save_pretrained(output)  # type: ignore[arg-type]
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=DEFAULT_MODEL, help="folder (default: the shipped one)")
    main(parser.parse_args().output)
