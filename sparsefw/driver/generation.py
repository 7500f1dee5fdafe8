"""Calibration text that the dense model writes itself: `--dataset self`.

A window is one sequence, sampled token by token. It goes on behind the end of a document, as packed documents do. Half
of the windows begin with the model's first token. The others are conversations, if the tokenizer has a chat template:
the template begins the user's turn, the model writes it and then the answer, and the next conversation follows.

A window's draws depend on the seed and its number alone, whatever is written beside it. Last bits of what the model
predicts depend on the machine, as those of a run do. So a run that goes on takes the text that it has begun with.
"""

import json
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sparsefw.data.text import SELF
from sparsefw.data.tokens import Tokenizer, start_tokens, tokenize
from sparsefw.errors import errors_in_one_line, option
from sparsefw.model.block_model import BlockModel

# Logits are divided by the temperature. A token is one of the likeliest, which have this probability together.
TEMPERATURE, TOP_P = 0.8, 0.95

# A token is drawn this many times at most until it is one of them; then it is the likeliest.
DRAWS = 4

# Between documents, in many models whose tokenizer puts nothing before a text.
SEPARATOR = "<|endoftext|>"

# Takes a token that was sampled, and yields the one that is written.
Row = Generator[int, int, None]


def own_source(seed: int) -> str:
    """The name of the text, for the report and for messages."""
    return f"{SELF} (T={TEMPERATURE:g}, top_p={TOP_P:g}, seed {seed})"


def write_tokens(
    model: BlockModel, tokenizer: Tokenizer, n: int, seqlen: int, seed: int, batch: int, say: Callable[[str], None]
) -> Tensor:
    """Have the dense model write windows.

    Args:
        model: the model, all of whose weights are on the device meanwhile.
        tokenizer: its tokenizer.
        n, seqlen: number of windows, and tokens in each.
        seed: seed of all draws.
        batch: windows that are written at once.
        say: called with every line of the log.

    Returns:
        (n, seqlen) int64 on the host.

    Raises:
        InputError: the model writes no text.
    """
    writer: Any = model.model
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(n, seqlen, DRAWS, generator=generator, dtype=torch.float64)
    begins = [partial(_document, _first_token(tokenizer))] * n
    if conversation := _conversation(tokenizer, say):
        for i in torch.randperm(n, generator=generator)[: n // 2].tolist():
            begins[i] = partial(_chat, *conversation)
    ids = list[Tensor]()
    say(f"calibration text: the model writes {n} windows of {seqlen} tokens, {min(n, batch)} at a time")
    with model.whole(), errors_in_one_line(f"{option('dataset', SELF)}: {type(writer).__name__} cannot write text"):
        own = writer.generation_config
        try:
            # Entries of the model's own would be taken where others are not given.
            writer.generation_config = GenerationConfig()
            for some in (slice(start, start + batch) for start in range(0, n, batch)):
                ids.append(_write(writer, [begin() for begin in begins[some]], draws[some].to(model.device)))
                say(f"calibration text: {sum(map(len, ids))} of {n} windows are written")
        finally:
            writer.generation_config = own
    return torch.cat(ids)


def _write(writer: Any, rows: Sequence[Row], draws: Tensor) -> Tensor:
    """The windows of a batch, (rows, seqlen), by (rows, seqlen, DRAWS) draws."""
    first = torch.tensor([next(row) for row in rows], device=draws.device)[:, None]
    # A cache that grows is copied with every token; not all models have another.
    config = dict(cache_implementation="static" if writer._can_compile_fullgraph else None, disable_compile=True)
    return writer.generate(
        first,
        attention_mask=torch.ones_like(first),
        generation_config=GenerationConfig(max_new_tokens=draws.shape[1] - 1, do_sample=False, **config),
        logits_processor=LogitsProcessorList([_Sampler(rows, draws)]),
    ).cpu()


class _Sampler(LogitsProcessor):
    """Samples the next token of each row, and lets the row decide: all other logits become minus infinity."""

    def __init__(self, rows: Sequence[Row], draws: Tensor) -> None:
        self._rows, self._draws = rows, draws

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        likely = (scores.float() / TEMPERATURE).softmax(-1)
        sums = likely.cumsum(-1, dtype=torch.float64)
        # Tokens are drawn from all until one is of the likeliest, which takes less time than to sort them.
        sampled = likely.argmax(-1, keepdim=True)
        rejected = torch.ones_like(sampled, dtype=torch.bool)
        for draws in self._draws[:, input_ids.shape[1]].split(1, dim=1):
            found = torch.searchsorted(sums, draws * sums[:, -1:]).clamp(max=scores.shape[1] - 1)
            # The probability of all tokens that are likelier.
            accepted = likely.where(likely > likely.gather(1, found), 0).sum(-1, keepdim=True) < TOP_P
            sampled = found.where(rejected & accepted, sampled)
            rejected &= ~accepted
            if not rejected.any():
                break
        chosen = [[row.send(token)] for row, (token,) in zip(self._rows, sampled.tolist(), strict=True)]
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.tensor(chosen, device=scores.device), 0)


def _document(begin: int) -> Row:
    """A row of documents: what is sampled is written."""
    token = begin
    while True:
        token = yield token


def _chat(header: list[int], middle: list[int], closing: list[int]) -> Row:
    """A row of conversations; arguments as `_conversation` returns them."""
    sampled, before = 0, list[int]()
    while True:
        # The first token of what follows ends a turn.
        for turn, end in ((before + header, middle[0]), (middle, closing[0])):
            for token in turn:
                sampled = yield token
            while sampled != end:
                sampled = yield sampled
        before = closing


def _first_token(tokenizer: Tokenizer) -> int:
    """The token that documents begin with."""
    vocabulary, named = tokenizer.get_vocab(), (SEPARATOR, tokenizer.bos_token, tokenizer.eos_token)
    return [*start_tokens(tokenizer), *(vocabulary[token] for token in named if token in vocabulary), 0][0]


def _conversation(tokenizer: Tokenizer, say: Callable[[str], None]) -> list[list[int]] | None:
    """The template's tokens before the user's turn, between it and the answer, and behind that.

    None if the tokenizer has no template, or one whose turns do not end with a token of their own, which is said.
    """
    if not tokenizer.chat_template:
        return None
    marks = "USERTURN", "ANSWER"
    turns = [dict(role="user", content=marks[0]), dict(role="assistant", content=marks[1])]
    with errors_in_one_line(f"{option('dataset', SELF)}: the chat template fails; give a text, or remove it"):
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    header, _, middle = str(asked).partition(marks[0])
    parts = tokenize(tokenizer, [header, middle, str(whole).partition(marks[1])[2]])
    if all(parts) and {parts[1][0], parts[2][0]} <= tokenizer.added_tokens_decoder.keys():
        return parts
    # Markers that are plain text are sampled in other tokens as well.
    say("note: turns of the chat template end with no token of their own: no conversations are written")
    return None


def records_of(tokenizer: Tokenizer, ids: Tensor) -> str:
    """The content of OWN_TEXT for windows of tokens."""
    records = (dict(text=tokenizer.decode(row), input_ids=row) for row in ids.tolist())
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def tokens_in(path: Path) -> Tensor:
    """The windows of OWN_TEXT.

    Raises:
        InputError: it is damaged.
    """
    with errors_in_one_line(f"{path}: damaged; {option('restart', True)} discards the unfinished run"):
        return torch.tensor([json.loads(line)["input_ids"] for line in path.read_text("utf-8").split("\n")[:-1]])
