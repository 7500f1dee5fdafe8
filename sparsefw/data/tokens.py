"""Tokenize texts of any length.

A tokenizer needs about 200 bytes of memory for every character. So a document of more than `PIECE` characters is cut
into pieces, preferably at white space, and each piece is tokenized together with the end of the text before it. A cut
is made where the tokenizer itself ends a token. If a token depends on no more than `CONTEXT` characters around it, the
tokens are those of the whole document. If no such cut is found, the tokens next to the cut may differ.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.models.auto import AutoTokenizer

from sparsefw.errors import errors_in_one_line

Tokenizer = PreTrainedTokenizerBase

# Characters of a piece.
PIECE = 2**16
# Characters before and after a cut that are tokenized to check it.
CONTEXT = 512
# White space is searched for in this many characters at the end of a piece. Up to TRIED cuts are checked at white
# space, then up to TRIED at any character.
SEARCHED, TRIED = 4096, 8


def load_tokenizer(folder: Path, add_bos_token: bool | None = None) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Args:
        folder: the checkpoint's folder.
        add_bos_token: whether the tokenizer puts a start token before a text; None: as its files say.

    Raises:
        InputError: there is no tokenizer, or its files are damaged.
    """
    # transformers would not read None as the default.
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    with errors_in_one_line(f"{folder}: no tokenizer could be loaded", "give a folder with a sound tokenizer.json"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def tokenize(tokenizer: Tokenizer, texts: list[str], special: bool = False) -> list[list[int]]:
    """Tokenize texts; with `special` the tokenizer adds its special tokens to each.

    Raises:
        InputError: the tokenizer fails.
    """
    with errors_in_one_line(f"{tokenizer.name_or_path}: the tokenizer cannot take this text"):
        # verbose would warn of texts that are longer than the model's maximum, which is no mistake here.
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the start token that the tokenizer itself puts before a text, as a list; empty if it puts none.

    Raises:
        InputError: the tokenizer fails.
    """
    (ids,) = tokenize(tokenizer, ["a"], special=True)
    return ids[:1] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def tokens_of(tokenizer: Tokenizer, documents: Iterable[Iterable[str]]) -> Iterator[list[int]]:
    """Tokenize documents without special tokens, and yield the tokens piece by piece.

    Args:
        tokenizer: the model's tokenizer.
        documents: the documents, each as consecutive strings. They are only read as far as tokens are asked for.

    Raises:
        InputError: the tokenizer fails.
    """
    for document in documents:
        for lead, text in _pieces(tokenizer, document):
            (ids,) = tokenize(tokenizer, [lead + text])
            if lead:
                (before,) = tokenize(tokenizer, [lead])
                # If they differ, the document was cut inside a token.
                ids = ids[len(before) :] if ids[: len(before)] == before else tokenize(tokenizer, [text])[0]
            yield ids


def _pieces(tokenizer: Tokenizer, document: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Cut a document into pieces; yields the end of the text before a piece, and the piece."""
    lead = rest = ""
    for string in document:
        # A long string is taken in parts: each cut copies the text after it.
        for start in range(0, len(string), PIECE):
            rest += string[start : start + PIECE]
            while len(rest) > PIECE:
                at = _find_cut(tokenizer, rest)
                yield lead, rest[:at]
                lead, rest = rest[max(0, at - CONTEXT) : at], rest[at:]
    yield lead, rest


def _find_cut(tokenizer: Tokenizer, text: str) -> int:
    """Find where to cut a text that is longer than a piece: before white space if possible."""
    end = PIECE - CONTEXT
    spaces = [match.start() for match in re.compile(r"\s+").finditer(text, max(1, end - SEARCHED), end)]
    cuts = [*spaces[: -TRIED - 1 : -1], *range(end, max(0, end - TRIED), -1)]
    for at in cuts:
        before = text[max(0, at - CONTEXT) : at]
        alone, followed = tokenize(tokenizer, [before, before + text[at : at + CONTEXT]])
        if followed[: len(alone)] == alone:
            return at
    return cuts[0]
