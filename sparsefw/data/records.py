"""Records with a column `text`."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sparsefw.errors import InputError, first_line, shown

# Characters of a text that are checked at once.
CHECKED_AT_ONCE = 2**16


def texts_of(records: Iterable[Any], source: str, failures: tuple[type[Exception], ...]) -> Iterator[str]:
    """The column `text` of records.

    Args:
        records: the records, read while they are asked for.
        source: name of the text, for messages.
        failures: errors of what cannot be read.

    Raises:
        InputError: while texts are read: there is no such column, it holds something else than texts, or reading
            fails.
    """
    left = iter(records)
    for n in itertools.count(1):
        try:
            # A record that has been used is let go before the next one is read.
            record = text = None
            record = next(left)
        except StopIteration:
            return
        except failures as error:
            raise InputError(f"{source}: cannot be read beyond record {n - 1}: {first_line(error)}") from error
        if not isinstance(record, Mapping):
            raise InputError(f"{source}: record {n} is {type(record).__name__}; expected an object with a text")
        if "text" not in record:
            columns = shown(", ".join(record))
            raise InputError(f"{source}: record {n}: no column `text`, only {columns}; rename the one with the text")
        text = record["text"]
        if not isinstance(text, str):
            raise InputError(f"{source}: record {n}: `text` is {type(text).__name__}, expected a string")
        check_encodable(text, f"{source}: record {n}")
        yield text


def check_encodable(text: str, place: str) -> None:
    """Refuse a string with half of a surrogate pair: JSON can hold it, and no tokenizer takes it.

    Args:
        text: the string.
        place: what it is of, for the message.

    Raises:
        InputError: it has one.
    """
    if text.isascii():
        return
    for start in range(0, len(text), CHECKED_AT_ONCE):
        try:
            # In parts, since a copy of a long text takes much memory.
            text[start : start + CHECKED_AT_ONCE].encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise InputError(
                f"{place}: character {start + error.start + 1} is half of a surrogate pair ({half}), which no "
                "encoding of text has; correct the text, or leave it out"
            ) from error
