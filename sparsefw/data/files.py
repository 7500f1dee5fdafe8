"""Texts in local files, of which no more is in memory than a piece or a record."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparsefw.errors import InputError, first_line

# Characters that are read at once, and those of a record at most (of parquet: its bytes).
AT_ONCE = 2**16
LONGEST_RECORD = 2**24
TOO_LONG = f"a record of more than {LONGEST_RECORD >> 20} million characters; give such a text as a .txt file"

# Errors of files that cannot be read. A damaged .gz raises EOFError or zlib.error.
FAILURES = (OSError, ValueError, RuntimeError, EOFError, zlib.error)

# What may stand between two values, and between those of a list.
SPACE, SPACE_IN_LIST = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")

# Characters from an error of JSON to the end of the text, if more text may mend it: most in a pair of surrogates.
UNFINISHED = 16


def text_strings(path: Path, source: str) -> Iterator[str]:
    """The content of a text file, in strings that follow each other.

    Args:
        path: the file.
        source: the user's name for it, for messages.

    Raises:
        InputError: while it is read: it cannot be read, or is not UTF-8.
    """
    try:
        # The -sig variant leaves out a byte order mark.
        with path.open(encoding="utf-8-sig") as file:
            while string := file.read(AT_ONCE):
                yield string
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not UTF-8 text ({error.reason}); convert it") from error
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {first_line(error)}") from error


def json_records(path: Path) -> Iterator[Any]:
    """The records of a file of JSON, which may be compressed with gzip.

    A record is an object, or a string of a list of strings, which is the text itself. Objects stand in a list, or
    follow each other, as those of JSON Lines do.

    Raises:
        FAILURES: while records are read: the file cannot be read.
    """
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            yield from _values(file)
    else:
        with path.open(encoding="utf-8-sig") as file:
            yield from _values(file)


def _values(file: IO[str]) -> Iterator[Any]:
    """The values that a file of JSON holds in a list, or one after another."""
    decode = json.JSONDecoder().raw_decode
    text, at = "", 0
    listed, started = False, False
    while True:
        space = (SPACE_IN_LIST if listed else SPACE).match(text, at)
        at = space.end() if space else at
        if at == len(text):
            text, at = file.read(AT_ONCE), 0
            if text:
                continue
            if listed:
                raise ValueError("the list has no end")
            return
        if not started and text[at] == "[":
            listed, started, at = True, True, at + 1
        elif listed and text[at] == "]":
            listed, at = False, at + 1
        else:
            try:
                value, at = decode(text, at)
            except json.JSONDecodeError as error:
                text, at = text[at:] + _more(file, error, len(text) - at), 0
                continue
            started = True
            yield {"text": value} if listed and isinstance(value, str) else value


def _more(file: IO[str], error: json.JSONDecodeError, size: int) -> str:
    """Text to go on with where a value of `size` characters has no end, at least as much as there is of it.

    Raises:
        ValueError: the value is too long, or more text does not mend it.
    """
    if not error.msg.startswith("Unterminated string") and error.pos < len(error.doc) - UNFINISHED:
        raise error
    if size > LONGEST_RECORD:
        raise ValueError(TOO_LONG)
    more = file.read(max(AT_ONCE, size))
    if not more:
        raise error
    return more
