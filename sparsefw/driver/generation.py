"""Calibration text that the dense model writes itself: `--dataset self`.

A window is one sequence, sampled token by token; after the end of a document another document follows. Half of the
windows begin with the model's first token. If the tokenizer has a chat template, the others are conversations: the
template begins the user's turn, the model writes the turn and then the answer, and the next conversation follows.

The draws of a window depend only on the seed and the window's number. The last bits of the model's predictions depend
on the machine, so that a resumed run takes the text of the unfinished one.
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

# Logits are divided by TEMPERATURE. Tokens are drawn from the likeliest, whose probabilities add up to TOP_P.
TEMPERATURE, TOP_P = 0.8, 0.95

# A token is drawn at most this many times until it is one of these; after that the likeliest is taken.
DRAWS = 4

# The token between documents in many models whose tokenizer puts no token before a text.
SEPARATOR = "<|endoftext|>"

# The state of a window: is sent each sampled token, and yields the token that is written.
Row = Generator[int, int, None]


def own_source(seed: int) -> str:
    """Name the text, for the report and for messages."""
    return f"{SELF} (T={TEMPERATURE:g}, top_p={TOP_P:g}, seed {seed})"


def write_tokens(
    model: BlockModel, tokenizer: Tokenizer, n: int, seqlen: int, seed: int, batch: int, say: Callable[[str], None]
) -> Tensor:
    """Have the dense model write windows.

    Args:
        model: the model; all of its weights are on the device until the windows are written.
        tokenizer: the model's tokenizer.
        n, seqlen: number of windows, and tokens in each.
        seed: seed of all draws.
        batch: number of windows that are written at once.
        say: called with every line of the log.

    Returns:
        (n, seqlen) int64 on the host.

    Raises:
        InputError: the model cannot generate text.
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
            # The model's own config would fill the entries that are missing in ours.
            writer.generation_config = GenerationConfig()
            for some in (slice(start, start + batch) for start in range(0, n, batch)):
                ids.append(_write(writer, [begin() for begin in begins[some]], draws[some].to(model.device)))
                say(f"calibration text: {sum(map(len, ids))} of {n} windows are written")
        finally:
            writer.generation_config = own
    return torch.cat(ids)


def _write(writer: Any, rows: Sequence[Row], draws: Tensor) -> Tensor:
    """Write the windows of a batch, (rows, seqlen), by (rows, seqlen, DRAWS) draws."""
    first = torch.tensor([next(row) for row in rows], device=draws.device)[:, None]
    # A dynamic cache is copied with every token, but not all models have a static one.
    config = dict(cache_implementation="static" if writer._can_compile_fullgraph else None, disable_compile=True)
    return writer.generate(
        first,
        attention_mask=torch.ones_like(first),
        generation_config=GenerationConfig(max_new_tokens=draws.shape[1] - 1, do_sample=False, **config),
        logits_processor=LogitsProcessorList([_Sampler(rows, draws)]),
    ).cpu()


class _Sampler(LogitsProcessor):
    """A sampler that draws the next token of each row and lets the row replace it: all other logits become -inf."""

    def __init__(self, rows: Sequence[Row], draws: Tensor) -> None:
        self._rows, self._draws = rows, draws

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        likely = (scores.float() / TEMPERATURE).softmax(-1)
        sums = likely.cumsum(-1, dtype=torch.float64)
        # Rejection, until a draw is one of the likeliest tokens, takes less time than sorting them.
        sampled = likely.argmax(-1, keepdim=True)
        rejected = torch.ones_like(sampled, dtype=torch.bool)
        for draws in self._draws[:, input_ids.shape[1]].split(1, dim=1):
            found = torch.searchsorted(sums, draws * sums[:, -1:]).clamp(max=scores.shape[1] - 1)
            # Accepted if all likelier tokens together have less than TOP_P.
            accepted = likely.where(likely > likely.gather(1, found), 0).sum(-1, keepdim=True) < TOP_P
            sampled = found.where(rejected & accepted, sampled)
            rejected &= ~accepted
            if not rejected.any():
                break
        chosen = [[row.send(token)] for row, (token,) in zip(self._rows, sampled.tolist(), strict=True)]
        return torch.full_like(scores, -torch.inf).scatter_(1, torch.tensor(chosen, device=scores.device), 0)


def _document(begin: int) -> Row:
    """Write documents: every sampled token is written."""
    token = begin
    while True:
        token = yield token


def _chat(header: list[int], middle: list[int], closing: list[int]) -> Row:
    """Write conversations; arguments as `_conversation` returns them."""
    sampled, before = 0, list[int]()
    while True:
        # A turn ends where the model samples the first token of the template's next part.
        for turn, end in ((before + header, middle[0]), (middle, closing[0])):
            for token in turn:
                sampled = yield token
            while sampled != end:
                sampled = yield sampled
        before = closing


def _first_token(tokenizer: Tokenizer) -> int:
    """Find the token that documents begin with."""
    vocabulary, named = tokenizer.get_vocab(), (SEPARATOR, tokenizer.bos_token, tokenizer.eos_token)
    return [*start_tokens(tokenizer), *(vocabulary[token] for token in named if token in vocabulary), 0][0]


def _conversation(tokenizer: Tokenizer, say: Callable[[str], None]) -> list[list[int]] | None:
    """Find the tokens of the chat template before the user's turn, between the turn and the answer, and after it.

    None if there is no template, or, with a note in the log, if its turns do not end with a token of their own.
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
    # The model may sample a marker of plain text in other tokens.
    say("note: turns of the chat template end with no token of their own: no conversations are written")
    return None


def records_of(tokenizer: Tokenizer, ids: Tensor) -> str:
    """Make the content of OWN_TEXT from windows of tokens."""
    records = (dict(text=tokenizer.decode(row), input_ids=row) for row in ids.tolist())
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def tokens_in(path: Path) -> Tensor:
    """Read the windows of OWN_TEXT.

    Raises:
        InputError: the file is damaged.
    """
    with errors_in_one_line(f"{path}: damaged; {option('restart', True)} discards the unfinished run"):
        return torch.tensor([json.loads(line)["input_ids"] for line in path.read_text("utf-8").split("\n")[:-1]])
