"""Cut windows of tokens from texts, for calibration and evaluation.

An empty line separates the documents of a text. The only special token is a start token, if the tokenizer itself puts
one before a text; it stands once, before the first document.
"""

import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsefw.data.batches import Batch, Batches, token_batch
from sparsefw.data.records import Records
from sparsefw.data.text import is_own, read_text
from sparsefw.data.tokens import Tokenizer, start_tokens, tokens_of
from sparsefw.errors import InputError, Say, errors_in_one_line, option

SEPARATOR = "\n\n"

# Tokens of the shortest window in which a token can be predicted.
MIN_SEQLEN = 2

# Calibration windows are drawn from a pool: `nsamples * seqlen` times this many consecutive tokens of a text. A pool is
# read in parts of up to PART tokens.
TOKENS_READ, PART = 16, 2**16

# A calibration window is made of up to PIECES pieces of a text, each from another place and of at least MIN_PIECE
# tokens. Text from one place is much alike, so the same number of tokens from more places says more about a layer's
# inputs.
PIECES, MIN_PIECE = 8, 128

# Bytes of a token while it is read (int32) and in a window (int64), and bytes that reading needs besides, as measured.
BYTES_READ, BYTES_IN_WINDOW, READING = 4, 8, 64 * 2**20


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of tokens.

    Attributes:
        ids: (n, seqlen) int64 tokens.
        source: name of the text.
        hash: SHA-256 of the bytes of all `ids`, in hex.
        own: content of the file OWN_TEXT, if the model has written some of the windows itself; else empty.
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
        """Select some of the windows. The hash stays that of all windows."""
        return replace(self, ids=self.ids[share])

    def split(self, size: int) -> Iterator[Batch]:
        """Split the windows into micro-batches of `size` windows; the last one may have fewer."""
        return map(token_batch, self.ids.split(size)) if self.n else iter(())


# Samples that run through a model: windows of tokens, or a caller's batches.
Samples = Windows | Batches

# Has the model write calibration windows itself. Its arguments are the tokenizer, the tokens of a window, and the
# number of windows.
Generate = Callable[[Tokenizer, int, int], Windows] | None


def window_length(model: object, seqlen: int, longest: int | None) -> int:
    """Return the number of tokens of a window.

    Args:
        model: name of the model, for the message.
        seqlen: the user's number of tokens.
        longest: the most tokens that the model takes; None: any number.

    Raises:
        InputError: the model takes too few tokens to predict one.
    """
    seqlen = min(seqlen, longest or seqlen)
    if seqlen < MIN_SEQLEN:
        raise InputError(f"{model}: reads {seqlen} token at a time, so it cannot predict a token of a text")
    return seqlen


def reading_bytes(windows: int, evaluation: Sequence[int], seqlen: int) -> int:
    """Count the bytes at the peak while texts are read, without those of the windows.

    Args:
        windows: number of calibration windows.
        evaluation: number of windows of each evaluation text.
        seqlen: tokens of a window.
    """
    return READING + BYTES_READ * seqlen * max(TOKENS_READ * windows, *evaluation, 0)


def window_bytes(windows: int, evaluation: Sequence[int], seqlen: int) -> int:
    """Count the bytes of all windows, which are in memory during the run; arguments as for `reading_bytes`."""
    return BYTES_IN_WINDOW * seqlen * (windows + sum(evaluation))


def windows_of(ids: Tensor, source: str) -> Windows:
    """Make windows of a tensor of tokens.

    Args:
        ids: (windows, seqlen) tokens, of any integer dtype.
        source: name of the tokens, for the report and for messages.

    Raises:
        InputError: `ids` is no such tensor, a token is negative, or a window has no token to predict.
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


@dataclass(eq=False)
class WindowStream:
    """Windows of texts, without end: first the calibration windows of a run, then others of the same texts.

    The tokens of a text make pools, see `TOKENS_READ`. The tokens of a pool after a random offset are cut into pieces,
    see `PIECES`. The pieces, in a random order, make windows. So no token is in two windows until the text ends. Then
    it is read again, with other offsets and orders. If it cannot be read again, as an iterator cannot, its last tokens
    are used again, as many as a pool has.

    A mixture has groups of `nsamples` windows. Each has windows of all texts by their shares, in a random order.

    The windows do not depend on how many are taken at a time. Memory holds a pool (int32), a group of a mixture, and
    the windows that are taken. Taking raises InputError: a text cannot be read or is too short, or its share is less
    than a window.

    Attributes:
        tokenizer: the model's tokenizer; not used if `dataset` are windows.
        dataset: a text, see `read_text`; or weights of texts, by their names; or windows, which repeat in other orders.
        nsamples, seqlen: number of windows of a run, and tokens of a window.
        seed: seed of all draws.
        write: has the model write its own text, whose windows repeat, too; None: there is no such text.
        say: called with a line when a text has ended for the first time and more is asked for.
        source, own: of a stream of one text, as for Windows; set with the first window.
    """

    tokenizer: Any
    dataset: str | Iterable[Any] | Windows
    nsamples: int
    seqlen: int
    seed: int
    write: Generate = None
    say: Say = lambda _: None
    source: str = ""
    own: str = ""

    def __post_init__(self) -> None:
        shares = self.dataset if isinstance(self.dataset, Mapping) else {}
        if len(shares) == 1:
            (self.dataset,) = shares
        self._texts = [self]
        # Each window comes with the stream of its text.
        self._stream = self._mixed(shares) if len(shares) > 1 else zip(itertools.repeat(self), self._of_text())

    def take(self, n: int) -> Windows:
        """Return the next n windows, at least one."""
        texts, rows = zip(*itertools.islice(self._stream, n), strict=True)
        mixed = " + ".join(f"{text.source} ({texts.count(text)})" for text in self._texts)
        windows = _windows(torch.stack(rows), self.source or mixed)
        return replace(windows, own="".join(text.own for text in self._texts))

    def close(self) -> None:
        """End the stream. A stream and its generators refer to each other, so its pools would stay in memory."""
        for stream in (self, *self._texts):
            stream._stream, stream._texts = iter(()), []

    def _mixed(self, shares: Mapping[str, float]) -> "Iterator[tuple[WindowStream, Tensor]]":
        numbers = dict(zip(shares, counts(self.nsamples, list(shares.values())), strict=True))
        for name, n in numbers.items():
            if not n:
                share = f"{option('dataset', name)}: its share, {shares[name]:g}, is none of {self.nsamples} windows"
                raise InputError(f"{share}; give a larger share, or more windows")
        self._texts = [replace(self, dataset=name, nsamples=n) for name, n in numbers.items()]
        # The text that the model writes is last: it takes longest, and another text may turn out to be missing.
        in_turn = sorted(self._texts, key=lambda text: is_own(text.dataset))
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            drawn = [window for text in in_turn for window in itertools.islice(text._stream, text.nsamples)]
            drawn.sort(key=lambda window: self._texts.index(window[0]))
            # In a random order: windows that are held out, and those that take turns, need some of every text.
            yield from map(drawn.__getitem__, torch.randperm(self.nsamples, generator=generator))

    def _of_text(self) -> Iterator[Tensor]:
        generator, text = torch.Generator().manual_seed(self.seed), self.dataset
        if self.write and is_own(text):
            text = self.write(self.tokenizer, self.seqlen, self.nsamples)
        if not isinstance(text, Windows):
            yield from self._drawn(text, generator)
            return
        self.source, self.own = text.source, text.own
        yield from text.ids
        self.say(f"{self.source}: has {text.n} windows, which repeat in other orders")
        while True:
            yield from map(text.ids.__getitem__, torch.randperm(text.n, generator=generator))

    def _drawn(self, text: str | Iterable[Any], generator: torch.Generator) -> Iterator[Tensor]:
        # Each pool is written over the one before.
        pool, size, records = array("i"), TOKENS_READ * self.nsamples * self.seqlen, Records(self.tokenizer)
        for number in itertools.count():
            self.source, documents = read_text(text, "train", records)
            tokens, total = _tokens(self.tokenizer, _separated(documents)), 0
            while (filled := _fill(pool, tokens, size)) >= self.seqlen or not total:
                _check_length(len(pool), self.source, self.nsamples, self.seqlen)
                records.tell(self.source, self.say)
                total += filled
                # If the text cannot be read again, the whole pool is used again.
                end = filled if filled >= self.seqlen else size
                yield from _cut(_as_tensor(pool)[:end], self.nsamples, self.seqlen, generator)
            if not number:
                self.say(f"{self.source}: ends after {total:,} tokens, and is read again")


def _cut(ids: Tensor, nsamples: int, seqlen: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Cut pieces from tokens, and as many windows as there are, each (seqlen,) int64, from pieces in a random order."""
    piece = seqlen // max(1, min(PIECES, seqlen // MIN_PIECE))
    spare = max(len(ids) - nsamples * seqlen, len(ids) % seqlen)
    offset = int(torch.randint(min(piece - 1, spare) + 1, (1,), generator=generator))
    ids = ids[offset:]
    pieces = len(ids) // piece
    # Tokens after the last piece stay there: the last window may need them, if it is no whole number of pieces.
    order = torch.cat([torch.randperm(pieces, generator=generator), torch.tensor([pieces])])
    for start in range(0, len(ids) - seqlen + 1, seqlen):
        places = torch.arange(start, start + seqlen)
        yield ids[order[places // piece] * piece + places % piece].long()


def _check_length(tokens: int, source: str, nsamples: int, seqlen: int) -> None:
    """Raise InputError if a text has too few tokens for the windows of a run."""
    if tokens < nsamples * seqlen:
        fits = [("nsamples", tokens // seqlen), ("seqlen", tokens // nsamples)]
        at_most = " or ".join(option(name, most) for name, most in fits if most)
        raise InputError(
            f"{source}: {tokens} tokens, but {nsamples} windows of {seqlen} need {nsamples * seqlen}; use a longer text"
            + (f", or at most {at_most}" if at_most else "")
        )


def windows_of_records(records: Iterable[Any], source: str, *, nsamples: int, seqlen: int | None, seed: int) -> Tensor:
    """Make windows of tokenized records.

    If all records have `seqlen` tokens, the windows are up to `nsamples` of the records. Otherwise windows are cut from
    the records' tokens as from those of a text.

    Args:
        records: rows of tokens, mappings with rows of tokens in `input_ids`, or batches of either. Tokens that an
            `attention_mask` hides are dropped. As many tokens are read as a WindowStream reads of a text.
        source: name of the records, for messages.
        nsamples: number of windows.
        seqlen: tokens of a window; None: those of the longest record.
        seed: seed of the draw.

    Returns:
        (windows, seqlen) int64.

    Raises:
        InputError: a record holds no tokens, or the records hold too few.
    """
    rows, ids, generator = list[Tensor](), array("i"), torch.Generator().manual_seed(seed)
    longest = MIN_SEQLEN
    for number, record in enumerate(records, 1):
        with errors_in_one_line(f"{source}: record {number}: expected tokens"):
            for row in _rows(record):
                rows.append(row)
                ids.extend(row.tolist())
                longest = max(longest, len(row))
        if len(ids) >= TOKENS_READ * nsamples * (seqlen or longest):
            break
    seqlen = seqlen or longest
    if any(len(row) != seqlen for row in rows):
        _check_length(len(ids), source, nsamples, seqlen)
        return torch.stack(list(itertools.islice(_cut(_as_tensor(ids), nsamples, seqlen, generator), nsamples)))
    order = torch.randperm(len(rows), generator=generator)
    return torch.stack(rows)[order[:nsamples].sort().values]


def _rows(ids: Any, mask: Any = None) -> Iterator[Tensor]:
    """Yield the rows of tokens of a record, or of a batch of records."""
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
    """Cut a text into consecutive windows from its start, as is usual for the perplexity on WikiText-2.

    The documents are joined by empty lines and tokenized as one text. An incomplete last window is dropped.

    Args:
        tokenizer: the model's tokenizer.
        dataset: the text, see `read_text`.
        seqlen: tokens of a window.
        limit: the most windows, and no more text is read than they need; None: all windows.

    Raises:
        InputError: the text cannot be read, or is shorter than a window.
    """
    source, documents = read_text(dataset, "test", Records(tokenizer))
    joined = itertools.chain.from_iterable(_separated(documents))
    tokens = _tokens(tokenizer, [joined])
    ids = _as_tensor(array("i", itertools.islice(tokens, None if limit is None else limit * seqlen)))
    if len(ids) < seqlen:
        raise InputError(
            f"{source}: {len(ids)} tokens, fewer than one window of {seqlen}; use a longer text or shorter "
            f"windows ({option('seqlen')})"
        )
    return _windows(ids.unfold(0, seqlen, seqlen).long(), source)


def counts(n: int, shares: Sequence[float]) -> list[int]:
    """Divide n windows in proportion to shares.

    Counts are rounded down. The windows that are left go, one each, to the counts that rounding lowered most; of equal
    ones to the first.
    """
    # Shares are divided by the largest, since their own sum may be infinite.
    relative = [share / max(shares) for share in shares]
    exact = [n * share / sum(relative) for share in relative]
    found = [math.floor(count) for count in exact]
    for i in sorted(range(len(shares)), key=lambda i: found[i] - exact[i])[: n - sum(found)]:
        found[i] += 1
    return found


def _windows(ids: Tensor, source: str) -> Windows:
    """Make windows of tokens (n, seqlen), contiguous int64, and hash them."""
    return Windows(ids, source, hashlib.sha256(ids.numpy().data).hexdigest())


def _separated(documents: Iterable[Iterable[str]]) -> Iterator[Iterable[str]]:
    """Put the separator at the beginning of each document but the first.

    Most tokenizers make the same tokens of it there as in the joined text.
    """
    for n, document in enumerate(documents):
        yield itertools.chain([SEPARATOR], document) if n else document


def _tokens(tokenizer: Tokenizer, documents: Iterable[Iterable[str]]) -> Iterator[int]:
    """Tokenize documents, which are only read as far as tokens are asked for."""
    return itertools.chain(start_tokens(tokenizer), itertools.chain.from_iterable(tokens_of(tokenizer, documents)))


def _fill(ids: "array[int]", tokens: Iterator[int], size: int) -> int:
    """Write the next tokens over `ids` from its start, up to `size` of them; returns their number."""
    filled = 0
    while part := array("i", itertools.islice(tokens, min(PART, size - filled))):
        ids[filled : filled + len(part)] = part
        filled += len(part)
    return filled


def _as_tensor(ids: "array[int]") -> Tensor:
    # numpy takes an empty array, too.
    return torch.from_numpy(np.asarray(ids))
