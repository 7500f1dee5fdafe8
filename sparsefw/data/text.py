"""Text, and the windows of tokens cut from it for calibration and evaluation.

A text is `default` (the embedded one), `c4`, `wikitext`, a local file or another dataset of the Hub. Documents are
separated by an empty line. The only special token is the one that the tokenizer itself puts at the start of a text,
once, before the first document.
"""

import glob
import hashlib
import itertools
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from huggingface_hub.errors import HTTPError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sparsefw.data.tokenizer import start_tokens, tokenize
from sparsefw.data.windows import Windows
from sparsefw.errors import InputError, first_line

Part = Literal["calibration", "evaluation"]

SEPARATOR = "\n\n"
# Calibration windows are drawn from the first `nsamples * seqlen` times this many tokens of a dataset.
TOKENS_READ = 4
DOCUMENTS_AT_ONCE = 64
# A first guess at how much text holds the tokens asked for; more is read when it proves too small.
CHARS_PER_TOKEN = 8
# The last tokens of a text that was cut differ from those of the whole text.
UNSETTLED_TOKENS = 64

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
    # Small, so it is kept in the cache of `datasets`, where it is found without a network too.
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

# What `datasets` raises for files and datasets it cannot read; a damaged .gz raises EOFError or zlib.error.
_FAILURES = (OSError, ValueError, RuntimeError, EOFError, zlib.error, DatasetsError, HTTPError)


@dataclass(frozen=True, eq=False)
class Text:
    """Documents, read as they are asked for and only once, and a name for what they come from."""

    source: str
    documents: Iterator[str]

    def __iter__(self) -> Iterator[str]:
        return self.documents


def read_text(dataset: str, *, part: Part) -> Text:
    """Open a text.

    Args:
        dataset: "default", "c4", "wikitext", the path of a .txt (one document), .jsonl, .json (also .gz) or
            .parquet file (one document per record, in `text`), or a Hub id ORG/NAME of a dataset with such records.
        part: which part of a named dataset. A file is read from its start for both.

    Raises:
        InputError: there is no such text, or it cannot be read; also while the documents are read.
    """
    if dataset == "default":
        return _embedded(part)
    if (dataset, part) in NAMED:
        name, options = NAMED[dataset, part]
        detail = options.get("name") or options["data_files"][options["split"]]
        source = f"{name} {detail} {options['split']}"
        return Text(source, _texts(_load(dataset, part, name, **options), source))
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
    splits = _load(dataset, part, dataset, streaming=True)
    split = next((split for split in SPLITS[part] if split in splits), None)
    if split is None:
        raise InputError(f"{dataset}: no split {' or '.join(SPLITS[part])}, only {', '.join(splits)}; give another")
    source = f"{dataset} {split}"
    return Text(source, _texts(splits[split], source))


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, dataset: str, *, nsamples: int, seqlen: int, seed: int
) -> Windows:
    """Draw disjoint windows at random.

    Documents are tokenized one by one and concatenated until there are `TOKENS_READ` times the tokens asked for, or
    no more. From a random offset on, the tokens are cut into windows, and `nsamples` of these are drawn.

    Args:
        tokenizer: of the model.
        dataset: see `read_text`.
        nsamples: number of windows.
        seqlen: tokens in a window.
        seed: the draw depends on it and on the text, on nothing else.

    Raises:
        InputError: the text cannot be read or is too short, or an argument is out of range.
    """
    _check_positive("--nsamples", nsamples)
    _check_positive("--seqlen", seqlen)
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: expected a number from 0 to 2^63 - 1")
    text = read_text(dataset, part="calibration")
    needed = nsamples * seqlen
    ids = _leading_tokens(tokenizer, text, TOKENS_READ * needed)
    if len(ids) < needed:
        fits = [
            f"--{name} {n}" for name, n in (("nsamples", len(ids) // seqlen), ("seqlen", len(ids) // nsamples)) if n
        ]
        raise InputError(
            f"{text.source}: {len(ids)} tokens, but {nsamples} windows of {seqlen} need {needed}; "
            f"use {' or '.join([*fits, 'a longer text'])}"
        )
    generator = torch.Generator().manual_seed(seed)
    offset = int(torch.randint(min(seqlen - 1, len(ids) - needed) + 1, (1,), generator=generator))
    slots = _cut(ids[offset:], seqlen)
    return _windows(slots[torch.randperm(len(slots), generator=generator)[:nsamples]], text.source)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, dataset: str, *, seqlen: int, limit: int | None = None
) -> Windows:
    """Cut a text into consecutive windows from its start, as it is done for the perplexity on WikiText-2.

    The documents are joined by an empty line and tokenized in one piece; an incomplete last window is dropped.

    Args:
        tokenizer: of the model.
        dataset: see `read_text`.
        seqlen: tokens in a window.
        limit: at most this many windows; then only as much text is read as they take. None: all.

    Raises:
        InputError: the text cannot be read or holds no window, or an argument is out of range.
    """
    _check_positive("--seqlen", seqlen)
    if limit is not None:
        _check_positive("--eval-windows", limit)
    text = read_text(dataset, part="evaluation")
    ids = _joined_tokens(tokenizer, text, None if limit is None else limit * seqlen)
    if len(ids) < seqlen:
        raise InputError(
            f"{text.source}: {len(ids)} tokens, fewer than one window of {seqlen}; "
            f"use --seqlen {len(ids)} or a longer text"
        )
    return _windows(_cut(ids, seqlen), text.source)


def _windows(ids: Tensor, source: str) -> Windows:
    return Windows(ids, source, hashlib.sha256(ids.numpy().tobytes()).hexdigest())


def _cut(ids: list[int], seqlen: int) -> Tensor:
    n = len(ids) // seqlen
    return torch.tensor(ids[: n * seqlen]).view(n, seqlen)


def _leading_tokens(tokenizer: PreTrainedTokenizerBase, text: Text, wanted: int) -> list[int]:
    """The first `wanted` tokens, of documents that are tokenized one by one."""
    ids = start_tokens(tokenizer)
    empty = True
    before = ""
    while len(ids) < wanted and (batch := list(itertools.islice(text, DOCUMENTS_AT_ONCE))):
        empty = empty and not any(document.strip() for document in batch)
        # The separator goes before a document, where most tokenizers give it the tokens of the joined text.
        separated = [before + batch[0], *(SEPARATOR + document for document in batch[1:])]
        before = SEPARATOR
        ids.extend(itertools.chain.from_iterable(tokenize(tokenizer, separated)))
    if empty:
        raise InputError(f"{text.source}: empty, there is no text in it")
    return ids[:wanted]


def _joined_tokens(tokenizer: PreTrainedTokenizerBase, text: Text, wanted: int | None) -> list[int]:
    """The first `wanted` tokens (None: all) of the documents joined and tokenized in one piece."""
    documents: list[str] = []
    chars, enough = 0, None if wanted is None else wanted * CHARS_PER_TOKEN
    while True:
        # No more left to read: the loop over the rest of the text ends by itself.
        whole = True
        for document in text:
            documents.append(document)
            chars += len(document) + len(SEPARATOR)
            if enough is not None and chars >= enough:
                whole = False
                break
        joined = SEPARATOR.join(documents)
        if whole and not joined.strip():
            raise InputError(f"{text.source}: empty, there is no text in it")
        ids = start_tokens(tokenizer) + tokenize(tokenizer, [joined])[0]
        if whole or len(ids) >= wanted + UNSETTLED_TOKENS:
            return ids[:wanted]
        enough *= 2


def _embedded(part: Part) -> Text:
    from sparsefw.default.text import heldout_text, training_text

    try:
        document = training_text() if part == "calibration" else heldout_text()
    except RuntimeError as error:
        raise InputError(f"default: {first_line(error)}; give a file with {FLAG[part]} PATH") from error
    return Text(f"default, {'training' if part == 'calibration' else 'held-out'} text", iter([document]))


def _local(dataset: str, path: Path, reader: str, part: Part) -> Text:
    if reader == "text":
        try:
            # With -sig a byte order mark is no part of the text.
            return Text(dataset, iter([path.read_text(encoding="utf-8-sig")]))
        except UnicodeDecodeError as error:
            raise InputError(f"{dataset}: not UTF-8 text ({first_line(error)}); convert it") from error
        except OSError as error:
            raise InputError(f"{dataset}: cannot be read: {first_line(error)}") from error
    if path.stat().st_size == 0:
        raise InputError(f"{dataset}: empty, there is no text in it")
    # Escaped, since `datasets` takes a path for a pattern.
    files = glob.escape(str(path.absolute()))
    return Text(dataset, _texts(_load(dataset, part, reader, data_files=files, split="train", streaming=True), dataset))


def _load(dataset: str, part: Part, *names: str, **options: Any) -> Any:
    try:
        return datasets.load_dataset(*names, **options)
    except StopIteration as error:
        # What it raises for a file without a record.
        raise InputError(f"{dataset}: empty, there is no text in it") from error
    except DatasetNotFoundError as error:
        raise InputError(
            f"{dataset}: neither a file nor a dataset of the Hub that you have access to; "
            f"check the name, or give a local file with {FLAG[part]} PATH"
        ) from error
    except (ConnectionError, HTTPError) as error:
        raise InputError(
            f"{dataset}: the Hub cannot be reached ({first_line(error)}); give a local file with {FLAG[part]} PATH"
        ) from error
    except _FAILURES as error:
        raise InputError(f"{dataset}: cannot be read: {first_line(error)}") from error


def _texts(rows: Iterable[dict[str, Any]], source: str) -> Iterator[str]:
    """The column `text` of records."""
    rows = iter(rows)
    for n in itertools.count(1):
        try:
            row = next(rows, None)
        except _FAILURES as error:
            raise InputError(f"{source}: cannot be read beyond record {n - 1}: {first_line(error)}") from error
        if row is None:
            return
        if "text" not in row:
            raise InputError(f"{source}: no column `text`, only {', '.join(row)}; rename the one with the text")
        if not isinstance(row["text"], str):
            raise InputError(f"{source}: record {n}: `text` is {type(row['text']).__name__}, expected a string")
        yield row["text"]


def _check_positive(flag: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{flag} {value}: expected at least 1")
