"""Read texts as documents: the built-in text (`default`), a file, a dataset of the Hub, or a list."""

import gzip
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from sparsefw.data.records import ARGUMENTS, TEXT_COLUMNS, TOOLS, Records
from sparsefw.errors import InputError, errors_in_one_line, option, shown

# Part of a dataset: for calibration, or for evaluation.
Split = Literal["train", "test"]

# Datasets of the Hub with a short name: id, file or configuration, and split.
NAMED: dict[tuple[str, Split], tuple[str, str, str]] = {
    ("c4", "train"): ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "train"),
    ("c4", "test"): ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz", "validation"),
    ("wikitext", "train"): ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    ("wikitext", "test"): ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
}
# Splits of other datasets; the first one that exists is read.
SPLITS: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "train")}

# Mixture with a short name: web text, instructions with answers, and code. No part of it needs a log-in.
GENERAL = "general"
MIXTURE = ("c4", "neuralmagic/LLM_compression_calibration", "codeparrot/codeparrot-clean-valid")

# Name of the calibration text that the dense model writes itself; with prompts, SELF=PROMPTS.
SELF = "self"
# File with that text, next to the report: a record for each window, with its text and its tokens.
OWN_TEXT = "calibration.jsonl"

# Short names of calibration texts. The last two cannot be evaluated on.
NAMES = ("default", "c4", "wikitext", GENERAL, SELF)

FILES = (".txt", ".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")

# Names, in messages, of calibration data that a caller passes as documents and as token ids.
TEXTS, TOKENS = "texts", "token ids"

# Characters of a file, and rows of a parquet file, that are read at a time.
CHARACTERS, ROWS = 2**16, 64


# Name of a text, for the report and for messages, and its documents, each as consecutive strings. Documents are read
# one after another, when they are asked for, and only once; each must be read to its end before the next one.
Text = tuple[str, Iterator[Iterable[str]]]


def read_text(dataset: str | Iterable[Any], split: Split, records: Records | None = None) -> Text:
    """Open a text.

    Args:
        dataset: "default", "c4" or "wikitext"; the path of a .txt file (one document), or of a .jsonl, .json (also .gz)
            or .parquet file (one document in each record, in one of TEXT_COLUMNS); a Hub id ORG/NAME of a dataset with
            such records; or the documents or records themselves.
        split: the split of a dataset with a name. A file is read from its start for both splits.
        records: reads the records of the text; None: records have no messages.

    Raises:
        InputError: there is no such text. Reading the documents raises it if they cannot be read.
    """
    records = records or Records()
    if not isinstance(dataset, str):
        return TEXTS, records.texts(dataset, TEXTS)
    if dataset == "default":
        from sparsefw.default.text import evaluation_text, training_text

        document = training_text() if split == "train" else evaluation_text()
        return f"default, {'training' if split == 'train' else 'held-out'} text", iter([[document]])
    path = Path(os.path.expanduser(dataset))
    if (dataset, split) not in NAMED and dataset and os.path.exists(path):
        return dataset, _of_file(dataset, path, records)
    if dataset.startswith((".", "/", "~")) or dataset.lower().endswith(FILES):
        raise InputError(f"{dataset}: no such file; check the path")
    # A single word never reaches `datasets`: it would read "text" or "json" as all such files of the current folder.
    if (dataset, split) not in NAMED and not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        names = ", ".join(NAMES if split == "train" else NAMES[:-2])
        raise InputError(f"{shown(repr(dataset), 60)}: unknown dataset; give {names}, a file or a Hub id ORG/NAME")
    return _from_hub(dataset, split, records)


def is_own(dataset: Any) -> bool:
    """Tell whether the dense model writes a text itself."""
    return isinstance(dataset, str) and dataset.partition("=")[0] == SELF


def takes_library(dataset: str) -> bool:
    """Tell whether a text is read by a library that takes much memory: a dataset of the Hub, or a parquet file."""
    return dataset not in ("default", SELF) and not dataset.lower().endswith(tuple(x for x in FILES if x != ".parquet"))


def _read(items: Iterable[Any], source: str) -> Iterator[Any]:
    """Yield the items of a file or of the Hub, and turn errors of their reader into one line."""
    items, end = iter(items), object()
    for number in itertools.count():
        with errors_in_one_line(f"{source}: cannot be read beyond record {number}"):
            item = next(items, end)
        if item is end:
            return
        yield item


def _of_file(dataset: str, path: Path, records: Records) -> Iterator[Iterable[str]]:
    """Read the documents of a file."""
    name = path.name.lower()
    if not name.endswith(FILES) or not path.is_file():
        raise InputError(f"{dataset}: not a file of text; give one of {', '.join(FILES)}")
    if name.endswith(".txt"):
        return iter([_read(_strings(path), dataset)])
    return records.texts(_read(_records(path), dataset), dataset)


def _strings(path: Path) -> Iterator[str]:
    """Read a text file a part at a time."""
    # utf-8-sig drops a byte order mark.
    with path.open(encoding="utf-8-sig") as file:
        while string := file.read(CHARACTERS):
            yield string


def _records(path: Path) -> Iterator[Any]:
    """Read the records of a file: rows of parquet, or values of JSON, which is a list or has a value in each line."""
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import ParquetFile

        # Without a buffer a column would be read whole.
        with ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            # Only the column with the text is read, and those for the template of messages.
            names = file.schema_arrow.names
            text = next((name for name in TEXT_COLUMNS if name in names), None)
            columns = [name for name in (text, "messages", TOOLS, ARGUMENTS) if name in names] if text else None
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                yield from batch.to_pylist()
        return
    unpacked = gzip.open if path.suffix.lower() == ".gz" else open
    with unpacked(path, "rt", encoding="utf-8-sig") as file:
        lines = (line for line in file if not line.isspace())
        first = next(lines, "")
        if first.lstrip().startswith("["):
            yield from json.loads("".join([first, *lines]))
        elif first:
            yield from map(json.loads, itertools.chain([first], lines))


def _from_hub(dataset: str, split: Split, records: Records) -> Text:
    import datasets

    name, detail, part = NAMED.get((dataset, split), (dataset, "", None))
    if detail.endswith(".gz"):
        options = {"data_files": {part: detail}, "streaming": True}
    else:
        # A configuration is so small that `datasets` may cache it, for later runs without a network.
        options = {"name": detail} if detail else {"streaming": True}
    own = f"; {option('dataset', SELF)} needs no network" if split == "train" else ""
    with errors_in_one_line(
        f"{dataset}: cannot be read from the Hub (check the name, log in with `hf auth login` if it is gated, or give "
        f"a local file{own})"
    ):
        found = datasets.load_dataset(name, split=part, **options)
    if part is None:
        part = next((one for one in SPLITS[split] if one in found), None)
        if part is None:
            raise InputError(f"{dataset}: no split {' or '.join(SPLITS[split])}, only {shown(', '.join(found))}")
        found = found[part]
    source = " ".join(filter(None, (name, detail, part)))
    return source, records.texts(_read(found, source), source)
