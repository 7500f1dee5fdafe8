"""Texts: documents from the embedded text, a file, a dataset of the Hub, or a list.

`default` is the embedded text; `c4` and `wikitext` are datasets of the Hub.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsefw.data import files, hub
from sparsefw.data.parquet import parquet_records
from sparsefw.data.records import check_encodable, texts_of
from sparsefw.errors import InputError, first_line, shown

Part = Literal["calibration", "evaluation"]

# Bytes of a file's name: systems take no longer one.
LONGEST_NAME = 255

NAMED: dict[tuple[str, Part], tuple[str, dict[str, Any]]] = {
    ("c4", "calibration"): (
        "allenai/c4",
        {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train", "streaming": True},
    ),
    ("c4", "evaluation"): (
        "allenai/c4",
        {
            "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
            "split": "validation",
            "streaming": True,
        },
    ),
    # Small enough to be kept in the cache of `datasets`, where it is found without a network.
    ("wikitext", "calibration"): ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "train"}),
    ("wikitext", "evaluation"): ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": "test"}),
}
SPLITS: dict[Part, tuple[str, ...]] = {"calibration": ("train",), "evaluation": ("test", "validation", "train")}
FLAG: dict[Part, str] = {"calibration": "--dataset", "evaluation": "--eval"}

READERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".json.gz": "json",
    ".jsonl.gz": "json",
    ".parquet": "parquet",
}

# Source of a text that was given as a list of documents.
TEXTS = "texts"


@dataclass(frozen=True, eq=False)
class Text:
    """Documents, each read only once, when it is asked for.

    Attributes:
        source: name of the text, for the report and for messages.
        documents: the documents that have not been read yet, each in strings that follow each other. A document is
            read to its end before the next one is asked for.
    """

    source: str
    documents: Iterator[Iterator[str]]

    @classmethod
    def of(cls, source: str, documents: Iterable[str]) -> "Text":
        """A text of whole documents."""
        return cls(source, (iter((document,)) for document in documents))


def read_text(dataset: str | Sequence[str], *, part: Part, room: int | None = None) -> Text:
    """Open a text.

    Args:
        dataset: "default", "c4", "wikitext", the path of a .txt (one document), .jsonl, .json (also .gz) or
            .parquet file (one document per record, in `text`), or a Hub id ORG/NAME of a dataset with such records;
            or the documents themselves.
        part: the part of a named dataset. A file is read from its start for both parts.
        room: bytes of memory that reading may take; None: any number.

    Raises:
        InputError: there is no such text; while the documents are read: it cannot be read.
    """
    if not isinstance(dataset, str):
        return Text.of(TEXTS, _checked(dataset))
    if dataset == "default":
        return _embedded(part)
    if (dataset, part) in NAMED:
        name, options = NAMED[dataset, part]
        detail = options.get("name") or options["data_files"][options["split"]]
        source = f"{name} {detail} {options['split']}"
        records = hub.load_records(dataset, FLAG[part], name, **options)
        return Text.of(source, texts_of(records, source, hub.failures()))
    if not dataset.isprintable() or any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(dataset).parts):
        raise InputError(f"{shown(dataset, 60)}: not the name of a text; from Python, give documents as a list")
    path = Path(os.path.expanduser(dataset))
    suffix = next((s for s in sorted(READERS, key=len, reverse=True) if path.name.lower().endswith(s)), None)
    if dataset and path.is_dir():
        raise InputError(f"{dataset}: a folder; give one file ({', '.join(READERS)})")
    if dataset and path.exists():
        if suffix is None:
            raise InputError(f"{dataset}: unknown kind of file; give one of {', '.join(READERS)}")
        return _local(dataset, path, READERS[suffix], room)
    if suffix is not None or dataset.startswith((".", "/", "~")):
        raise InputError(f"{dataset}: no such file; check the path after {FLAG[part]}")
    # A bare word never reaches `datasets`, which would take "text" or "json" for all such files of this folder.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        raise InputError(
            f"{dataset or FLAG[part]}: unknown dataset; give default, c4, wikitext, a file or a Hub id ORG/NAME"
        )
    return _from_hub(dataset, part)


def _checked(documents: Sequence[str]) -> Iterator[str]:
    for n, document in enumerate(documents, 1):
        if not isinstance(document, str):
            raise InputError(f"{TEXTS}: document {n} is {type(document).__name__}, expected a string")
        check_encodable(document, f"{TEXTS}: document {n}")
        yield document


def _embedded(part: Part) -> Text:
    from sparsefw.default.text import evaluation_text, training_text

    try:
        document = training_text() if part == "calibration" else evaluation_text()
    except RuntimeError as error:
        raise InputError(f"default: {first_line(error)}; give a file with {FLAG[part]} PATH") from error
    return Text.of(f"default, {'training' if part == 'calibration' else 'held-out'} text", [document])


def _local(dataset: str, path: Path, reader: str, room: int | None) -> Text:
    if not path.is_file():
        raise InputError(f"{dataset}: a pipe or a device, which may have no end; give a file")
    if reader == "text":
        return Text(dataset, iter([files.text_strings(path, dataset)]))
    if path.stat().st_size == 0:
        raise InputError(f"{dataset}: empty, there is no text in it")
    records = parquet_records(path, room) if reader == "parquet" else files.json_records(path)
    return Text.of(dataset, texts_of(records, dataset, files.FAILURES))


def _from_hub(dataset: str, part: Part) -> Text:
    splits = hub.load_records(dataset, FLAG[part], dataset, streaming=True)
    split = next((split for split in SPLITS[part] if split in splits), None)
    if split is None:
        others = shown(", ".join(splits))
        raise InputError(f"{dataset}: no split {' or '.join(SPLITS[part])}, only {others}; give another")
    source = f"{dataset} {split}"
    return Text.of(source, texts_of(splits[split], source, hub.failures()))
