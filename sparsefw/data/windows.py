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

from sparsefw.data.batches import Batch, token_batch
from sparsefw.data.text import SELF, read_text
from sparsefw.data.tokens import Tokenizer, start_tokens, tokens_of
from sparsefw.errors import InputError, errors_in_one_line, option

SEPARATOR = "\n\n"

# Tokens of the shortest window in which a token can be predicted.
MIN_SEQLEN = 2

# Calibration windows are drawn from the first `nsamples * seqlen` times this many tokens of a text.
TOKENS_READ = 16

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


def calibration_windows(
    tokenizer: Tokenizer, dataset: str | Iterable[Any], *, nsamples: int, seqlen: int, seed: int
) -> Windows:
    """Draw disjoint windows at random.

    Documents are tokenized one by one and concatenated until there are `TOKENS_READ` times as many tokens as the
    windows need, or until the text ends. The tokens after a random offset are cut into pieces, see `PIECES`. Pieces
    drawn at random make the windows.

    Args:
        tokenizer: the model's tokenizer.
        dataset: the text, see `read_text`.
        nsamples: number of windows.
        seqlen: tokens of a window.
        seed: seed of the draw. The windows depend only on it and on the text.

    Raises:
        InputError: the text cannot be read, or is too short.
    """
    source, documents = read_text(dataset, "train", tokenizer)
    ids = _leading_tokens(tokenizer, _separated(documents), TOKENS_READ * nsamples * seqlen)
    return _windows(_drawn(ids, source, nsamples, seqlen, seed), source)


def _drawn(ids: Tensor, source: str, nsamples: int, seqlen: int, seed: int) -> Tensor:
    """Cut windows from tokens and draw some of them, see `calibration_windows`: (nsamples, seqlen) int64."""
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
    pieces = ids[offset:].unfold(0, piece, piece)
    drawn = pieces[torch.randperm(len(pieces), generator=generator)[: math.ceil(needed / piece)]]
    # If a window is no whole number of pieces, it may begin inside a piece, and the last one may need the rest of the
    # text.
    return torch.cat([drawn.flatten(), ids[offset + pieces.numel() :]])[:needed].long().view(nsamples, seqlen)


def windows_of_records(records: Iterable[Any], source: str, *, nsamples: int, seqlen: int | None, seed: int) -> Tensor:
    """Make windows of tokenized records.

    If all records have `seqlen` tokens, the windows are up to `nsamples` of the records. Otherwise windows are cut from
    the records' tokens as from those of a text.

    Args:
        records: rows of tokens, mappings with rows of tokens in `input_ids`, or batches of either. Tokens that an
            `attention_mask` hides are dropped. As many tokens are read as `calibration_windows` reads of a text.
        source: name of the records, for messages.
        nsamples: number of windows.
        seqlen: tokens of a window; None: those of the longest record.
        seed: seed of the draw.

    Returns:
        (windows, seqlen) int64.

    Raises:
        InputError: a record holds no tokens, or the records hold too few.
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
        return _drawn(_as_tensor(ids), source, nsamples, seqlen, seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
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
    source, documents = read_text(dataset, "test", tokenizer)
    joined = itertools.chain.from_iterable(_separated(documents))
    ids = _leading_tokens(tokenizer, [joined], None if limit is None else limit * seqlen)
    if len(ids) < seqlen:
        raise InputError(
            f"{source}: {len(ids)} tokens, fewer than one window of {seqlen}; use a longer text or shorter "
            f"windows ({option('seqlen')})"
        )
    return _windows(ids.unfold(0, seqlen, seqlen).long(), source)


def mixed_windows(
    tokenizer: Tokenizer, shares: Mapping[str, float], write: Generate = None, *, nsamples: int, seqlen: int, seed: int
) -> Windows:
    """Draw windows of several texts by `calibration_windows`, and mix them in a random order.

    Args:
        tokenizer: the model's tokenizer.
        shares: weight of each text, by its name (see `read_text`). A text gets windows in proportion to its weight.
        write: has the model write the text SELF; None: there is no such text.
        nsamples: number of windows of all texts together.
        seqlen, seed: as for `calibration_windows`.

    Raises:
        InputError: a text cannot be read or is too short, or its share is less than a window.
    """

    def drawn(name: str, n: int) -> Windows:
        if write and name == SELF:
            return write(tokenizer, seqlen, n)
        return calibration_windows(tokenizer, name, nsamples=n, seqlen=seqlen, seed=seed)

    if len(shares) == 1:
        return drawn(next(iter(shares)), nsamples)
    # In a random order: some windows are held out, and the others take turns. Each such part needs some of every text.
    order = torch.randperm(nsamples, generator=torch.Generator().manual_seed(seed))
    numbers = dict(zip(shares, counts(nsamples, list(shares.values())), strict=True))
    for name, n in numbers.items():
        if not n:
            share_of = f"{option('dataset', name)}: its share, {shares[name]:g}"
            raise InputError(f"{share_of}, is none of {nsamples} windows; give a larger share, or more windows")
    # The text that the model writes is last: it takes longest, and another text may turn out to be missing.
    by_name = {name: drawn(name, numbers[name]) for name in sorted(shares, key=lambda name: name == SELF)}
    parts = [by_name[name] for name in shares]
    ids = torch.cat([part.ids for part in parts])[order]
    mixed = _windows(ids, " + ".join(f"{part.source} ({part.n})" for part in parts))
    return replace(mixed, own="".join(part.own for part in parts))


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


def _leading_tokens(tokenizer: Tokenizer, documents: Iterable[Iterable[str]], wanted: int | None) -> Tensor:
    """Return the first `wanted` tokens of documents, int32; None: all tokens."""
    ids = array("i", start_tokens(tokenizer))
    for tokens in tokens_of(tokenizer, documents):
        ids.extend(tokens)
        if wanted is not None and len(ids) >= wanted:
            break
    return _as_tensor(ids)[:wanted]


def _as_tensor(ids: "array[int]") -> Tensor:
    # numpy takes an empty array, too.
    return torch.from_numpy(np.asarray(ids))
