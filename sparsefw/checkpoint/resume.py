"""An unfinished run on disk: finished parts survive a kill, and only the same run goes on with them.

.NAME.partial/          beside the output NAME
    lock                held by the process at work
    identity.json       what makes the run the same: arguments, model, data, versions
    records/00001.json  one for each finished part, written once all of it is on disk
    new/                the new output, until it is complete
    kept/               files that are needed until the run is finished
    old/                an older output, while the new one takes its place
    saved-*/            a model that is being written in place of the shards

The identity and the records are stored with their digests. What is damaged is never used, nor deleted without
`restart`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparsefw.checkpoint.files import convert, durably
from sparsefw.checkpoint.locks import LOCK, acquire, acquire_shared, check_apart, is_sole_holder, partial_of, share
from sparsefw.errors import InputError, first_line

T = TypeVar("T")

# How the name of a folder begins that holds a model while it is written in place of the shards.
SAVED = "saved-"


@dataclass(frozen=True)
class Part:
    """The record of a finished part: of one shard, and of the files that are kept with it.

    Attributes:
        names: names of the shard's tensors.
        bytes, parameters: their sizes in all.
        sha256: digest of the shard.
        kept: digests of the kept files, by name.
        read: the tensors of the source that were read since the last part.
        note: what a later run has to know of the part, as JSON values.
    """

    names: list[str]
    bytes: int
    parameters: int
    sha256: str
    kept: dict[str, str]
    read: list[Any]
    note: Any


@dataclass(frozen=True)
class _Beginning:
    """The content of identity.json, see `PartialFolder.open`."""

    identity: dict[str, Any]
    chosen: dict[str, int]


class PartialFolder:
    """The folder of an unfinished run. `lock` and `open` it first; in the end `release` or `remove` it.

    Args:
        output: the run's output folder.

    Attributes:
        folder: path of this folder.
        new: folder of the new output, until it is complete.
        parts: the finished parts by their numbers, as far as this process knows them.
        chosen: values that the run which began the folder chose by itself.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self.folder = partial_of(output)
        self.new = self.folder / "new"
        self._old, self._records, self._kept = (self.folder / name for name in ("old", "records", "kept"))
        self._identity = self.folder / "identity.json"
        self.parts: dict[int, Part] = {}
        self._lock: int | None = None
        self.chosen: dict[str, int] = {}

    def lock(self) -> None:
        """Create the folder if it is not there, and keep other processes away from it.

        Raises:
            InputError: another process is at work there, or nothing can be written there.
        """
        if self.folder.is_symlink():
            raise InputError(f"{self.folder}: a link, in place of the folder of an unfinished run; remove it")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = acquire(self.folder / LOCK)
        except OSError as error:
            raise InputError(
                f"{self._output}: cannot be written ({first_line(error)}); choose another --output"
            ) from error
        if lock is None:
            raise InputError(f"{self._output}: another run is writing it; wait for its end or choose another --output")
        self._lock = lock

    def share(self) -> None:
        """Let the other ranks of the run join."""
        assert self._lock is not None
        share(self._lock)

    def join(self, parts: dict[int, Part]) -> None:
        """Work in the folder that another rank has opened and shared.

        Args:
            parts: the finished parts by their numbers.

        Raises:
            InputError: it is not there: the ranks' machines have no folder in common.
        """
        lock = acquire_shared(self.folder / LOCK)
        if lock is None:
            raise InputError(
                f"{self._output}: rank 0 writes there, and this machine does not see it; choose an --output that all "
                "machines share"
            )
        self._lock, self.parts = lock, parts

    def check_apart(self) -> None:
        """Refuse to go on beside a run into a folder above the output or inside it.

        Raises:
            InputError: there is such a run.
        """
        check_apart(self._output)

    def open(
        self,
        identity: dict[str, Any],
        chosen: dict[str, int] | None = None,
        restart: bool = False,
        say: Callable[[str], None] = lambda line: None,
        ranks: int = 1,
    ) -> None:
        """Load the records of what is finished, or begin anew.

        Args:
            identity: what makes the run the same, as JSON values; the keys name a difference in messages.
            chosen: values that this run chose by itself. The values of an unfinished run take their place.
            restart: whether to discard what another run has finished.
            say: called with a line if what is there is no unfinished run any more.
            ranks: number of the processes that finish parts at the same time.

        Raises:
            InputError: the unfinished run has another identity, or is damaged.
        """
        identity = json.loads(json.dumps(identity))
        missing = self._missing()
        if not restart and not missing:
            self._load(identity, ranks)
            return
        # A run that was killed before its first part was finished is in nobody's way.
        if not restart and (self._count() or any(self.new.glob("*.safetensors"))):
            say(f"beginning anew: what {self.folder} holds is of no use without {missing[0]}")
        self._clear()
        self._records.mkdir()
        self.new.mkdir()
        self.chosen = chosen or {}
        _write_json(self._identity, asdict(_Beginning(identity, self.chosen)))

    def _missing(self) -> list[str]:
        """Names of what nothing goes on without, and is not there."""
        missing = [path.name for path in (self._identity, self.new) if not os.path.lexists(path)]
        return missing if self._count() else [*missing, self._records.name]

    def _load(self, identity: dict[str, Any], ranks: int) -> None:
        """Load the records of a run of this identity."""
        for folder in (self.new, self._records, self._kept):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise self.damaged(folder, "it is no folder")
        beginning = self._read_json(self._identity, _Beginning)
        for key in [*identity, *beginning.identity]:
            then, now = beginning.identity.get(key), identity.get(key)
            if then != now:
                raise self.other_input(f"{key} {_abridged(then)} then, {_abridged(now)} now")
        self.chosen = beginning.chosen
        count = self._count()
        missing = [n for n in range(count) if not os.path.lexists(self._record(n))]
        if missing and ranks > 1:
            # While a rank writes a part, others may finish any number of later ones. These are made again.
            count = missing[0]
            for path in self._records.glob("*.json"):
                if path.stem.isdecimal() and int(path.stem) > count:
                    _delete(path)
            missing = [count] if self._count() > count else []
        if missing:
            raise self.damaged(self._record(missing[0]), "it is missing")
        self.parts = {n: self._read_json(self._record(n), Part) for n in range(count)}

    def _count(self) -> int:
        """Number of the records on disk, damaged ones too."""
        return len(list(self._records.glob("*.json")))

    def _record(self, n: int) -> Path:
        return self._records / f"{n + 1:05d}.json"

    def _read_json(self, path: Path, kind: type[T]) -> T:
        """The content of a file that `_write_json` has written."""
        # Opening a pipe would block for ever.
        if path.is_symlink() or not path.is_file():
            raise self.damaged(path, "it is missing, or no file")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            digest, content = stored["sha256"], stored["content"]
            intact = digest == _digest(json.dumps(content))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(path, "it cannot be read, or is of another version") from error
        if not intact:
            raise self.damaged(path)
        try:
            return convert(kind, content, "")
        except InputError as error:
            raise self.damaged(path, str(error)) from error

    def damaged(self, path: Path, how: str = "it is not what was written") -> InputError:
        """The error for a file of an unfinished run that cannot be used."""
        return InputError(
            f"{self._output}: the unfinished run there is damaged, {path.relative_to(self.folder)}: {how}; "
            "--restart discards it, or choose another --output"
        )

    def other_input(self, what: str) -> InputError:
        """The error for a run that is another one than the unfinished one; `what` says what differs."""
        return InputError(
            f"{self._output}: an unfinished run of other input is there ({self._count()} shards finished): {what}; "
            "give what it was given to go on with it, or --restart to discard it, or another --output"
        )

    @property
    def finished(self) -> int:
        """Number of the parts on disk that a later run may go on with; damaged ones count."""
        return 0 if self._missing() else self._count()

    def _clear(self) -> None:
        # Without it nothing goes on with what a kill leaves of the rest.
        for path in (self._identity, *self.folder.iterdir()):
            if path.name != LOCK and os.path.lexists(path):
                _delete(path)

    def add(self, n: int, part: Part) -> None:
        """Record that a part is finished."""
        _write_json(self._record(n), asdict(part))
        self.parts[n] = part

    def kept(self, name: str) -> Path:
        """Path of a file that is needed until the run is finished."""
        return self._kept / f"{name}.safetensors"

    def remove_unknown(self, known: set[Path]) -> None:
        """Delete what a kill has left in `new`, `kept` and `saved-*`, and what else lies there, but the known files."""
        for path in (*self.new.iterdir(), *self._kept.glob("*"), *self.folder.glob(f"{SAVED}*")):
            if path not in known:
                _delete(path)

    def move_into_place(self, folder: Path) -> None:
        """Make a folder in this one the output; an older output is removed with this folder."""
        if self._output.exists():
            if self._old.exists():
                # A kill came after both moves: this is the output that was replaced.
                _delete(self._old)
            self._output.rename(self._old)
        folder.rename(self._output)

    def restore_output(self) -> None:
        """Put an older output back, if `move_into_place` was interrupted between its two moves."""
        if self._old.exists() and not self._output.exists():
            self._old.rename(self._output)

    def release(self) -> None:
        """Leave the folder in place, and let other processes use it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the folder, unless other ranks are at work there: what they leave there does no harm."""
        if self._lock is not None and is_sole_holder(self._lock):
            # Without it nothing goes on with what a kill leaves of the rest.
            self._identity.unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        self.release()


def _delete(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content)
    whole = f'{{"sha256": "{_digest(text)}", "content": {text}}}'
    durably(path, lambda temporary: temporary.write_text(whole, encoding="utf-8"))


def _abridged(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
