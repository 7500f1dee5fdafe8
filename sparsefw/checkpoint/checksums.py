"""SHA256SUMS: the digest of every file of an output, in the form that `sha256sum --check` reads."""

import hashlib
import re
from pathlib import Path

from sparsefw.checkpoint.source import check_file
from sparsefw.errors import InputError, first_line, shown

SUMS = "SHA256SUMS"

# A line has about 100 bytes, and the largest models have hundreds of shards.
MAX_SUMS_BYTES = 2**24

DIGEST = re.compile("[0-9a-f]{64}")
_LINE = re.compile(rf"({DIGEST.pattern}) [ *](.+)")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def sums_text(digests: dict[str, str]) -> str:
    """The content of SHA256SUMS, of digests by the files' names; a file in a folder is called `folder/name`."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def read_sums(path: Path) -> dict[str, str]:
    """The digests of SHA256SUMS by the files' names.

    Raises:
        InputError: it is missing, no file, too large, or not what a run writes.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SUMS_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {shown(first_line(error))}") from error
    if len(content) > MAX_SUMS_BYTES:
        raise InputError(f"{path}: more than {MAX_SUMS_BYTES >> 20} MiB; no run writes as much")
    digests: dict[str, str] = {}
    for n, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        match = _LINE.fullmatch(line)
        if not match or match[2] in digests or not _is_inside(match[2]):
            raise InputError(f"{path}: line {n} is not a digest and the name of a file that no line before has")
        digests[match[2]] = match[1]
    return digests


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file in a folder or below it. Files of a source may have names with `:` or `\\`."""
    return name.isprintable() and not {"", ".", ".."} & set(name.split("/"))
