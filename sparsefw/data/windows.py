"""Windows of tokens, and how they are cut from a text for calibration and evaluation.

Documents are separated by an empty line. The only special token is the one that the tokenizer itself puts at the start
of a text, once, before the first document.
"""

import hashlib
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefw.data.batches import Batch, token_batch
from sparsefw.data.memory import TOKENS_READ, limited, most_tokens
from sparsefw.data.pieces import Piece, cut, tokenized
from sparsefw.data.text import Text, read_text
from sparsefw.data.tokenizer import Tokenizer, start_tokens
from sparsefw.errors import InputError

SEPARATOR = "\n\n"

# Tokens in the shortest window in which one can be predicted.
LEAST = 2


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens.

    Attributes:
        ids: (n, seqlen) int64.
        source: name of the text.
        hash: SHA-256 of the bytes of all `ids`, in hex.
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

    def part(self, share: slice) -> "Windows":
        """Some of the windows; the hash stays that of all."""
        return replace(self, ids=self.ids[share])

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of this many windows; the last one may have fewer."""
        return map(token_batch, self.ids.split(size)) if self.n else iter(())


def window_length(model: object, asked: int, longest: int | None) -> int:
    """Tokens in a window of a text.

    Args:
        model: name of the model, for the message.
        asked: as many as the user asks for.
        longest: as many as the model takes; None: any number.

    Raises:
        InputError: the model takes so few that none can be predicted.
    """
    seqlen = min(asked, longest or asked)
    if seqlen < LEAST:
        raise InputError(f"{model}: reads {seqlen} token at once, so that none of a text can be predicted")
    return seqlen


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
    return make_windows(ids, source)


def calibration_windows(
    tokenizer: Tokenizer,
    text: Text | str | Sequence[str],
    *,
    nsamples: int,
    seqlen: int,
    seed: int,
    room: int | None = None,
    alone: bool = True,
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
        room: bytes of memory that reading may take; None: any number.
        alone: whether all windows of the run are of this text, which decides what is advised if it is too short.

    Raises:
        InputError: the text cannot be read or is too short, memory is too little, or an argument is out of its range.
    """
    _check_positive("--nsamples", nsamples)
    _check_positive("--seqlen", seqlen)
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: expected a number from 0 to 2^63 - 1")
    if not isinstance(text, Text):
        text = read_text(text, part="calibration", room=room)
    needed = nsamples * seqlen
    ids = _leading_tokens(
        tokenizer,
        text.source,
        _apart(tokenizer, text),
        TOKENS_READ * needed,
        room,
        "fewer or shorter windows (--nsamples, --seqlen)",
    )
    if len(ids) < needed:
        fits = [("--nsamples", len(ids) // seqlen, 1)] * alone + [("--seqlen", len(ids) // nsamples, LEAST)]
        remedies = [f"{flag} {n}" for flag, n, least in fits if n >= least]
        remedies += ["a smaller share"] * (not alone) + ["a longer text"]
        raise InputError(
            f"{text.source}: {len(ids)} tokens, but {nsamples} windows of {seqlen} need {needed}; "
            f"use {' or '.join(remedies)}"
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(min(seqlen - 1, len(ids) - needed) + 1, (1,), generator=generator))
    slots = _cut(ids, seqlen, offset)
    drawn = slots[torch.randperm(len(slots), generator=generator)[:nsamples]]
    return make_windows(drawn.long(), text.source)


def evaluation_windows(
    tokenizer: Tokenizer,
    text: Text | str | Sequence[str],
    *,
    seqlen: int,
    limit: int | None = None,
    room: int | None = None,
) -> Windows:
    """Cut a text into consecutive windows from its start, as it is done for the perplexity on WikiText-2.

    The documents are joined by an empty line and tokenized as one; an incomplete last window is dropped.

    Args:
        tokenizer: the model's tokenizer.
        text: the text, or what `read_text` takes.
        seqlen: tokens in a window.
        limit: most windows; no more text is read than they take. None: all windows.
        room: bytes of memory that reading may take; None: any number.

    Raises:
        InputError: the text cannot be read or holds no window, memory is too little, or an argument is out of its
            range.
    """
    _check_positive("--seqlen", seqlen)
    if limit is not None:
        _check_positive("--eval-windows", limit)
    if not isinstance(text, Text):
        text = read_text(text, part="evaluation", room=room)
    ids = _leading_tokens(
        tokenizer,
        text.source,
        cut(tokenizer, _joined(text)),
        None if limit is None else limit * seqlen,
        room,
        "fewer windows (--eval-windows)",
    )
    if len(ids) < seqlen:
        remedy = f"--seqlen {len(ids)} or a longer text" if len(ids) >= LEAST else "a longer text"
        raise InputError(f"{text.source}: {len(ids)} tokens, fewer than one window of {seqlen}; use {remedy}")
    return make_windows(_cut(ids, seqlen).long(), text.source)


def make_windows(ids: Tensor, source: str) -> Windows:
    """Windows of these tokens, (n, seqlen) int64 in memory without gaps, with their hash."""
    return Windows(ids, source, hashlib.sha256(ids.numpy().data).hexdigest())


def _cut(ids: "array[int]", seqlen: int, offset: int = 0) -> Tensor:
    """All windows from an offset on, (n, seqlen) int32, as a view of `ids`."""
    n = (len(ids) - offset) // seqlen
    return torch.frombuffer(ids, dtype=torch.int32)[offset : offset + n * seqlen].view(n, seqlen)


def _apart(tokenizer: Tokenizer, text: Text) -> Iterator[Piece]:
    """The pieces of documents that are tokenized one by one."""
    for n, document in enumerate(text.documents):
        # The separator goes before a document, where most tokenizers give it the tokens of the joined text.
        yield from cut(tokenizer, itertools.chain([SEPARATOR] if n else [], document))


def _joined(text: Text) -> Iterator[str]:
    """The documents as one."""
    for n, document in enumerate(text.documents):
        if n:
            yield SEPARATOR
        yield from document


def _leading_tokens(
    tokenizer: Tokenizer,
    source: str,
    pieces: Iterable[Piece],
    wanted: int | None,
    room: int | None,
    remedy: str,
) -> "array[int]":
    """The first `wanted` tokens (None: all), in 4 bytes each.

    Raises:
        InputError: there is no text, or reading it takes more than `room` bytes (None: any number).
    """
    most = math.inf if room is None else most_tokens(room)
    ids = array("i", start_tokens(tokenizer))
    empty = True
    with limited(source, room):
        for piece, tokens in tokenized(tokenizer, pieces):
            empty = empty and not piece.text.strip()
            ids.extend(tokens)
            if wanted is not None:
                del ids[wanted:]
            if len(ids) > most:
                raise InputError(
                    f"{source}: memory has no room for more than {most} tokens of this text; "
                    f"give more (--host-memory), or {remedy}"
                )
            if len(ids) == wanted:
                break
    if empty:
        raise InputError(f"{source}: empty, there is no text in it")
    return ids


def _check_positive(flag: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{flag} {value}: expected at least 1")
