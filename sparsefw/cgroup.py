"""The memory that control groups leave to a process: a job's limit, as of SLURM or systemd, or a container's.

A process is in one group of every hierarchy that is mounted: the one of version 2, and those of version 1, of which one
may be that of memory. A group's limit holds for all groups below it, too. man 7 cgroups; Linux's
admin-guide/cgroup-v2.rst and admin-guide/cgroup-v1/memory.rst.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

THIS = Path("/proc/self")


class Files(NamedTuple):
    """Where a version of control groups has its numbers.

    Attributes:
        limit: name of the file with the limit.
        taken: names in memory.stat of the bytes taken that no file backs; the first one that is there counts.
    """

    limit: str
    taken: tuple[str, ...]


# By the type of the file system. Version 1 has numbers with the groups below ("total"), and of a group by itself.
FILES = {
    "cgroup2": Files("memory.max", ("anon",)),
    "cgroup": Files("memory.limit_in_bytes", ("total_rss", "rss")),
}


def left(process: Path = THIS) -> list[int]:
    """Bytes that each limit on a process leaves to it. File cache is not counted as taken: the system drops it.

    Args:
        process: its folder in /proc.
    """
    return [nbytes for files, folder in _groups(process) if (nbytes := _left(files, folder)) is not None]


def _left(files: Files, folder: Path) -> int | None:
    """Bytes that one group leaves; None: it has no limit, or none that can be read."""
    limit = "".join(_lines(folder / files.limit))
    if not limit.isdecimal():
        # "max" in version 2. Version 1 has a number that is larger than any memory.
        return None
    sizes = dict(line.split(" ") for line in _lines(folder / "memory.stat"))
    return int(limit) - next((int(sizes[name]) for name in files.taken if name in sizes), 0)


def _groups(process: Path) -> Iterator[tuple[Files, Path]]:
    """The folders of the groups that a process is in, each followed by those above it, as far as they are mounted."""
    paths = _paths(process)
    for line in _lines(process / "mountinfo"):
        mount, _, system = line.partition(" - ")
        kind, *_, options = system.split(" ")
        if kind == "cgroup" and "memory" not in options.split(","):
            continue
        root, point = map(_unescaped, mount.split(" ")[3:5])
        path = paths.get(kind)
        # In a container, the group of the container may be the root of what is mounted.
        if path and path.is_relative_to(root):
            below = path.relative_to(root)
            yield from ((FILES[kind], Path(point) / group) for group in (below, *below.parents))


def _paths(process: Path) -> dict[str, PurePosixPath]:
    """The path of a process in the hierarchies that may limit its memory, by the type of the file system."""
    paths = {}
    for line in _lines(process / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            paths["cgroup2"] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            paths["cgroup"] = PurePosixPath(path)
    return paths


def _unescaped(text: str) -> str:
    r"""A path of mountinfo, in which a blank, say, is \040."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text)


def _lines(path: Path) -> list[str]:
    """The lines of a file; none of one that cannot be read. A group whose limit cannot be seen has none."""
    try:
        text = os.fsdecode(path.read_bytes())
    except OSError:
        return []
    return [line for line in text.split("\n") if line]
