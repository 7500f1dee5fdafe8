"""An unfinished run on disk: finished parts survive a kill, and only the same run goes on with them.

.NAME.partial/          beside the output NAME
    lock                held by the process at work
    identity.json       what makes the run the same: arguments, model, data, versions
    records/00001.json  one for each finished part, written once all of it is on disk
    new/                the new output, until it is complete
    kept/               files that are needed until the run is finished
    old/                an older output, while the new one takes its place

The identity and the records are stored with their digests. What is damaged is never used, nor deleted without
`restart`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsefw.checkpoint.checksums import text_digest
from sparsefw.checkpoint.locks import LOCK, acquire, check_apart, partial_of
from sparsefw.errors import InputError, first_line, naming


def durably(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is there whole or not at all, and that survives a power cut once this has returned.

    Args:
        path: the file; replaced if it is there.
        write: writes the file to the path that it is called with.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path):
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
        self.folder = partial_of(output)
        self.new = self.folder / "new"
        self._old, self._records = self.folder / "old", self.folder / "records"
        self._identity = self.folder / "identity.json"
        self.records: list[dict[str, Any]] = []
        self.chosen: dict[str, Any] = {}

    def lock(self) -> None:
        """Create the folder if it is not there, and keep other processes away from it.

        Raises:
            InputError: another process is at work there, or nothing can be written there.
        """
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            lock = acquire(self.folder / LOCK)
        except OSError as error:
            raise InputError(
                f"{self._output}: cannot be written ({first_line(error)}); choose another --output"
            ) from error
        if lock is None:
            raise InputError(f"{self._output}: another run is writing it; wait for its end or choose another --output")
        self._lock = lock

    def check_apart(self) -> None:
        """Refuse to go on beside a run into a folder above the output or inside it.

        Raises:
            InputError: there is such a run.
        """
        check_apart(self._output)

    def open(self, identity: dict[str, Any], chosen: dict[str, Any] | None = None, restart: bool = False) -> None:
        """Load the records of what is finished, or begin anew.

        Args:
            identity: what makes the run the same, as JSON values; the keys name a difference in messages.
            chosen: values that this run chose by itself. The values of an unfinished run take their place.
            restart: whether to discard what another run has finished.

        Raises:
            InputError: the unfinished run has another identity, or is damaged.
        """
        self.chosen = chosen or {}
        identity = json.loads(json.dumps(identity))
        # A run that was killed before its first part was finished is in nobody's way.
        begun = self._identity.exists() and self.new.is_dir() and any(self._records.glob("*.json"))
        if restart or not begun:
            self._clear()
            self._records.mkdir()
            self.new.mkdir()
            _write_json(self._identity, {"identity": identity, "chosen": self.chosen})
            return
        content = self._read_json(self._identity)
        stored, self.chosen = content["identity"], content["chosen"]
        files = sorted(self._records.glob("*.json"))
        for n, file in enumerate(files):
            if file != self._record(n):
                raise self.damaged(self._record(n), "it is missing")
        self.records = [self._read_json(file) for file in files]
        for key in [*identity, *stored]:
            if stored.get(key) != identity.get(key):
                raise self.other_input(f"{key} {_abridged(stored.get(key))} then, {_abridged(identity.get(key))} now")

    def _record(self, n: int) -> Path:
        return self._records / f"{n + 1:05d}.json"

    def _read_json(self, path: Path) -> Any:
        """The content of a file that `_write_json` has written."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["sha256"] == text_digest(json.dumps(stored["content"])):
                return stored["content"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(path, "it cannot be read, or is of another version") from error
        raise self.damaged(path)

    def damaged(self, path: Path, how: str = "it is not what was written") -> InputError:
        """The error for a file of an unfinished run that cannot be used."""
        return InputError(
            f"{self._output}: the unfinished run there is damaged, {path.relative_to(self.folder)}: {how}; "
            "--restart discards it, or choose another --output"
        )

    def other_input(self, what: str) -> InputError:
        """The error for a run that is another one than the unfinished one; `what` says what differs."""
        return InputError(
            f"{self._output}: an unfinished run of other input is there ({len(self.records)} parts finished): {what}; "
            "give what it was given to go on with it, or --restart to discard it, or another --output"
        )

    @property
    def finished(self) -> int:
        """Number of the parts on disk that a later run may go on with; damaged ones count."""
        usable = self._identity.exists() and self.new.is_dir()
        return len(list(self._records.glob("*.json"))) if usable else 0

    def _clear(self) -> None:
        # Without it nothing goes on with what a kill leaves of the rest.
        self._identity.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()

    def add(self, record: dict[str, Any]) -> None:
        """Record that the next part is finished, with what a later run has to know of it."""
        _write_json(self._record(len(self.records)), record)
        self.records.append(record)

    def kept(self, name: str) -> Path:
        """Path of a file that is needed until the run is finished."""
        return self.folder / "kept" / f"{name}.safetensors"

    def remove_unknown(self, known: set[Path]) -> None:
        """Delete what a kill has left in `new` and `kept`, and what else lies there, but for the known files."""
        for path in (*self.new.iterdir(), *self.kept("").parent.glob("*")):
            if path not in known:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

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
    text = json.dumps(content)
    whole = f'{{"sha256": "{text_digest(text)}", "content": {text}}}'
    durably(path, lambda temporary: temporary.write_text(whole, encoding="utf-8"))


def _abridged(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
