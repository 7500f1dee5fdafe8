"""Tokens of texts.

A tokenizer takes about 200 bytes of memory for every character. So a document of more than `PIECE` characters is cut,
at white space where there is some, and each piece is tokenized together with the text before it. A place is cut if
the tokenizer itself ends a token there. So the tokens are those of the whole document, if a token depends on no more
than `CONTEXT` characters around it. Where no such place is found, tokens beside the cut may differ.
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
# Characters before and after a cut that decide about it.
CONTEXT = 512
# Characters at the end of a piece in which white space is searched for; and the most places that are tried there, and
# anywhere.
SEARCHED, TRIED = 4096, 8


def load_tokenizer(folder: Path, add_bos_token: bool | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        folder: the checkpoint's folder.
        add_bos_token: whether it puts a start token before a text; None: as its files say.

    Raises:
        InputError: there is no tokenizer, or its files are damaged.
    """
    # An option that is None would count as given.
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    with errors_in_one_line(f"{folder}: no tokenizer could be loaded", "give a folder with a sound tokenizer.json"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


def tokenize(tokenizer: Tokenizer, texts: list[str], special: bool = False) -> list[list[int]]:
    """The tokens of each text; `special`: with those that the tokenizer itself puts around it.

    Raises:
        InputError: the tokenizer fails.
    """
    with errors_in_one_line(f"{tokenizer.name_or_path}: the tokenizer cannot take this text"):
        # Not verbose: a text longer than the model's maximum is no mistake here.
        return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token that the tokenizer itself puts before a text, as a list; empty if it puts none.

    Raises:
        InputError: the tokenizer fails.
    """
    (ids,) = tokenize(tokenizer, ["a"], special=True)
    return ids[:1] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def tokens_of(tokenizer: Tokenizer, documents: Iterable[Iterable[str]]) -> Iterator[list[int]]:
    """The tokens of documents, without special ones, piece by piece.

    Args:
        tokenizer: the model's tokenizer.
        documents: the documents, each in strings that follow each other. They are read as far as tokens are asked for.

    Raises:
        InputError: the tokenizer fails.
    """
    for document in documents:
        for lead, text in _pieces(tokenizer, document):
            (ids,) = tokenize(tokenizer, [lead + text])
            if lead:
                (before,) = tokenize(tokenizer, [lead])
                # Otherwise the document was cut inside a token.
                ids = ids[len(before) :] if ids[: len(before)] == before else tokenize(tokenizer, [text])[0]
            yield ids


def _pieces(tokenizer: Tokenizer, document: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pieces of a document, each behind the end of the text before it, which is tokenized with it."""
    lead = rest = ""
    for string in document:
        # In short strings, so that cutting a long one copies none of its rest.
        for start in range(0, len(string), PIECE):
            rest += string[start : start + PIECE]
            while len(rest) > PIECE:
                at = _find_cut(tokenizer, rest)
                yield lead, rest[:at]
                lead, rest = rest[max(0, at - CONTEXT) : at], rest[at:]
    yield lead, rest


def _find_cut(tokenizer: Tokenizer, text: str) -> int:
    """Where to cut a text that is longer than a piece: before white space, or anywhere."""
    end = PIECE - CONTEXT
    spaces = [match.start() for match in re.compile(r"\s+").finditer(text, max(1, end - SEARCHED), end)]
    cuts = [*spaces[: -TRIED - 1 : -1], *range(end, max(0, end - TRIED), -1)]
    for at in cuts:
        before = text[max(0, at - CONTEXT) : at]
        alone, followed = tokenize(tokenizer, [before, before + text[at : at + CONTEXT]])
        if followed[: len(alone)] == alone:
            return at
    return cuts[0]
