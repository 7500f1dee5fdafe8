"""Checks of an output folder: it may take the place of an older checkpoint, never of a file that the run reads."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from sparsefw.checkpoint.locks import partial_of
from sparsefw.checkpoint.source import CONFIG, root_of
from sparsefw.errors import InputError

REPORT = "report.json"

# Names of files, and what they show a folder to be.
Kind = tuple[tuple[str, ...], str]


# What shows that a folder is an output that may be replaced, and what it is then. A model in memory may have no config;
# its report shows that a folder holds a pruned one.
CHECKPOINT = (CONFIG, REPORT), "a checkpoint"


def check_output(
    output: Path, source: Path, overwrite: bool, read: Iterable[Path] = (), kind: Kind = CHECKPOINT
) -> None:
    """Refuse an output folder that would harm something.

    Args:
        output: folder for the pruned checkpoint.
        source: folder of the checkpoint that is read.
        overwrite: whether an older checkpoint may be replaced.
        read: other files and folders that the run reads.
        kind: see `check_free`.

    Raises:
        InputError: output and source are one folder or one lies in the other; output is a file, or a folder with
            something in it that may not be replaced; the run reads a file in it.
    """
    for path in (output, *read):
        _check_not_endless(path)
    target, root = output.resolve(), root_of(source)
    if _lies_in(target, root) or _lies_in(root, target):
        raise InputError(f"{output}: is, holds or lies in the input folder {source}; choose another --output")
    check_free(output, overwrite, kind)
    for path in (source, *read):
        # The path itself may be a link in the output.
        for place in (Path(os.path.abspath(path)), path.resolve()):
            for folder in (target, partial_of(target)):
                if _lies_in(place, folder):
                    raise InputError(
                        f"{output}: {path} lies in {folder}, and would be deleted with it; choose another --output"
                    )


def check_free(output: Path, overwrite: bool, kind: Kind = CHECKPOINT) -> None:
    """Refuse an output folder that is no folder, or has something in it that may not be replaced.

    Args:
        output: the folder.
        overwrite: whether an older output may be replaced.
        kind: names of files of which an older output has one, and what that is.

    Raises:
        InputError: it is one of these.
    """
    if not os.path.lexists(output):
        return
    _check_not_endless(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: a file; --output is a folder")
    # A link stays, and what it points to is replaced. Before Python 3.12 one to another disk counted as a mount point.
    if output.resolve().is_mount():
        raise InputError(f"{output}: a mount point, which cannot be replaced; give a folder inside it")
    # A relative path would lead nowhere afterwards, and the caller would stand in a folder that is gone.
    if not output.is_absolute() and (target := output.resolve()) in (Path.cwd(), *Path.cwd().parents):
        if target == Path.cwd():
            raise InputError(f"{output}: the current folder, which would be replaced; give a folder inside it")
        raise InputError(f"{output}: the current folder lies in it, and would be deleted; choose another --output")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{output}: exists and is not empty; choose another --output or add --overwrite")
    marks, what = kind
    if not any((output / name).is_file() for name in marks):
        raise InputError(f"{output}: not {what} (no {marks[0]}), so --overwrite will not remove it")


def _check_not_endless(path: Path) -> None:
    """Refuse a link that leads back to itself."""
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise InputError(f"{path}: a link that leads back to itself") from error


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, by whatever name: a folder may be mounted at several places."""
    return any(place == folder or _is_same(place, folder) for place in (path, *path.parents))


def _is_same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        # One of them is not there.
        return False
