"""Digests of the tensors that a run has read of its source, for a later run that goes on with what is finished.

The later run ends with the same bytes as one that has begun anew if all that the finished parts were made of is still
the same. To hash a large model before a run would take minutes. So tensors are hashed as they are read. A file with the
same size, times and inode as before is taken for the same. If it has others, because it was copied or loaded again, its
tensors are hashed again.
"""

import hashlib
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock

import xxhash

from sparsefw.checkpoint.progress import SILENT, Progress
from sparsefw.checkpoint.reader import opened_at, read_into, read_tensors, stored_parts
from sparsefw.checkpoint.source import CONFIG, Checkpoint
from sparsefw.checkpoint.tensors import Loadable, TensorInfo
from sparsefw.errors import InputError
from sparsefw.ranks import Ranks

# Size, time of the last change of the content, inode; then the time of the last change of anything, as of a name.
Stamp = list[int]

# Bytes that are hashed at once where no tensor is wanted.
CHUNK = 2**22


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the config, and of names, dtypes and shapes of all tensors, in hex.

    It depends neither on where the files are nor on how tensors are spread over them.
    """
    stored = stored_parts(checkpoint.tensors)
    tensors = sorted((name, str(info.dtype), info.shape) for name, info in stored.items())
    return hashlib.sha256((checkpoint.folder / CONFIG).read_bytes() + repr(tensors).encode()).hexdigest()


@dataclass(frozen=True)
class FileRead:
    """Tensors that were read of a file.

    Attributes:
        stamp: tells the file from one with another content.
        tensors: digests of the tensors, by name.
    """

    stamp: Stamp
    tensors: dict[str, str]


class Evidence:
    """Reads the tensors of a checkpoint, and remembers what they were.

    Args:
        checkpoint: the source of a run.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._stored = stored_parts(checkpoint.tensors)
        self._stamps: dict[Path, Stamp] = {}
        # Digests of tensors, by name: those that `take` has not returned, and the names of all others.
        self._new: dict[str, str] = {}
        self._known: set[str] = set()
        # Digests of all tensors that were read here, and of those read by other ranks and not yet here.
        self._mine: dict[str, str] = {}
        self._theirs: list[tuple[int, str, str]] = []
        self._told: set[str] = set()
        # Two threads read, and a third one writes.
        self._lock = Lock()

    def read(self, tensors: dict[str, TensorInfo], pin: bool = False) -> dict[str, Loadable]:
        """Like `read_tensors`.

        Raises:
            InputError: as there, or a file was changed since the run began.
        """
        return read_tensors(tensors, pin, self._note)

    def _note(self, name: str, file: FileIO, data: memoryview) -> None:
        path, stamp = Path(str(file.name)), _stamp(os.fstat(file.fileno()))
        with self._lock:
            first = self._stamps.setdefault(path, stamp)
            known = name in self._known
        # Another owner or link does no harm to a run, and over a network a file may have an inode for each opening.
        if stamp[:2] != first[:2]:
            raise InputError(f"{path}: was changed since the run began; leave the model as it is while it is pruned")
        if not known:
            digest = xxhash.xxh3_128_hexdigest(data)
            with self._lock:
                self._new[name] = self._mine[name] = digest
                self._known.add(name)

    def agree(self, ranks: Ranks) -> None:
        """Refuse to go on if ranks have read tensors of different content, as far as they have been read.

        Raises:
            InputError: on every rank that has read both.
        """
        if ranks.alone:
            return
        with self._lock:
            fresh = {name: digest for name, digest in self._mine.items() if name not in self._told}
            self._told |= fresh.keys()
        for number, digests in enumerate(ranks.gather(fresh)):
            self._theirs += [(number, name, digest) for name, digest in digests.items()]
        left = []
        for number, name, digest in self._theirs:
            if name not in self._mine:
                left.append((number, name, digest))
            elif self._mine[name] != digest:
                raise InputError(f"{name}: that of rank {number} is another tensor; give all ranks the same model")
        self._theirs = left

    def take(self) -> list[FileRead]:
        """The tensors that were read since the last call, file by file, for `find_difference`.

        They may be more than the finished parts are made of, since blocks are read ahead.
        """
        with self._lock:
            digests, self._new = self._new, {}
        files: dict[Path, dict[str, str]] = {}
        for name, digest in digests.items():
            files.setdefault(self._stored[name].file, {})[name] = digest
        return [FileRead(self._stamps[path], tensors) for path, tensors in files.items()]

    def find_difference(self, taken: list[FileRead], progress: Progress = SILENT) -> str | None:
        """The name of a tensor that is not what an earlier run has read; None if there is none.

        Args:
            taken: what `take` has returned in the earlier run.
            progress: tells the user of a long wait.

        Raises:
            InputError: a file cannot be read.
        """
        current = {path: _stamp(os.stat(path)) for path in {info.file for info in self._stored.values()}}
        read = {name: (digest, file.stamp) for file in taken for name, digest in file.tensors.items()}
        if gone := read.keys() - self._stored.keys():
            return min(gone)
        changed = {
            name: self._stored[name] for name, (_, stamp) in read.items() if current[self._stored[name].file] != stamp
        }
        size = sum(tensor.nbytes for tensor in changed.values())
        with progress.hashing("tensors of files that are not what they were", size) as done:
            for name, file in opened_at(changed):
                if _digest(file, changed[name].nbytes) != read[name][0]:
                    return name
                done(changed[name].nbytes)
        with self._lock:
            self._stamps |= current
            self._known |= read.keys()
        return None


def _stamp(stat: os.stat_result) -> Stamp:
    # Not the device: its number may be another one after a restart of the machine.
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]


def _digest(file: FileIO, size: int) -> str:
    """Digest of the next bytes of a file."""
    digest, buffer = xxhash.xxh3_128(), bytearray(min(CHUNK, size))
    while size:
        part = memoryview(buffer)[: min(CHUNK, size)]
        read_into(file, part)
        digest.update(part)
        size -= len(part)
    return digest.hexdigest()
