"""Records with a column `text`."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sparsefw.errors import InputError, first_line, shown


def texts_of(records: Iterable[Any], source: str, failures: tuple[type[Exception], ...]) -> Iterator[str]:
    """The column `text` of records.

    Args:
        records: the records, read while they are asked for.
        source: name of the text, for messages.
        failures: errors of what cannot be read.

    Raises:
        InputError: while texts are read: there is no such column, it holds something else than strings, or reading
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
            raise InputError(f"{source}: no column `text`, only {columns}; rename the one with the text")
        text = record["text"]
        if not isinstance(text, str):
            raise InputError(f"{source}: record {n}: `text` is {type(text).__name__}, expected a string")
        yield text
