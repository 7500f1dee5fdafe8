"""Texts that the library `datasets` reads: records with a column `text`, in files and on the Hub.

The library is imported only for such a text, so that other texts can be read where it is not installed.
"""

import itertools
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from huggingface_hub.errors import HTTPError

from sparsefw.errors import InputError, first_line


def load_records(dataset: str, flag: str, *names: str, **options: Any) -> Any:
    """Call `datasets.load_dataset`.

    Args:
        dataset: the user's name for it, for messages.
        flag: the command line's flag that may name a local file instead.
        names, options: arguments of `load_dataset`.

    Raises:
        InputError: the library is not installed, there is no such dataset, or it cannot be read.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise InputError(
            f"{dataset}: the package `datasets` is needed to read it ({first_line(error)}); "
            f"install it, or give a .txt file with {flag} PATH"
        ) from error
    try:
        return datasets.load_dataset(*names, **options)
    except StopIteration as error:
        # `datasets` lets this escape for a file without a record.
        raise InputError(f"{dataset}: empty, there is no text in it") from error
    except DatasetNotFoundError as error:
        raise InputError(
            f"{dataset}: neither a file nor a dataset of the Hub that you have access to; "
            f"check the name, or give a local file with {flag} PATH"
        ) from error
    except (ConnectionError, HTTPError) as error:
        raise InputError(
            f"{dataset}: the Hub cannot be reached ({first_line(error)}); give a local file with {flag} PATH"
        ) from error
    except _failures() as error:
        raise InputError(f"{dataset}: cannot be read: {first_line(error)}") from error


def texts_of(records: Iterable[dict[str, Any]], source: str) -> Iterator[str]:
    """The column `text` of records.

    Args:
        records: from `load_records`.
        source: name of the text, for messages.

    Raises:
        InputError: while texts are read: there is no such column, it holds something else than strings, or reading
            fails.
    """
    left = iter(records)
    for n in itertools.count(1):
        try:
            record = next(left, None)
        except _failures() as error:
            raise InputError(f"{source}: cannot be read beyond record {n - 1}: {first_line(error)}") from error
        if record is None:
            return
        if "text" not in record:
            raise InputError(f"{source}: no column `text`, only {', '.join(record)}; rename the one with the text")
        text = record["text"]
        if not isinstance(text, str):
            raise InputError(f"{source}: record {n}: `text` is {type(text).__name__}, expected a string")
        yield text


def _failures() -> tuple[type[Exception], ...]:
    """Errors of `datasets` for files and datasets that it cannot read."""
    from datasets.exceptions import DatasetsError

    # A damaged .gz raises EOFError or zlib.error.
    return OSError, ValueError, RuntimeError, EOFError, zlib.error, DatasetsError, HTTPError
