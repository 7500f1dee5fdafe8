"""Checks of an output folder: it may take the place of an older checkpoint, never of a file that the run reads."""

import os
from collections.abc import Iterable
from pathlib import Path

from sparsefw.checkpoint.source import CONFIG, root_of
from sparsefw.errors import InputError

# Files of which an older output has one. A model in memory may have no config; its report shows that it was pruned.
MARKS = (CONFIG, "report.json")


def partial_of(output: Path) -> Path:
    """The folder of an unfinished run into `output`."""
    return output.with_name(f".{output.name}.partial")


def check_output(output: Path, source: Path, overwrite: bool, read: Iterable[Path] = ()) -> None:
    """Refuse an output folder that would harm something.

    Args:
        output: folder for the pruned checkpoint.
        source: folder of the checkpoint that is read.
        overwrite: whether an older checkpoint may be replaced.
        read: other files and folders that the run reads.

    Raises:
        InputError: output and source are one folder or one lies in the other; the run reads a file in the output; or
            as `check_free`.
    """
    target, root = output.resolve(), root_of(source)
    if target.is_relative_to(root) or root.is_relative_to(target):
        raise InputError(f"{output}: is, holds or lies in the input folder {source}; choose another --output")
    check_free(output, overwrite)
    for path in (source, *read):
        # The path itself may be a link in the output.
        for place in (Path(os.path.abspath(path)), path.resolve()):
            if place.is_relative_to(target) or place.is_relative_to(partial_of(target)):
                raise InputError(f"{output}: {path} lies in it, and would be deleted with it; choose another --output")


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
    for place, name in ((Path.cwd(), "current"), (Path.home(), "home")):
        if place.resolve().is_relative_to(target):
            raise InputError(f"{output}: the {name} folder lies in it, and would be replaced; give another one")
    if target.exists() and not target.is_dir():
        raise InputError(f"{output}: a file; --output is a folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{output}: exists and is not empty; choose another --output or add --overwrite")
    if not any((target / name).is_file() for name in MARKS):
        raise InputError(f"{output}: not a checkpoint (no {CONFIG}), so --overwrite will not remove it")
