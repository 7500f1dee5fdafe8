"""Small files, read with a bounded size and written whole or not at all; the folder that an output may take."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from huggingface_hub import constants

from sparsefw.errors import InputError, first_line, naming, option, shown

T = TypeVar("T")

CONFIG = "config.json"

# Files of which an older output has one. A model in memory may have no config; its report shows that it was pruned.
MARKS = (CONFIG, "report.json")

# Real configs have less than 100 KB, tokenizer configs 2 MB, the indices of models with 10^12 weights 20 MB.
MAX_JSON_BYTES = 32 * 2**20

# The digest of every file of an output but its model card, in the form that `sha256sum --check` reads.
SUMS = "SHA256SUMS"

# The model card, which users edit.
CARD = "README.md"
DIGEST = re.compile("[0-9a-f]{64}")


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        InputError: it is missing, larger, or no file: a pipe would block for ever.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing, or not a file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise InputError(f"{path}: more than {limit // 2**20} MiB, which no real one has")
    return content


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        content: bytes of the file.
        path: the file's path, for the message.

    Raises:
        InputError: it is not JSON in UTF-8, no object, or is nested too deeply.
    """
    try:
        parsed = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({shown(first_line(error))}); download or copy it again") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(parsed).__name__}; download or copy it again")
    return parsed


def convert(kind: type[T], value: Any, where: str) -> T:
    """Parsed JSON as a dataclass. Fields with a default may be missing, and entries that are no fields are passed over.

    Args:
        kind: the dataclass.
        value: as `json.loads` gives it.
        where: text before the message of an error.

    Raises:
        InputError: a field is missing or of another type; the message says where.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}{error}; it is of another version of sparsefw, or damaged") from error


def parse(kind: type[T], content: bytes, path: Path) -> T:
    """The content of a file, a JSON object, as a dataclass; see `parse_object` and `convert`."""
    return convert(kind, parse_object(content, path), f"{path}: ")


def durably(path: Path, write: Callable[[Path], object] | str) -> None:
    """Write a file that is there whole or not at all, and that survives a power cut once this has returned.

    Args:
        path: the file; replaced if it is there.
        write: writes the file to the path that it is called with; or the file's text.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
        try:
            if isinstance(write, str):
                temporary.write_text(write, encoding="utf-8")
            else:
                write(temporary)
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(path: Path) -> dict[str, str]:
    """The digests of SHA256SUMS by the files' names; a file in a folder is called `folder/name`.

    Raises:
        InputError: it is missing, no file, too large, or not what a run writes.
    """
    digests: dict[str, str] = {}
    for line in read_bounded(path, MAX_JSON_BYTES).decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        if not DIGEST.fullmatch(digest) or not name:
            raise InputError(f"{path}: {shown(line, 80)} is not a digest and the name of a file")
        digests[name] = digest
    return digests


def roots_of(folder: Path) -> tuple[Path, Path]:
    """The folders that the files of a checkpoint may lie in: its own, and the Hub's cache, whose files are links."""
    return folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()


def check_output(output: Path, source: Path, overwrite: bool, texts: Iterable[Path] = ()) -> None:
    """Refuse an output folder that would harm something.

    Args:
        output: folder for the pruned checkpoint.
        source: folder of the checkpoint that is read.
        overwrite: whether an older checkpoint may be replaced.
        texts: what else is read, if it is here.

    Raises:
        InputError: output and source are one folder or one lies in the other; a text lies in the output; or as
            `check_free`.
    """
    target, (root, cache) = output.resolve(), roots_of(source)
    if cache in root.parents:
        # All that the Hub's library has of the model.
        root = cache / root.relative_to(cache).parts[0]
    if target.is_relative_to(root) or root.is_relative_to(target):
        raise InputError(f"{output}: is, holds or lies in {source}, which is read; choose another folder")
    # os.path: what is too long for a path does not exist.
    for text in filter(os.path.exists, texts):
        # The text itself may be a link in the output.
        if any(path.is_relative_to(target) for path in (Path(os.path.abspath(text)), text.resolve())):
            raise InputError(f"{output}: {text} lies in it, and would be deleted with it; choose another folder")
    check_free(output, overwrite)


def check_writable(folder: Path) -> Path:
    """Refuse a folder that cannot be made or written to; returns it, or what is there of the folders that it lies in.

    Raises:
        InputError: no file can be written there.
    """
    there = next(x for x in (folder, *folder.parents) if x.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written to; choose another folder")
    return there


def check_free(output: Path, overwrite: bool) -> None:
    """Refuse an output folder that is no folder, or has something in it that may not be replaced.

    Args:
        output: the folder.
        overwrite: whether an older output may be replaced.

    Raises:
        InputError: it is one of these.
    """
    target = output.resolve()
    if target.is_mount():
        raise InputError(f"{output}: a mount point, which cannot be replaced; give a folder inside it")
    if target.exists() and not target.is_dir():
        raise InputError(f"{output}: a file; give a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{output}: exists and is not empty; choose another folder or add {option('overwrite', True)}")
    if not any((target / name).is_file() for name in MARKS):
        raise InputError(f"{output}: not a checkpoint (no {CONFIG}), so {option('overwrite', True)} will not remove it")
