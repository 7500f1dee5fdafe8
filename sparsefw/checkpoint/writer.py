"""Write a checkpoint shard by shard, so that an interrupted run can resume after the last finished shard.

.NAME.partial/          hidden folder next to the output NAME
    lock                locked by the process that writes; the lock ends with the process
    identity.json       identity of the run: arguments, model, data, versions; and its choices
    records/00001.json  record of a finished shard with digests, written once the shard's files are on disk
    new/                the new output, until it is complete
    kept/               shards that are not part of the output, and shards that will replace some of it
    recovery/           what the recovery of the whole model needs to go on
    old/                an older output, while the new one takes its place
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, TypeVar

import filelock
from safetensors import SafetensorError
from safetensors.torch import save_file

from sparsefw.checkpoint.files import (
    CARD,
    CONFIG,
    SUMS,
    check_free,
    check_writable,
    convert,
    durably,
    file_digest,
    parse_object,
)
from sparsefw.checkpoint.quantization import without_quantization
from sparsefw.checkpoint.source import INDEX, TOKENIZER_CONFIG, companions, matches, read_headers, read_json
from sparsefw.checkpoint.tensors import Tensors
from sparsefw.errors import InputError, first_line, invocation, option, shown, worded
from sparsefw.ranks import ALONE, Ranks

T = TypeVar("T")

# Writes pages about a model into its folder; None: none are written.
Describe = Callable[[Path], None] | None


@dataclass(frozen=True)
class Record:
    """Record of a finished shard.

    Attributes:
        bytes: bytes of its tensors, with those of compared methods.
        digests: SHA-256 of its files by their paths in the hidden folder: of the shard itself, and of the shards of
            compared methods.
        note: JSON values that a run needs to resume after the shard.
    """

    bytes: int
    digests: dict[str, str]
    note: Any


class Writer:
    """Writer of a checkpoint, for a `with` statement.

    All files go into a hidden folder next to `output`. `finish` moves them into place, and until then an older output
    stays unchanged. If the `with` block ends before, finished shards stay, and a writer of the same identity resumes
    after them. If no shard is finished, the hidden folder is deleted.

    Args:
        output: folder for the checkpoint.
        shards: number of shards, each written by a call of `write`. A further shard, with a number of `shards` + n,
            replaces shard n when the output is finished.
        identity: JSON values that must be the same for a run to resume, by names for messages.
        source: folder of the checkpoint that is read, whose other files are copied. None: the model is in memory, and
            its shards are not part of the output.
        overwrite: whether an older checkpoint may be replaced.
        restart: whether to discard the shards of an unfinished run.
        ranks: the ranks that write, each its own shards. Rank 0 opens the folder and finishes it.

    Attributes:
        output: folder for the checkpoint, with links resolved.
        folder: folder of the checkpoint until `finish`. A file that is put here is not copied from the source.
        recovery: folder for the state of a recovery. Its files stay while the run is unfinished.
        records: records of the finished shards by number; of other ranks only those from before this writer.
    """

    def __init__(
        self,
        output: Path,
        shards: int,
        identity: dict[str, Any] | None = None,
        *,
        source: Path | None = None,
        overwrite: bool = False,
        restart: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.output, self.shards = output.resolve(), shards
        # As it is read back from JSON, where a tuple becomes a list.
        self._identity: dict[str, Any] = json.loads(json.dumps(identity or {}))
        self._source, self._overwrite, self._restart, self._ranks = source, overwrite, restart, ranks
        self._partial = self.output.with_name(f".{self.output.name}.partial")
        self.folder, self._old, self.recovery = (self._partial / name for name in ("new", "old", "recovery"))
        self._identity_file = self._partial / "identity.json"
        self._lock = filelock.FileLock(self._partial / "lock", timeout=0)
        self.records: dict[int, Record] = {}
        self._done = False

    def __enter__(self) -> "Writer":
        if self._ranks.first:
            self._partial.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
                self._open()
            except filelock.Timeout as error:
                raise InputError(
                    f"{self.output}: another run is writing it; wait for its end or choose another folder"
                ) from error
            except BaseException:
                self._leave()
                raise
        self.records = self._ranks.broadcast_object(self.records)
        if not self.folder.is_dir():
            raise InputError(f"{self.output}: rank 0 writes there, and this machine does not see it; share the folder")
        return self

    def _open(self) -> None:
        """Load the records of an unfinished run of the same identity, or begin anew, and delete all other files."""
        self._restore_old()
        check_free(self.output, self._overwrite)
        before = self.begun()
        if before:
            for name, now in self._identity.items():
                if (then := before["identity"].get(name)) != now:
                    raise InputError(
                        f"{self.output}: an unfinished run of other input is there: {worded(name)} was "
                        f"{shown(then, 60)}, and is {shown(now, 60)}; give the same to go on, or "
                        f"{option('restart', True)} to discard it, or choose another folder"
                    )
            # Ranks finish shards in any order. Shards after a gap are made again.
            for n in takewhile(lambda n: self._record(n).exists(), count()):
                self.records[n] = self._read(self._record(n), Record)
        else:
            # First, so that no run resumes with the files that a kill leaves of the others.
            self._identity_file.unlink(missing_ok=True)
        known = {self._partial / name for record in self.records.values() for name in record.digests}
        known |= {*map(self._record, self.records)}
        for path in self._partial.glob("*/*"):
            if before and path.parent == self.recovery:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path not in known:
                path.unlink()
        if not before:
            for name in ("new", "kept", "records", "recovery"):
                (self._partial / name).mkdir(exist_ok=True)
            self.choose({})

    def begun(self) -> dict[str, dict[str, Any]]:
        """Read identity and choices of the unfinished run that this one resumes; empty if there is none.

        Raises:
            InputError: the identity file is damaged.
        """
        if self._restart or not self._goes_on():
            return {}
        return self._read(self._identity_file, dict[str, dict[str, Any]])

    def choose(self, chosen: dict[str, int]) -> None:
        """Store what the run has chosen itself, for a run that resumes it and reads it by `begun`."""
        if self._ranks.first:
            durably(self._identity_file, json.dumps({"identity": self._identity, "chosen": chosen}))

    def _restore_old(self) -> None:
        """Put an older output back if a run was killed while it replaced the output."""
        if self._old.exists() and not self.output.exists():
            self._old.rename(self.output)

    def _goes_on(self) -> bool:
        """Tell whether there are finished shards, damaged or not, after which a run may resume."""
        return all(path.exists() for path in (self._identity_file, self.folder, self._record(0)))

    def _record(self, n: int) -> Path:
        return self._partial / "records" / f"{n + 1:05d}.json"

    def _read(self, path: Path, kind: type[T]) -> T:
        try:
            return convert(kind, parse_object(path.read_bytes(), path), "")
        except (OSError, InputError) as error:
            raise InputError(
                f"{self.output}: the unfinished run there is damaged: {first_line(error)}; {option('restart', True)} "
                f"discards it, or choose another folder"
            ) from error

    @property
    def finished(self) -> list[Any]:
        """Return the notes of the finished shards, in order."""
        return [self.records[n].note for n in sorted(self.records)]

    @property
    def written(self) -> int:
        """Count the bytes of the tensors in finished shards, with those of compared methods."""
        return sum(record.bytes for record in self.records.values())

    def check_space(self, size: int) -> None:
        """Refuse a run for which the disk has too little space; `size` bytes are still to be written."""
        free = shutil.disk_usage(check_writable(self._partial.parent)).free
        if size > free:
            raise InputError(
                f"{self.output}: {size / 1e9:.2f} GB are still to be written, and the disk has {free / 1e9:.2f} GB "
                f"free; make space or choose another folder"
            )

    def path(self, n: int, method: str | None = None) -> Path:
        """Return the path of shard n (from 0) until `finish`; with a method, that of its shard of a compared method."""
        if method is None and self._source is not None and n < self.shards:
            return self.folder / f"model-{n + 1:05d}-of-{self.shards:05d}.safetensors"
        return self._partial / "kept" / f"{method or 'model'}-{n + 1:05d}.safetensors"

    def latest(self, n: int) -> Path:
        """Return the path of the shard that replaces shard n, or else of shard n."""
        replacing = self.path(n + self.shards)
        # If the shard is in its place already, a kill came between.
        return replacing if n + self.shards in self.records and replacing.exists() else self.path(n)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._partial).as_posix()

    def writes(self, n: int) -> bool:
        """Tell whether this rank writes shard n."""
        return n % self._ranks.count == self._ranks.number

    def write(
        self,
        n: int,
        tensors: Tensors,
        note: Any = None,
        compared: dict[str, Tensors] | None = None,
    ) -> None:
        """Write a shard. Once this returns, it is on disk.

        Args:
            n: the number of the shard, from 0.
            tensors: the tensors by name, on any device.
            note: JSON values that a run needs to resume after the shard.
            compared: by method, the tensors as compared methods have pruned them. Their files are kept until `finish`.

        Raises:
            OSError, SafetensorError: the disk is full or fails.
        """
        size, digests = 0, {}
        for method, pruned in ({None: tensors} | (compared or {})).items():
            path = self.path(n, method)
            on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in pruned.items()}
            durably(path, partial(save_file, on_host, metadata={"format": "pt"}))
            size += sum(tensor.nbytes for tensor in on_host.values())
            # The system still has the file in memory.
            digests[self._name(path)] = file_digest(path)
        record = Record(size, digests, note)
        durably(self._record(n), json.dumps(asdict(record)))
        self.records[n] = record

    def drop(self, first: int) -> None:
        """Drop the finished shards from this number on."""
        for n in [n for n in self.records if n >= first]:
            self._record(n).unlink()
            del self.records[n]

    def discard(self) -> None:
        """Drop all finished shards, so that no run goes on from them."""
        self._record(0).unlink()

    def finish(self, describe: Describe = None) -> None:
        """Complete the output, write SHA256SUMS, and move the output into place.

        Args:
            describe: writes pages about a complete model into its folder. SHA256SUMS leaves the model card out.

        Raises:
            InputError: `output` has been taken by other files meanwhile.
        """
        self.records = {n: r for records in self._ranks.gather(self.records) for n, r in records.items()}
        folder = self.folder
        if self._ranks.first:
            for n in range(self.shards):
                self.latest(n).replace(self.path(n))
            # In order, since the digest of a shard that replaces another one comes later.
            written = {
                self.path(n % self.shards): record.digests[self._name(self.path(n))]
                for n, record in sorted(self.records.items())
            }
            if self._source is not None:
                self._write_index()
                copy_companions(self._source, folder)
            if describe:
                describe(folder)
            lines = []
            for name in sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()):
                path = folder / name
                # safetensors makes files that only the owner can read.
                path.chmod(folder.stat().st_mode & 0o666)
                if name != CARD:
                    lines.append(f"{written.get(path) or file_digest(path)}  {name}\n")
            durably(folder / SUMS, "".join(lines))
            check_free(self.output, self._overwrite)
            if self.output.exists():
                self.output.rename(self._old)
            folder.rename(self.output)
        self._done = True
        self._ranks.barrier()

    def _write_index(self) -> None:
        tensors = read_headers(self.folder, [self.path(n).name for n in range(self.shards)])
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
                "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            },
            "weight_map": {name: tensor.file.name for name, tensor in tensors.items()},
        }
        durably(self.folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        finished = self._leave() if self._ranks.first else len(self.records)
        if isinstance(error, SafetensorError):
            # The message names no file, for example where the disk is full.
            error.add_note(f"in {self.output}")
        if error and self._done:
            error.add_note(f"{self.output} is complete")
        elif error and finished:
            goes_on = "" if self._restart else f": the same {invocation()} goes on from there"
            error.add_note(f"{min(finished, self.shards)} of {self.shards} shards are finished{goes_on}")

    def _leave(self) -> int:
        """Keep the finished shards of an unfinished run, delete all else, and return the number of the shards."""
        if not self._lock.is_locked:
            return 0
        self._restore_old()
        finished = 0 if self._done or not self._goes_on() else len([*self._record(0).parent.glob("*.json")])
        if not finished:
            self._identity_file.unlink(missing_ok=True)
            shutil.rmtree(self._partial)
        self._lock.release()
        return finished


def copy_companions(source: Path, folder: Path, ignored: Iterable[str] = ()) -> None:
    """Copy a source's `companions`. Files that exist, and those that match `ignored` patterns, are left out."""
    for path in companions(source):
        target = folder / path.relative_to(source)
        if not matches(path.name.lower(), ignored) and not target.exists():
            target.parent.mkdir(exist_ok=True)
            # Only the content is copied, since the source's files may be read-only or links.
            durably(target, rewritten(path, source) or partial(shutil.copyfile, path))


def rewritten(path: Path, source: Path) -> str:
    """Make the text that is written in place of a source's config; empty if a file is copied as it is.

    The code of a checkpoint is never copied, so `auto_map`, which names it, is removed. Outputs are not quantized, so
    the quantization config is removed as well.

    Args:
        path: a file of the source.
        source: folder of the source, which `inspect` has checked.
    """
    if path not in (source / CONFIG, source / TOKENIZER_CONFIG):
        return ""
    content = read_json(path)
    changed = without_quantization(content) if path.name == CONFIG else content
    plain = json.loads(json.dumps(changed), object_hook=lambda x: {k: x[k] for k in x if k != "auto_map"})
    text = json.dumps(plain, indent=2) + "\n"
    # Texts are compared, since a config may hold NaN, which does not equal itself.
    return text if text != json.dumps(content, indent=2) + "\n" else ""
