"""An unfinished run on disk: what it has finished survives a kill, and only the same run goes on with it.

.NAME.partial/          beside the output NAME
    lock                held by the process at work
    identity.json       what makes the run the same: arguments, model, data, versions
    records/00001.json  one for each finished part, written once all of it is on disk
    new/                the output to be
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsefw.errors import InputError, first_line


def durably(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file that is there whole or not at all, whatever happens, and stays once this has returned.

    Args:
        path: of the file; replaced if it is there.
        write: writes it under the path that it is given.
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


class Partial:
    """The folder of an unfinished run, created or found, and locked. `open` it; in the end `release` or `remove` it.

    Args:
        folder: where it is.
        output: what the run makes, for messages.

    Attributes:
        folder: where it is.
        records: of the parts that are finished, in their order.
        chosen: what the run that began it chose by itself.

    Raises:
        InputError: another process is at work there, or nothing can be written there.
    """

    def __init__(self, folder: Path, output: Path):
        self.folder, self._output, self._records = folder, output, folder / "records"
        self.records: list[dict] = []
        self.chosen: dict[str, Any] = {}
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._lock = self._locked(output)
        except OSError as error:
            raise InputError(f"{output}: cannot be written ({first_line(error)}); choose another --output") from error

    def open(self, identity: dict[str, Any], chosen: dict[str, Any] | None = None, restart: bool = False) -> None:
        """Find what is finished, or begin.

        Args:
            identity: what the run is, by the words in which a difference is told; values as JSON has them.
            chosen: what a run chooses by itself and a later one has to keep to.
            restart: discard what another run has finished.

        Raises:
            InputError: a run with another identity left it.
        """
        path, self.chosen = self.folder / "identity.json", chosen or {}
        identity = json.loads(json.dumps(identity))
        if restart or not path.exists() or not (self.folder / "new").is_dir():
            self._clear()
            self._records.mkdir()
            (self.folder / "new").mkdir()
            self._write(path, {"identity": identity, "chosen": self.chosen})
            return
        content = json.loads(path.read_text(encoding="utf-8"))
        before, self.chosen = content["identity"], content["chosen"]
        self.records = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(self._records.glob("*.json"))]
        for what in [*identity, *before]:
            if before.get(what) != identity.get(what):
                raise InputError(
                    f"{self._output}: an unfinished run of other input is there ({len(self.records)} parts finished): "
                    f"{what} {_said(before.get(what))} then, {_said(identity.get(what))} now; give what it was given "
                    "to go on with it, or --restart to discard it, or another --output"
                )

    def _locked(self, output: Path) -> int:
        path = self.folder / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = path.exists() and os.path.samestat(os.fstat(lock), path.stat())
        except BlockingIOError:
            alone = False
        if not alone:
            os.close(lock)
            raise InputError(f"{output}: another run is writing it; wait for its end or choose another --output")
        return lock

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def _write(self, path: Path, content: Any) -> None:
        durably(path, lambda temporary: temporary.write_text(json.dumps(content), encoding="utf-8"))

    def add(self, record: dict) -> None:
        """Note that the next part is finished, and what is to be known of it later."""
        self._write(self._records / f"{len(self.records) + 1:05d}.json", record)
        self.records.append(record)

    def release(self) -> None:
        """Let others at it."""
        os.close(self._lock)

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.folder)
        self.release()


def _said(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
