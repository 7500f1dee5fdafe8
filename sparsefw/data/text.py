"""Texts: documents from the embedded text, a file, a dataset of the Hub, or a list.

`default` is the embedded text; `c4` and `wikitext` are datasets of the Hub.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsefw.data.records import load_records, texts_of
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
        documents: the documents that have not been read yet.
    """

    source: str
    documents: Iterator[str]

    def __iter__(self) -> Iterator[str]:
        return self.documents


def read_text(dataset: str | Sequence[str], *, part: Part) -> Text:
    """Open a text.

    Args:
        dataset: "default", "c4", "wikitext", the path of a .txt (one document), .jsonl, .json (also .gz) or
            .parquet file (one document per record, in `text`), or a Hub id ORG/NAME of a dataset with such records;
            or the documents themselves.
        part: the part of a named dataset. A file is read from its start for both parts.

    Raises:
        InputError: there is no such text, or it cannot be read; also while the documents are read.
    """
    if not isinstance(dataset, str):
        return Text(TEXTS, _checked(dataset))
    if dataset == "default":
        return _embedded(part)
    if (dataset, part) in NAMED:
        name, options = NAMED[dataset, part]
        detail = options.get("name") or options["data_files"][options["split"]]
        source = f"{name} {detail} {options['split']}"
        return Text(source, texts_of(load_records(dataset, FLAG[part], name, **options), source))
    if not dataset.isprintable() or any(len(os.fsencode(part)) > LONGEST_NAME for part in Path(dataset).parts):
        raise InputError(f"{shown(dataset, 60)}: not the name of a text; from Python, give documents as a list")
    path = Path(os.path.expanduser(dataset))
    suffix = next((s for s in sorted(READERS, key=len, reverse=True) if path.name.lower().endswith(s)), None)
    if dataset and path.is_dir():
        raise InputError(f"{dataset}: a folder; give one file ({', '.join(READERS)})")
    if dataset and path.exists():
        if suffix is None:
            raise InputError(f"{dataset}: unknown kind of file; give one of {', '.join(READERS)}")
        return _local(dataset, path, READERS[suffix], part)
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
        yield document


def _embedded(part: Part) -> Text:
    from sparsefw.default.text import evaluation_text, training_text

    try:
        document = training_text() if part == "calibration" else evaluation_text()
    except RuntimeError as error:
        raise InputError(f"default: {first_line(error)}; give a file with {FLAG[part]} PATH") from error
    return Text(f"default, {'training' if part == 'calibration' else 'held-out'} text", iter([document]))


def _local(dataset: str, path: Path, reader: str, part: Part) -> Text:
    if reader == "text":
        try:
            # The -sig variant leaves out a byte order mark.
            return Text(dataset, iter([path.read_text(encoding="utf-8-sig")]))
        except UnicodeDecodeError as error:
            raise InputError(f"{dataset}: not UTF-8 text ({first_line(error)}); convert it") from error
        except OSError as error:
            raise InputError(f"{dataset}: cannot be read: {first_line(error)}") from error
    if path.stat().st_size == 0:
        raise InputError(f"{dataset}: empty, there is no text in it")
    # Escaped, since `datasets` takes a path for a pattern.
    files = glob.escape(str(path.absolute()))
    records = load_records(dataset, FLAG[part], reader, data_files=files, split="train", streaming=True)
    return Text(dataset, texts_of(records, dataset))


def _from_hub(dataset: str, part: Part) -> Text:
    splits = load_records(dataset, FLAG[part], dataset, streaming=True)
    split = next((split for split in SPLITS[part] if split in splits), None)
    if split is None:
        raise InputError(f"{dataset}: no split {' or '.join(SPLITS[part])}, only {', '.join(splits)}; give another")
    source = f"{dataset} {split}"
    return Text(source, texts_of(splits[split], source))
