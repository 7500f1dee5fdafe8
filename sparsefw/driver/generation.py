"""Calibration text that the dense model generates itself: `--dataset self`, or `self=PROMPTS` to answer prompts.

A window is one sequence, sampled token by token. It begins with the model's first token, and when a document ends, the
next one begins.

With prompts, a window begins with a prompt. The model answers it, and when the answer ends, the next prompt follows;
after the last prompt, the first one.

The random numbers of a window depend only on the seed and the window's number. But the last bits of the model's
predictions depend on the machine. So a resumed run takes the text of the unfinished run.
"""

import json
from collections.abc import Collection, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sparsefw.data.records import Records
from sparsefw.data.text import SELF, read_text
from sparsefw.data.tokens import Tokenizer, start_tokens, tokenize
from sparsefw.errors import InputError, Say, counted, errors_in_one_line, option
from sparsefw.model.block_model import BlockModel

# Logits are divided by TEMPERATURE. Tokens are drawn from the likeliest ones, whose probabilities add up to TOP_P.
TEMPERATURE, TOP_P = 0.8, 0.95

# Less likely tokens are never drawn. To find the LIKELIEST takes less time than to sort all tokens.
LIKELIEST = 4096

# Prompts that are read for each window, at most.
PROMPTS = 16

# The token between documents in many models whose tokenizer puts no token before a text.
SEPARATOR = "<|endoftext|>"

# The state of a window: a generator that receives each sampled token and yields the token to append to the window.
Row = Generator[int, int, None]


def write_tokens(
    model: BlockModel,
    tokenizer: Tokenizer,
    n: int,
    seqlen: int,
    seed: int,
    batch: int,
    say: Say,
    name: str = SELF,
) -> Tensor:
    """Generate windows of tokens by the dense model.

    Args:
        model: the model. All of its weights are on the device during the call.
        tokenizer: the model's tokenizer.
        n, seqlen: number of windows, and tokens in each window.
        seed: seed of all random numbers.
        batch: number of windows that are generated in one batch.
        say: called with every line of the log.
        name: SELF, or SELF=PROMPTS for answers to the documents of the text PROMPTS, see `read_text`.

    Returns:
        (n, seqlen) int64 on the host.

    Raises:
        InputError: the model cannot generate text, or there are no prompts in the text.
    """
    writer: Any = model.model
    draws = torch.rand(n, seqlen, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    begins = [partial(_document, _first_token(tokenizer))] * n
    if "=" in name:
        prompts = _prompts(tokenizer, name.partition("=")[2], PROMPTS * n, seqlen, say)
        # The model names the tokens that end an answer, one or several.
        end = getattr(writer.generation_config, "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
        # Every window begins at another place of the prompts.
        begins = [partial(_answers, prompts, i * len(prompts) // n, ends) for i in range(n)]
    ids = list[Tensor]()
    say(f"calibration text: the model generates {n} windows of {seqlen} tokens, {min(n, batch)} at a time")
    with model.whole(), errors_in_one_line(f"{option('dataset', SELF)}: {type(writer).__name__} cannot generate text"):
        own = writer.generation_config
        try:
            # Emptied, since `generate` takes values that our config leaves out from the model's own config.
            writer.generation_config = GenerationConfig()
            for some in (slice(start, start + batch) for start in range(0, n, batch)):
                ids.append(_generate(writer, [begin() for begin in begins[some]], draws[some].to(model.device)))
                say(f"calibration text: {sum(map(len, ids))} of {n} windows are generated")
        finally:
            writer.generation_config = own
    return torch.cat(ids)


def _generate(writer: Any, rows: Sequence[Row], draws: Tensor) -> Tensor:
    """Generate the windows of a batch, (rows, seqlen). `draws` are random numbers in [0, 1), (rows, seqlen)."""
    first = torch.tensor([next(row) for row in rows], device=draws.device)[:, None]
    config = GenerationConfig(
        max_new_tokens=draws.shape[1] - 1,
        do_sample=False,
        # A dynamic cache is copied with every token, but not all models have a static one.
        cache_implementation="static" if writer._can_compile_fullgraph else None,
        disable_compile=True,
    )
    return writer.generate(
        first,
        attention_mask=torch.ones_like(first),
        generation_config=config,
        logits_processor=LogitsProcessorList([_Sampler(rows, draws)]),
    ).cpu()


class _Sampler(LogitsProcessor):
    """Sampler that draws the next token of each row. The row may replace this token. All other logits become -inf."""

    def __init__(self, rows: Sequence[Row], draws: Tensor) -> None:
        self._rows, self._draws = rows, draws

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        logits, tokens = scores.float().topk(min(LIKELIEST, scores.shape[1]))
        likely = (logits / TEMPERATURE).softmax(-1, dtype=torch.float64)
        # A token belongs to the nucleus if all likelier ones together have a probability below TOP_P.
        sums = likely.where(likely.cumsum(-1) - likely < TOP_P, 0).cumsum(-1)
        places = torch.searchsorted(sums, sums[:, -1:] * self._draws[:, input_ids.shape[1], None])
        sampled = tokens.gather(1, places)
        chosen = [[row.send(token)] for row, (token,) in zip(self._rows, sampled.tolist(), strict=True)]
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.tensor(chosen, device=scores.device), 0)


def _document(token: int) -> Row:
    """Yield the tokens of documents: first this one, then every sampled token."""
    while True:
        token = yield token


def _answers(prompts: Sequence[list[int]], n: int, ends: Collection[int | None]) -> Row:
    """Yield the tokens of prompts from the nth on, and after each those of the model's answer, up to one of `ends`."""
    while True:
        for token in prompts[n % len(prompts)]:
            sampled = yield token
        while sampled not in ends:
            sampled = yield sampled
        yield sampled
        n += 1


def _prompts(tokenizer: Tokenizer, name: str, most: int, seqlen: int, say: Say) -> list[list[int]]:
    """Read the tokens of at most `most` prompts, all shorter than a window."""
    records = Records(tokenizer, answered=True)
    _, documents = read_text(name, "train", records)
    begin, found, long = start_tokens(tokenizer), list[list[int]](), 0
    for (ids,) in (tokenize(tokenizer, ["".join(document)]) for document in documents):
        # A chat template may have written the start token.
        prompt = ids if ids[: len(begin)] == begin else [*begin, *ids]
        long += len(prompt) >= seqlen
        if ids and len(prompt) < seqlen:
            found.append(prompt)
        if len(found) == most:
            break
    records.tell(name, say)
    if long:
        say(f"note: {name}: left out {counted(long, 'prompt')} of {seqlen} tokens or more")
    if not found:
        raise InputError(f"{name}: no prompts of fewer than {seqlen} tokens; give shorter ones")
    return found


def _first_token(tokenizer: Tokenizer) -> int:
    """Find the token that documents begin with."""
    vocabulary, named = tokenizer.get_vocab(), (SEPARATOR, tokenizer.bos_token, tokenizer.eos_token)
    return [*start_tokens(tokenizer), *(vocabulary[token] for token in named if token in vocabulary), 0][0]


def records_of(tokenizer: Tokenizer, ids: Tensor) -> str:
    """Make the content of the file OWN_TEXT: a JSON record of each window of tokens."""
    records = (dict(text=tokenizer.decode(row), input_ids=row) for row in ids.tolist())
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def tokens_in(path: Path) -> Tensor:
    """Read the windows of tokens in a file OWN_TEXT.

    Raises:
        InputError: the file is damaged.
    """
    with errors_in_one_line(f"{path}: damaged; {option('restart', True)} discards the unfinished run"):
        return torch.tensor([json.loads(line)["input_ids"] for line in path.read_text("utf-8").split("\n")[:-1]])
