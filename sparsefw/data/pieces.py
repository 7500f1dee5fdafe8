"""The tokens of a long text, piece by piece: a tokenizer takes about 200 bytes of memory for every character.

A document of at most `PIECE` characters is one piece. A longer one is cut where the tokenizer itself ends a token, and
each piece is tokenized together with the text before it. So its tokens are those of the whole document, if a token
depends on no more than `CONTEXT` characters around it. Where no such place is found, tokens beside the cut may differ.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sparsefw.data.tokenizer import Tokenizer, tokenize

# Characters of a piece, and of the pieces that are tokenized at once.
PIECE = 2**16
PIECES_AT_ONCE = 64
# Characters before and after a cut that decide about it.
CONTEXT = 512
# Characters at the end of a piece in which a cut is searched for, and the most places of a kind that are tried.
SEARCHED, TRIED = 4096, 8


@dataclass(frozen=True)
class Piece:
    """A piece of a document.

    Attributes:
        lead: the end of the text before it, which is tokenized with it, and whose tokens are left out; empty at the
            start of a document.
        text: the piece itself.
    """

    lead: str
    text: str


def cut(tokenizer: Tokenizer, strings: Iterable[str]) -> Iterator[Piece]:
    """Cut a document into pieces.

    Args:
        tokenizer: the model's tokenizer.
        strings: the document, in strings that follow each other. No more of them are read than the next piece takes.

    Raises:
        InputError: the tokenizer fails.
    """
    lead = rest = ""
    for string in _shortened(strings):
        rest += string
        while len(rest) > PIECE:
            at = _find_cut(tokenizer, rest)
            yield Piece(lead, rest[:at])
            lead, rest = rest[max(0, at - CONTEXT) : at], rest[at:]
    yield Piece(lead, rest)


def tokenized(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, list[int]]]:
    """The tokens of each piece. Short pieces are tokenized several at once, which uses more threads.

    Raises:
        InputError: the tokenizer fails.
    """
    for batch in _batches(pieces):
        texts = [piece.lead + piece.text for piece in batch]
        for piece, ids in zip(batch, tokenize(tokenizer, texts), strict=True):
            yield piece, _without_lead(tokenizer, piece, ids)


def _shortened(strings: Iterable[str]) -> Iterator[str]:
    """The same text in strings of at most PIECE characters, so that cutting a long one copies none of its rest."""
    for string in strings:
        for start in range(0, len(string), PIECE):
            yield string[start : start + PIECE]


def _find_cut(tokenizer: Tokenizer, text: str) -> int:
    """The number of characters of the next piece of `text`, which is longer than a piece."""
    places = list(_places(text, PIECE - CONTEXT))
    return next((at for at in places if _ends_a_token(tokenizer, text, at)), places[0])


def _places(text: str, end: int) -> Iterator[int]:
    """Places to cut a text near `end`, the better ones first: before empty lines, before white space, anywhere."""
    start = max(1, end - SEARCHED)
    for separator in (r"\n\s*\n", r"\s+"):
        found = [match.start() for match in re.compile(separator).finditer(text, start, end)]
        yield from found[: -TRIED - 1 : -1]
    yield from range(end, max(0, end - TRIED), -1)


def _ends_a_token(tokenizer: Tokenizer, text: str, at: int) -> bool:
    """Whether what follows leaves the tokens before a place as they are."""
    before = text[max(0, at - CONTEXT) : at]
    alone, followed = tokenize(tokenizer, [before, before + text[at : at + CONTEXT]])
    return followed[: len(alone)] == alone


def _without_lead(tokenizer: Tokenizer, piece: Piece, ids: list[int]) -> list[int]:
    """The tokens of a piece, out of those of its lead and itself."""
    if not piece.lead:
        return ids
    (lead,) = tokenize(tokenizer, [piece.lead])
    if ids[: len(lead)] == lead:
        return ids[len(lead) :]
    # The document was cut inside a token.
    return tokenize(tokenizer, [piece.text])[0]


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        if batch and chars + len(piece.text) > PIECE:
            yield batch
            batch, chars = [], 0
        batch.append(piece)
        chars += len(piece.text)
        if len(batch) == PIECES_AT_ONCE:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
