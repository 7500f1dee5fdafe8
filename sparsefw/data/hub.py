"""Datasets of the Hub, as the library `datasets` reads them.

The library is imported only for such a text, so that other texts can be read where it is not installed.
"""

import zlib
from typing import Any

from huggingface_hub.errors import HTTPError

from sparsefw.errors import InputError, first_line

# Rows of a parquet file that are decoded at once. `datasets` decodes all those of a row group otherwise.
ROWS_AT_ONCE = 64


def load_records(
    dataset: str, flag: str, *names: str, split: str | None = None, streaming: bool = False, **options: Any
) -> Any:
    """The records of a dataset, or of each split by name if `split` is None.

    Args:
        dataset: the user's name for it, for messages.
        flag: the command line's flag that may name a local file instead.
        names, options: arguments of `datasets.load_dataset`.
        split: the split.
        streaming: whether records are read one by one as they are asked for, and not kept in the library's cache.

    Raises:
        InputError: the library is not installed, there is no such dataset, or it cannot be read.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
        from datasets.packaged_modules.parquet.parquet import ParquetConfig
    except ImportError as error:
        raise InputError(
            f"{dataset}: the package `datasets` is needed to read it ({first_line(error)}); "
            f"install it, or give a local file with {flag} PATH"
        ) from error
    try:
        if not streaming:
            return datasets.load_dataset(*names, split=split, **options)
        builder = datasets.load_dataset_builder(*names, **options)
        if isinstance(builder.config, ParquetConfig):
            builder.config.batch_size = ROWS_AT_ONCE
        return builder.as_streaming_dataset(split=split)
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
    except failures() as error:
        raise InputError(f"{dataset}: cannot be read: {first_line(error)}") from error


def failures() -> tuple[type[Exception], ...]:
    """Errors of `datasets` for datasets that it cannot read."""
    from datasets.exceptions import DatasetsError

    # A damaged .gz raises EOFError or zlib.error.
    return OSError, ValueError, RuntimeError, EOFError, zlib.error, DatasetsError, HTTPError
