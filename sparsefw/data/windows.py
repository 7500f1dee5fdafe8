"""Windows of tokens, and how they are cut from a text for calibration and evaluation.

Documents are separated by an empty line. The only special token is the one that the tokenizer itself puts at the start
of a text, once, before the first document.
"""

import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsefw.data.batches import Batch, token_batch
from sparsefw.data.text import SELF, read_text
from sparsefw.data.tokens import Tokenizer, start_tokens, tokens_of
from sparsefw.errors import InputError, errors_in_one_line, option

SEPARATOR = "\n\n"

# Tokens in the shortest window in which one can be predicted.
MIN_SEQLEN = 2

# Calibration windows are drawn from the first `nsamples * seqlen` times this many tokens of a text.
TOKENS_READ = 16

# A calibration window has up to this many pieces of a text, each from another place, of at least so many tokens. Text
# of one place is much alike: as many tokens of more places tell more of what a layer is given.
PIECES, MIN_PIECE = 8, 128

# Bytes of a token: int32 as it is read, and int64 in a window. Bytes that reading takes beside them, as measured.
BYTES_READ, BYTES_IN_WINDOW, READING = 4, 8, 64 * 2**20


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens.

    Attributes:
        ids: (n, seqlen) int64.
        source: name of the text.
        hash: SHA-256 of the bytes of all `ids`, in hex.
        own: those that the model has written itself, as a file holds them.
    """

    ids: Tensor
    source: str
    hash: str
    own: str = ""

    @property
    def n(self) -> int:
        """Number of windows."""
        return self.ids.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens in a window."""
        return self.ids.shape[1]

    def shard(self, share: slice) -> "Windows":
        """Some of the windows; the hash stays that of all."""
        return replace(self, ids=self.ids[share])

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of this many windows; the last one may have fewer."""
        return map(token_batch, self.ids.split(size)) if self.n else iter(())


# Has a model write calibration windows, with its tokenizer, of a length, and of this number.
Generate = Callable[[Tokenizer, int, int], Windows] | None


def window_length(model: object, seqlen: int, longest: int | None) -> int:
    """Tokens in a window of a text.

    Args:
        model: name of the model, for the message.
        seqlen: the user's number of tokens.
        longest: most tokens that the model takes; None: any number.

    Raises:
        InputError: the model takes so few that none can be predicted.
    """
    seqlen = min(seqlen, longest or seqlen)
    if seqlen < MIN_SEQLEN:
        raise InputError(f"{model}: reads {seqlen} token at once, so that none of a text can be predicted")
    return seqlen


def reading_bytes(windows: int, evaluation: Sequence[int], seqlen: int) -> int:
    """Bytes at the peak while texts are read, beside the windows.

    Args:
        windows: number of calibration windows.
        evaluation: number of windows of each evaluation text.
        seqlen: tokens in a window.
    """
    return READING + BYTES_READ * seqlen * max(TOKENS_READ * windows, *evaluation, 0)


def window_bytes(windows: int, evaluation: Sequence[int], seqlen: int) -> int:
    """Bytes of all windows, which are held during the run; arguments as of `reading_bytes`."""
    return BYTES_IN_WINDOW * seqlen * (windows + sum(evaluation))


def windows_of(ids: Tensor, source: str) -> Windows:
    """Windows of given tokens.

    Args:
        ids: (windows, seqlen) tokens, of any integer dtype.
        source: name of the tokens, for the report and for messages.

    Raises:
        InputError: `ids` is no such tensor, or has no token to predict.
    """
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not integers or ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < MIN_SEQLEN:
        raise InputError(
            f"{source}: {ids.dtype} of shape {tuple(ids.shape)}; give integers (windows, seqlen), at least one window, "
            f"of at least {MIN_SEQLEN} tokens"
        )
    ids = ids.detach().to("cpu", torch.int64).contiguous()
    if ids.min() < 0:
        raise InputError(f"{source}: token {int(ids.min())}; no token is negative")
    return _windows(ids, source)


def calibration_windows(
    tokenizer: Tokenizer, dataset: str | Iterable[Any], *, nsamples: int, seqlen: int, seed: int
) -> Windows:
    """Draw disjoint windows at random.

    Documents are tokenized one by one and concatenated until there are `TOKENS_READ` times the tokens that the windows
    take, or no more. From a random offset on, the tokens are cut into pieces, see `PIECES`. As many of these as are
    needed, in an order at random, make the windows.

    Args:
        tokenizer: the model's tokenizer.
        dataset: the text, see `read_text`.
        nsamples: number of windows.
        seqlen: tokens in a window.
        seed: seed of the draw, which depends on the seed and the text only.

    Raises:
        InputError: the text cannot be read, or is too short.
    """
    text = read_text(dataset, "train", partial(tokenizer.apply_chat_template, tokenize=False))
    ids = _leading_tokens(tokenizer, _separated(text.documents), TOKENS_READ * nsamples * seqlen)
    return _windows(_drawn(ids, text.source, nsamples, seqlen, seed), text.source)


def _drawn(ids: "array[int]", source: str, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Windows cut from tokens and drawn, see `calibration_windows`: (nsamples, seqlen) int64."""
    needed, piece = nsamples * seqlen, seqlen // max(1, min(PIECES, seqlen // MIN_PIECE))
    if len(ids) < needed:
        fits = [("nsamples", len(ids) // seqlen), ("seqlen", len(ids) // nsamples)]
        at_most = " or ".join(option(name, most) for name, most in fits if most)
        raise InputError(
            f"{source}: {len(ids)} tokens, but {nsamples} windows of {seqlen} need {needed}; use a longer text"
            + (f", or at most {at_most}" if at_most else "")
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(min(piece - 1, len(ids) - needed) + 1, (1,), generator=generator))
    pieces = _cut(ids, piece, offset)
    # Where no whole number of pieces makes a window, windows go on within a piece, and may need the rest of the text.
    some = pieces[torch.randperm(len(pieces), generator=generator)[: math.ceil(needed / piece)]]
    rest = torch.frombuffer(ids, dtype=torch.int32)[offset + pieces.numel() :]
    return torch.cat([some.flatten(), rest])[:needed].long().view(nsamples, seqlen)


def windows_of_records(records: Iterable[Any], source: str, *, nsamples: int, seqlen: int | None, seed: int) -> Tensor:
    """Windows of tokenized records: the records, if they are of one length, else cut from them as from a text.

    Args:
        records: rows of tokens, or mappings with them in `input_ids`, or batches of either. What an `attention_mask`
            hides is left out. They are read as far as `calibration_windows` reads a text.
        source: name of the records, for messages.
        nsamples: number of windows; of records of one length, at most.
        seqlen: tokens in a window; None: those of the longest record.
        seed: seed of the draw.

    Returns:
        (windows, seqlen) int64.

    Raises:
        InputError: a record holds no tokens, or there are too few.
    """
    rows, ids = list[Tensor](), array("i")
    for number, record in enumerate(records, 1):
        with errors_in_one_line(f"{source}: record {number}: expected tokens"):
            for row in _rows(record):
                rows.append(row)
                ids.extend(row.tolist())
        if len(ids) >= TOKENS_READ * nsamples * (seqlen or len(rows[0])):
            break
    seqlen = seqlen or max(MIN_SEQLEN, *map(len, rows))
    if any(len(row) != seqlen for row in rows):
        return _drawn(ids, source, nsamples, seqlen, seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return torch.stack(rows)[order[:nsamples].sort().values]


def _rows(ids: Any, mask: Any = None) -> Iterator[Tensor]:
    """The rows of tokens of a record, or of a batch of records."""
    if isinstance(ids, Mapping):
        yield from _rows(ids["input_ids"], ids.get("attention_mask"))
    elif np.ndim(ids[0]):
        for n, row in enumerate(ids):
            yield from _rows(row, None if mask is None else mask[n])
    else:
        row = torch.as_tensor(ids, device="cpu")
        yield row if mask is None else row[torch.as_tensor(mask, device="cpu").bool()]


def evaluation_windows(
    tokenizer: Tokenizer, dataset: str | Iterable[Any], *, seqlen: int, limit: int | None = None
) -> Windows:
    """Cut a text into consecutive windows from its start, as it is done for the perplexity on WikiText-2.

    The documents are joined by an empty line and tokenized as one; an incomplete last window is dropped.

    Args:
        tokenizer: the model's tokenizer.
        dataset: the text, see `read_text`.
        seqlen: tokens in a window.
        limit: most windows; no more text is read than they take. None: all windows.

    Raises:
        InputError: the text cannot be read, or holds no window.
    """
    text = read_text(dataset, "test", partial(tokenizer.apply_chat_template, tokenize=False))
    joined = itertools.chain.from_iterable(_separated(text.documents))
    ids = _leading_tokens(tokenizer, [joined], None if limit is None else limit * seqlen)
    if len(ids) < seqlen:
        raise InputError(
            f"{text.source}: {len(ids)} tokens, fewer than one window of {seqlen}; use a longer text or shorter "
            f"windows ({option('seqlen')})"
        )
    return _windows(_cut(ids, seqlen).long(), text.source)


def mixed_windows(
    tokenizer: Tokenizer, shares: Mapping[str, float], write: Generate = None, *, nsamples: int, seqlen: int, seed: int
) -> Windows:
    """Draw windows of several texts, in an order at random. Those of one text are as `calibration_windows` draws them.

    Args:
        tokenizer: the model's tokenizer.
        shares: how many of the windows each text has, against the others; texts by name, see `read_text`.
        write: has the model write the text SELF; None: there is no such text.
        nsamples, seqlen, seed: as for `calibration_windows`; `nsamples` windows in all.

    Raises:
        InputError: as `calibration_windows`; or the share of a text is no window.
    """

    def drawn(name: str, n: int) -> Windows:
        if write and name == SELF:
            return write(tokenizer, seqlen, n)
        return calibration_windows(tokenizer, name, nsamples=n, seqlen=seqlen, seed=seed)

    if len(shares) == 1:
        return drawn(next(iter(shares)), nsamples)
    ids = torch.empty(nsamples, seqlen, dtype=torch.int64)
    # Some of the windows are held out, and all are learned from in turn: each part has some of every text.
    order = torch.randperm(nsamples, generator=torch.Generator().manual_seed(seed)).argsort()
    numbers = dict(zip(shares, counts(nsamples, list(shares.values())), strict=True))
    for name, n in numbers.items():
        if not n:
            share_of = f"{option('dataset', name)}: its share, {shares[name]:g}"
            raise InputError(f"{share_of}, is none of {nsamples} windows; give a larger share, or more windows")
    # To write a text takes longest, and the others may be missing. So it is the last.
    windows = {name: drawn(name, numbers[name]) for name in sorted(shares, key=lambda name: name == SELF)}
    for name, rows in zip(shares, order.split([*numbers.values()]), strict=True):
        ids[rows] = windows[name].ids
    sources = [f"{windows[name].source} ({n})" for name, n in numbers.items()]
    own = "".join(x.own for x in windows.values())
    return replace(_windows(ids, " + ".join(sources)), own=own)


def counts(n: int, shares: Sequence[float]) -> list[int]:
    """n windows by share: each count is rounded down, and one more where that cuts most off; of equals the first."""
    # Relative to the largest: the sum of the shares themselves may be infinite.
    relative = [share / max(shares) for share in shares]
    exact = [n * share / sum(relative) for share in relative]
    found = [math.floor(count) for count in exact]
    for i in sorted(range(len(shares)), key=lambda i: found[i] - exact[i])[: n - sum(found)]:
        found[i] += 1
    return found


def _windows(ids: Tensor, source: str) -> Windows:
    """Windows of these tokens, (n, seqlen) int64 in memory without gaps, with their hash."""
    return Windows(ids, source, hashlib.sha256(ids.numpy().data).hexdigest())


def _cut(ids: "array[int]", seqlen: int, offset: int = 0) -> Tensor:
    """All windows from an offset on, (n, seqlen) int32, as a view of `ids`."""
    n = (len(ids) - offset) // seqlen
    return torch.frombuffer(ids, dtype=torch.int32)[offset : offset + n * seqlen].view(n, seqlen)


def _separated(documents: Iterable[Iterable[str]]) -> Iterator[Iterable[str]]:
    """Documents with the separator before them, where most tokenizers give it the tokens of the joined text."""
    for n, document in enumerate(documents):
        yield itertools.chain([SEPARATOR], document) if n else document


def _leading_tokens(tokenizer: Tokenizer, documents: Iterable[Iterable[str]], wanted: int | None) -> "array[int]":
    """The first `wanted` tokens (None: all), in 4 bytes each."""
    ids = array("i", start_tokens(tokenizer))
    for tokens in tokens_of(tokenizer, documents):
        ids.extend(tokens)
        if wanted is not None and len(ids) >= wanted:
            del ids[wanted:]
            break
    return ids
