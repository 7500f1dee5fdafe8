"""An unfinished run on disk: finished parts survive a kill, and only the same run goes on with them.

.NAME.partial/          beside the output NAME
    lock                held by the process at work
    identity.json       what makes the run the same: arguments, model, data, versions
    records/00001.json  one for each finished part, written once all of it is on disk
    new/                the new output, until it is complete
    kept/               files that are needed until the run is finished
    old/                an older output, while the new one takes its place
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsefw.errors import InputError, first_line


def durably(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is there whole or not at all, and that survives a power cut once this has returned.

    Args:
        path: the file; replaced if it is there.
        write: writes the file to the path that it is called with.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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


class PartialFolder:
    """The folder of an unfinished run. `lock` and `open` it first; in the end `release` or `remove` it.

    Args:
        output: the run's output folder.

    Attributes:
        folder: path of this folder.
        new: folder of the new output, until it is complete.
        records: one record for each finished part, in their order.
        chosen: values that the run which began the folder chose by itself.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self.folder = output.with_name(f".{output.name}.partial")
        self.new = self.folder / "new"
        self._old, self._records = self.folder / "old", self.folder / "records"
        self.records: list[dict[str, Any]] = []
        self.chosen: dict[str, Any] = {}

    def lock(self) -> None:
        """Create the folder if it is not there, and keep other processes away from it.

        Raises:
            InputError: another process is at work there, or nothing can be written there.
        """
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = self._acquire_lock()
        except OSError as error:
            raise InputError(
                f"{self._output}: cannot be written ({first_line(error)}); choose another --output"
            ) from error

    def open(self, identity: dict[str, Any], chosen: dict[str, Any] | None = None, restart: bool = False) -> None:
        """Load the records of what is finished, or begin anew.

        Args:
            identity: what makes the run the same, as JSON values; the keys name a difference in messages.
            chosen: values that this run chose by itself. The values of an unfinished run take their place.
            restart: whether to discard what another run has finished.

        Raises:
            InputError: the unfinished run has another identity.
        """
        path, self.chosen = self.folder / "identity.json", chosen or {}
        identity = json.loads(json.dumps(identity))
        if restart or not path.exists() or not self.new.is_dir():
            self._clear()
            self._records.mkdir()
            self.new.mkdir()
            _write_json(path, {"identity": identity, "chosen": self.chosen})
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        stored, self.chosen = content["identity"], content["chosen"]
        self.records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(self._records.glob("*.json"))]
        for key in [*identity, *stored]:
            if stored.get(key) != identity.get(key):
                raise InputError(
                    f"{self._output}: an unfinished run of other input is there ({len(self.records)} parts finished): "
                    f"{key} {_abridged(stored.get(key))} then, {_abridged(identity.get(key))} now; give what it was "
                    "given to go on with it, or --restart to discard it, or another --output"
                )

    def _acquire_lock(self) -> int:
        path = self.folder / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held the lock may have removed the folder meanwhile, and another process made it anew.
            alone = path.exists() and os.path.samestat(os.fstat(lock), path.stat())
        except BlockingIOError:
            alone = False
        if not alone:
            os.close(lock)
            raise InputError(f"{self._output}: another run is writing it; wait for its end or choose another --output")
        return lock

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def add(self, record: dict[str, Any]) -> None:
        """Record that the next part is finished, with what a later run has to know of it."""
        _write_json(self._records / f"{len(self.records) + 1:05d}.json", record)
        self.records.append(record)

    def kept(self, name: str) -> Path:
        """Path of a file that is needed until the run is finished."""
        return self.folder / "kept" / f"{name}.safetensors"

    def move_into_place(self) -> None:
        """Make `new` the output; an older output is removed with this folder."""
        if self._output.exists():
            self._output.rename(self._old)
        self.new.rename(self._output)

    def restore_output(self) -> None:
        """Put an older output back, if `move_into_place` was interrupted between its two moves."""
        if self._old.exists() and not self._output.exists():
            self._old.rename(self._output)

    def release(self) -> None:
        """Leave the folder in place, and let other processes use it."""
        os.close(self._lock)

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)
        self.release()


def _write_json(path: Path, content: Any) -> None:
    durably(path, lambda temporary: temporary.write_text(json.dumps(content), encoding="utf-8"))


def _abridged(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
