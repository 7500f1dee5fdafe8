"""Small files of a checkpoint: JSON of a bounded size, read as typed records."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from sparsefw.errors import InputError, first_line, shown

T = TypeVar("T")


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
