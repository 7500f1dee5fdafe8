"""Read small files of a bounded size, write files whole or not at all, and check the folder of an output."""

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

# An older output has one of these files. A model in memory may have no config, but its output has a report.
MARKS = (CONFIG, "report.json")

# Real configs have less than 100 KB, tokenizer configs 2 MB, and the index of a model with 10^12 weights 20 MB.
MAX_JSON_BYTES = 32 * 2**20

# The model card. Users edit it, so it has no digest.
CARD = "README.md"

# Digests of the other files of an output, as `sha256sum --check` reads them; a file in a folder is `folder/name`.
SUMS = "SHA256SUMS"
DIGEST = re.compile("[0-9a-f]{64}")


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        InputError: the file is missing or larger, or the path is no file (a pipe would block for ever).
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
        InputError: the content is not JSON in UTF-8, no object, or nested too deeply.
    """
    try:
        parsed = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({shown(first_line(error))}); download or copy it again") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(parsed).__name__}; download or copy it again")
    return parsed


def convert(kind: type[T], value: Any, where: str) -> T:
    """Make a dataclass of parsed JSON. Fields with a default may be missing, and entries without a field are ignored.

    Args:
        kind: the dataclass.
        value: result of `json.loads`.
        where: beginning of the message of an error.

    Raises:
        InputError: a field is missing or has another type. The message says where.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}{error}; it is of another version of sparsefw, or damaged") from error


def parse(kind: type[T], path: Path, limit: int) -> T:
    """Make a dataclass of a file that holds a JSON object, see `read_bounded`, `parse_object` and `convert`."""
    return convert(kind, parse_object(read_bounded(path, limit), path), f"{path}: ")


def durably(path: Path, write: Callable[[Path], object] | str) -> None:
    """Write a file whole or not at all. Once this returns, the file survives a power cut.

    Args:
        path: the file, which is replaced if it exists.
        write: function that writes the file to a path, or the file's text.
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


def read_sums(path: Path) -> dict[str, str]:
    """Read the digests in SHA256SUMS, by path relative to its folder, such as `folder/name`.

    Raises:
        InputError: SHA256SUMS is missing, is not a file, is too large, or has a line that no run writes.
    """
    digests: dict[str, str] = {}
    for line in read_bounded(path, MAX_JSON_BYTES).decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        if not DIGEST.fullmatch(digest) or not name:
            raise InputError(f"{path}: {shown(line, 80)} is not a digest and the name of a file")
        digests[name] = digest
    return digests


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def roots_of(folder: Path) -> tuple[Path, Path]:
    """Return the folders in which the files of a checkpoint may lie: its own, and the Hub's cache, which has links."""
    return folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()


def check_output(output: Path, source: Path | None, overwrite: bool, texts: Iterable[Path] = ()) -> None:
    """Refuse an output folder that would damage what the run reads, or other files.

    Args:
        output: folder for the pruned checkpoint.
        source: folder of the checkpoint that is read; None: no folder is read.
        overwrite: whether an older checkpoint may be replaced.
        texts: paths of texts that are read, where they exist.

    Raises:
        InputError: output and source are the same folder or one lies in the other, a text lies in the output, or
            `check_free` refuses the output.
    """
    target = output.resolve()
    if source:
        root, cache = roots_of(source)
        if cache in root.parents:
            # The folder of the Hub's cache with all files of the model.
            root = cache / root.relative_to(cache).parts[0]
        if target.is_relative_to(root) or root.is_relative_to(target):
            raise InputError(f"{output}: is, holds or lies in {source}, which is read; choose another folder")
    # os.path.exists returns False for a text that is too long for a path, where Path.exists would raise.
    for text in filter(os.path.exists, texts):
        # The text's own path counts too: it may be a link in the output.
        if any(path.is_relative_to(target) for path in (Path(os.path.abspath(text)), text.resolve())):
            raise InputError(f"{output}: {text} lies in it, and would be deleted with it; choose another folder")
    check_free(output, overwrite)


def check_writable(folder: Path) -> Path:
    """Refuse a folder that cannot be made or written to, and return the folder or its nearest parent that exists.

    Raises:
        InputError: no file can be written there.
    """
    there = next(x for x in (folder, *folder.parents) if x.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: cannot be written to; choose another folder")
    return there


def check_free(output: Path, overwrite: bool) -> None:
    """Refuse an output that is no folder, or that holds files which may not be replaced.

    Args:
        output: the folder.
        overwrite: whether an older output may be replaced.

    Raises:
        InputError: the output is refused.
    """
    target = output.resolve()
    if target.is_mount() or Path.cwd().is_relative_to(target):
        raise InputError(
            f"{output}: a mount point or the current folder, which cannot be replaced; give a folder inside it"
        )
    if target.exists() and not target.is_dir():
        raise InputError(f"{output}: a file; give a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{output}: exists and is not empty; choose another folder or add {option('overwrite', True)}")
    if not any((target / name).is_file() for name in MARKS):
        raise InputError(f"{output}: not a checkpoint (no {CONFIG}), so {option('overwrite', True)} will not remove it")
