"""Small files: JSON of a bounded size, read as typed records; files that are there whole or not at all; digests."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sparsefw.errors import InputError, first_line, naming, shown

T = TypeVar("T")

# The digest of every file of an output, in the form that `sha256sum --check` reads.
SUMS = "SHA256SUMS"
# A line has about 100 bytes, and the largest models have hundreds of shards.
MAX_SUMS_BYTES = 2**24

DIGEST = re.compile("[0-9a-f]{64}")


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        InputError: it is missing, larger, or no file: a pipe would block for ever.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing, or not a file")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {shown(first_line(error))}") from error
    if len(content) > limit:
        raise InputError(f"{path}: more than {limit // 2**20} MiB, which no real one has")
    return content


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object in which every key stands once: one reader may take the first value, another the last.

    Args:
        content: bytes of the file, or of the part of it that is JSON.
        path: the file's path, for the message.

    Raises:
        InputError: it is not JSON in UTF-8, no object, holds a key twice, or is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise InputError(f"{path}: {shown(key)} is in it twice; keep one")
        return content

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except InputError:
        raise
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
        if isinstance(write, str):
            temporary.write_text(write, encoding="utf-8")
        else:
            write(temporary)
        _sync(temporary)
        temporary.replace(path)
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


def sums_text(digests: dict[str, str]) -> str:
    """The content of SHA256SUMS, of digests by the files' names; a file in a folder is called `folder/name`."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def read_sums(path: Path) -> dict[str, str]:
    """The digests of SHA256SUMS by the files' names.

    Raises:
        InputError: it is missing, no file, too large, or not what a run writes.
    """
    digests: dict[str, str] = {}
    lines = read_bounded(path, MAX_SUMS_BYTES).decode("utf-8", "replace").removesuffix("\n")
    for n, line in enumerate(lines.split("\n") if lines else [], 1):
        match = re.fullmatch(rf"({DIGEST.pattern}) [ *](.+)", line)
        # The names are those of files in the folder or below it.
        if not match or match[2] in digests or {"", ".", ".."} & set(match[2].split("/")):
            raise InputError(f"{path}: line {n} is not a digest and the name of a file that no line before has")
        digests[match[2]] = match[1]
    return digests
