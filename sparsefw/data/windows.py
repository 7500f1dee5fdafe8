"""Windows of tokens, and how they are cut from a text for calibration and evaluation.

Documents are separated by an empty line. The only special token is the one that the tokenizer itself puts at the start
of a text, once, before the first document.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsefw.data.batches import Batch, token_batch
from sparsefw.data.text import Text, read_text
from sparsefw.data.tokenizer import start_tokens, tokenize
from sparsefw.errors import InputError

SEPARATOR = "\n\n"
# Calibration windows are drawn from the first `nsamples * seqlen` times this many tokens of a dataset.
TOKENS_READ = 4
DOCUMENTS_AT_ONCE = 64
# A first guess at how much text holds the tokens asked for; more is read when it proves too small.
CHARS_PER_TOKEN = 8
# The last tokens of a text that was cut may differ from those of the whole text. This many are not used.
UNSETTLED_TOKENS = 64


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens.

    Attributes:
        ids: (n, seqlen) int64.
        source: name of the text.
        hash: SHA-256 of the bytes of `ids`, in hex.
    """

    ids: Tensor
    source: str
    hash: str

    @property
    def n(self) -> int:
        """Number of windows."""
        return self.ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens in a window."""
        return self.ids.shape[1]

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of this many windows; the last one may have fewer."""
        return map(token_batch, self.ids.split(size))


def windows_of(ids: Tensor, source: str) -> Windows:
    """Windows of given tokens.

    Args:
        ids: (windows, seqlen) tokens, of any integer dtype.
        source: name of the tokens, for the report and for messages.

    Raises:
        InputError: `ids` is no such tensor, or has no token to predict.
    """
    if ids.dim() != 2:
        raise InputError(f"{source}: tokens of shape {tuple(ids.shape)}; give a tensor (windows, seqlen)")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"{source}: tokens of dtype {ids.dtype}; give integers")
    n, seqlen = ids.shape
    if n < 1 or seqlen < 2:
        raise InputError(f"{source}: {n} windows of {seqlen} tokens; give at least one window, of at least 2 tokens")
    ids = ids.detach().to("cpu", torch.int64).contiguous()
    if ids.min() < 0:
        raise InputError(f"{source}: token {int(ids.min())}; no token is negative")
    return _make_windows(ids, source)


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, text: Text | str | Sequence[str], *, nsamples: int, seqlen: int, seed: int
) -> Windows:
    """Draw disjoint windows at random.

    Documents are tokenized one by one and concatenated until there are `TOKENS_READ` times the tokens asked for, or
    no more. From a random offset on, the tokens are cut into windows, and `nsamples` of these are drawn.

    Args:
        tokenizer: the model's tokenizer.
        text: the text, or what `read_text` takes.
        nsamples: number of windows.
        seqlen: tokens in a window.
        seed: seed of the draw, which depends on the seed and the text only.

    Raises:
        InputError: the text cannot be read or is too short, or an argument is out of its range.
    """
    _check_positive("--nsamples", nsamples)
    _check_positive("--seqlen", seqlen)
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: expected a number from 0 to 2^63 - 1")
    if not isinstance(text, Text):
        text = read_text(text, part="calibration")
    needed = nsamples * seqlen
    ids = _leading_tokens(tokenizer, text, TOKENS_READ * needed)
    if len(ids) < needed:
        fits = [
            f"--{name} {n}" for name, n in (("nsamples", len(ids) // seqlen), ("seqlen", len(ids) // nsamples)) if n
        ]
        raise InputError(
            f"{text.source}: {len(ids)} tokens, but {nsamples} windows of {seqlen} need {needed}; "
            f"use {' or '.join([*fits, 'a longer text'])}"
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(min(seqlen - 1, len(ids) - needed) + 1, (1,), generator=generator))
    slots = _cut(ids[offset:], seqlen)
    return _make_windows(slots[torch.randperm(len(slots), generator=generator)[:nsamples]], text.source)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    text: Text | str | Sequence[str],
    *,
    seqlen: int,
    limit: int | None = None,
) -> Windows:
    """Cut a text into consecutive windows from its start, as it is done for the perplexity on WikiText-2.

    The documents are joined by an empty line and tokenized in one piece; an incomplete last window is dropped.

    Args:
        tokenizer: the model's tokenizer.
        text: the text, or what `read_text` takes.
        seqlen: tokens in a window.
        limit: most windows; no more text is read than they take. None: all windows.

    Raises:
        InputError: the text cannot be read or holds no window, or an argument is out of its range.
    """
    _check_positive("--seqlen", seqlen)
    if limit is not None:
        _check_positive("--eval-windows", limit)
    if not isinstance(text, Text):
        text = read_text(text, part="evaluation")
    ids = _joined_tokens(tokenizer, text, None if limit is None else limit * seqlen)
    if len(ids) < seqlen:
        raise InputError(
            f"{text.source}: {len(ids)} tokens, fewer than one window of {seqlen}; "
            f"use --seqlen {len(ids)} or a longer text"
        )
    return _make_windows(_cut(ids, seqlen), text.source)


def _make_windows(ids: Tensor, source: str) -> Windows:
    return Windows(ids, source, hashlib.sha256(ids.numpy().tobytes()).hexdigest())


def _cut(ids: list[int], seqlen: int) -> Tensor:
    n = len(ids) // seqlen
    return torch.tensor(ids[: n * seqlen]).view(n, seqlen)


def _leading_tokens(tokenizer: PreTrainedTokenizerBase, text: Text, wanted: int) -> list[int]:
    """The first `wanted` tokens, of documents that are tokenized one by one."""
    ids = start_tokens(tokenizer)
    empty = True
    before = ""
    while len(ids) < wanted and (batch := list(itertools.islice(text, DOCUMENTS_AT_ONCE))):
        empty = empty and not any(document.strip() for document in batch)
        # The separator goes before a document, where most tokenizers give it the tokens of the joined text.
        separated = [before + batch[0], *(SEPARATOR + document for document in batch[1:])]
        before = SEPARATOR
        ids.extend(itertools.chain.from_iterable(tokenize(tokenizer, separated)))
    if empty:
        raise InputError(f"{text.source}: empty, there is no text in it")
    return ids[:wanted]


def _joined_tokens(tokenizer: PreTrainedTokenizerBase, text: Text, wanted: int | None) -> list[int]:
    """The first `wanted` tokens (None: all) of the documents joined and tokenized in one piece."""
    documents: list[str] = []
    chars, enough = 0, math.inf if wanted is None else wanted * CHARS_PER_TOKEN
    while True:
        # Stays true if the loop reaches the end of the text.
        whole = True
        for document in text:
            documents.append(document)
            chars += len(document) + len(SEPARATOR)
            if chars >= enough:
                whole = False
                break
        joined = SEPARATOR.join(documents)
        if whole and not joined.strip():
            raise InputError(f"{text.source}: empty, there is no text in it")
        ids = start_tokens(tokenizer) + tokenize(tokenizer, [joined])[0]
        if wanted is None or whole or len(ids) >= wanted + UNSETTLED_TOKENS:
            return ids[:wanted]
        enough *= 2


def _check_positive(flag: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{flag} {value}: expected at least 1")
