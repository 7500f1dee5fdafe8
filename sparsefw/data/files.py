"""Texts in local files, of which no more is in memory than a piece or a record."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparsefw.errors import InputError, first_line

# Characters that are read at once, and the most of a record (of parquet: its bytes).
AT_ONCE = 2**16
LONGEST_RECORD = 2**24
TOO_LONG = f"a record of more than {LONGEST_RECORD >> 20} million characters; give such a text as a .txt file"

# Errors of files that cannot be read. A damaged .gz raises EOFError or zlib.error.
FAILURES = (OSError, ValueError, RuntimeError, EOFError, zlib.error)

# Characters between two values, and between those of a list.
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
        MemoryError: while records are read: a record is too large for this process's limit.
    """
    unpacked = gzip.open if path.suffix.lower() == ".gz" else open
    with unpacked(path, "rt", encoding="utf-8-sig") as file:
        yield from _values(file)


def _values(file: IO[str]) -> Iterator[Any]:
    """The values of a file of JSON: those of a list, or one after another."""
    values = _Values(file)
    if values.peek(SPACE) == "[":
        values.skip()
        while (character := values.peek(SPACE_IN_LIST)) != "]":
            if not character:
                raise ValueError("the list has no end")
            value = values.take()
            yield {"text": value} if isinstance(value, str) else value
        values.skip()
    while values.peek(SPACE):
        yield values.take()


class _Values:
    """Values of JSON, taken one by one from a file that is read as far as they go."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def peek(self, between: re.Pattern[str]) -> str:
        """The next character that does not stand between values; empty at the end of the file."""
        while True:
            if space := between.match(self._text, self._at):
                self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            self._text, self._at = self._file.read(AT_ONCE), 0
            if not self._text:
                return ""

    def skip(self) -> None:
        """Go past the next character."""
        self._at += 1

    def take(self) -> Any:
        """The next value.

        Raises:
            ValueError: there is no value, or it is too long.
        """
        while True:
            try:
                value, self._at = self._decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                self._text, self._at = self._text[self._at :], 0
                self._text += self._more(error)

    def _more(self, error: json.JSONDecodeError) -> str:
        """Text to go on with where a value has no end, at least as much as there is of it."""
        if not error.msg.startswith("Unterminated string") and error.pos < len(error.doc) - UNFINISHED:
            raise error
        size = len(self._text)
        if size > LONGEST_RECORD:
            raise ValueError(TOO_LONG)
        more = self._file.read(max(AT_ONCE, size))
        if not more:
            raise error
        return more
