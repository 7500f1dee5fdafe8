"""Write a checkpoint shard by shard, so that an interrupted run goes on after the last finished shard."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparsefw.checkpoint.resume import PartialFolder, durably
from sparsefw.checkpoint.rewritten import rewritten
from sparsefw.checkpoint.source import CONFIG, INDEX, companions, root_of
from sparsefw.errors import InputError, first_line

# A model in memory may have no config; its report shows that a folder holds a pruned one.
REPORT = "report.json"


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output folder that would harm something.

    Args:
        output: folder for the pruned checkpoint.
        source: folder of the checkpoint that is read.
        overwrite: whether an older checkpoint may be replaced.

    Raises:
        InputError: output and source are one folder or one lies in the other; output is a file, or a folder with
            something in it that may not be replaced.
    """
    target, root = output.resolve(), root_of(source)
    if target == root or target in root.parents or root in target.parents:
        raise InputError(f"{output}: is, holds or lies in the input folder {source}; choose another --output")
    check_free(output, overwrite)


class Writer:
    """Writes a checkpoint shard by shard; use it in a `with` statement.

    Everything goes into a hidden folder beside `output` (see `resume`), whose content `finish` moves into place.
    Until then an older output stays as it was. Finished shards survive whatever ends the `with` block, and a writer of
    the same identity goes on after them. If no shard is finished, nothing is left behind.

    Args:
        output: folder for the checkpoint.
        shards: number of shards, one for each call of `write`.
        identity, chosen: what makes a run the same, and what it chose by itself, see `PartialFolder.open`.
        overwrite: whether an older checkpoint may be replaced.
        restart: whether to discard what an unfinished run left.

    Attributes:
        output: folder for the checkpoint, links resolved.
        folder: where the checkpoint is until `finish`. A file put here moves with it, in place of the source's.
        finished: the records that `write` was given with the finished shards.
    """

    def __init__(
        self,
        output: Path,
        shards: int,
        identity: dict[str, Any] | None = None,
        chosen: dict[str, Any] | None = None,
        *,
        overwrite: bool = False,
        restart: bool = False,
    ) -> None:
        self.output = output.resolve()
        self.shards, self.overwrite = shards, overwrite
        self._identity, self._chosen, self._restart = identity or {}, chosen, restart
        self._partial = PartialFolder(self.output)
        self.folder = self._partial.new
        # Folders above the output that this writer made.
        self._made: list[Path] = []
        self._done = False

    def __enter__(self) -> "Writer":
        parent = self.output.parent
        self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._partial.lock()
        except OSError as error:
            self._remove_parents()
            raise InputError(
                f"{self.output}: cannot be written ({first_line(error)}); choose another --output"
            ) from error
        except InputError:
            self._remove_parents()
            raise
        try:
            # A kill may have come while the older output was being replaced.
            self._partial.restore_output()
            check_free(self.output, self.overwrite)
            self._partial.open(self._identity, self._chosen, self._restart)
        except BaseException:
            self._leave()
            raise
        return self

    @property
    def finished(self) -> list[Any]:
        """See the class."""
        # The key is part of the format on disk.
        return [record["note"] for record in self._partial.records]

    @property
    def written(self) -> int:
        """Bytes of the tensors in the shards that are finished."""
        return sum(record["bytes"] for record in self._partial.records)

    @property
    def chosen(self) -> dict[str, Any]:
        """Values that the run which began this output chose by itself."""
        return self._partial.chosen

    def check_space(self, size: int) -> None:
        """Refuse to begin a run that the disk has too little space for.

        Args:
            size: bytes that are still to be written.

        Raises:
            InputError: the disk has less.
        """
        free = shutil.disk_usage(self._partial.folder).free
        if size > free:
            raise InputError(
                f"{self.output}: {size / 1e9:.2f} GB are still to be written, and the disk has {free / 1e9:.2f} GB "
                "free; make space or choose another --output"
            )

    def path(self, n: int) -> Path:
        """Path of the n-th shard, from 0, until `finish`."""
        return self.folder / self._name(n)

    def _name(self, n: int) -> str:
        return f"model-{n + 1:05d}-of-{self.shards:05d}.safetensors"

    def write(self, tensors: dict[str, Tensor], record: Any = None) -> None:
        """Write the next shard; once this returns it is on disk.

        Args:
            tensors: by name, on any device; none of them may have been written before.
            record: what a later run has to know of the shard, as JSON values.

        Raises:
            ValueError: a name was written before, or two of the tensors are the same memory.
            InputError: the disk is full or failed.
        """
        records = self._partial.records
        if repeated := sorted(tensors.keys() & {name for shard in records for name in shard["names"]}):
            raise ValueError(f"{repeated[0]}: this tensor was already written")
        self._save(self.path(len(records)), tensors)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        parameters = sum(tensor.numel() for tensor in tensors.values())
        with self._disk_errors():
            self._partial.add({"names": [*tensors], "bytes": size, "parameters": parameters, "note": record})

    def keep(self, name: str, tensors: dict[str, Tensor]) -> Path:
        """Write a file of tensors that is there until `finish`; returns its path, which depends on the name alone."""
        path = self.kept(name)
        path.parent.mkdir(exist_ok=True)
        self._save(path, tensors)
        return path

    def kept(self, name: str) -> Path:
        """Path of a file that `keep` writes."""
        return self._partial.kept(name)

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

        def save(temporary: Path) -> None:
            save_file(tensors, temporary, metadata={"format": "pt"})
            # safetensors makes files that only the owner can read.
            temporary.chmod(self.folder.stat().st_mode & 0o666)

        with self._disk_errors():
            try:
                durably(path, save)
            except RuntimeError as error:
                raise ValueError(f"tensors that share memory cannot be written: {first_line(error)}") from error

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turn a full or failed disk into an error of one line."""
        try:
            yield
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.output}: writing failed: {first_line(error)}") from error

    def finish(self, source: Path) -> None:
        """Write the index, copy the other files of the source and move all of it to `output`.

        Args:
            source: folder of the checkpoint that was read. Its config, tokenizer, chat template and other small
                files are copied, but for what `rewritten` changes; weights of any format, code and folders are not.

        Raises:
            ValueError: shards are missing.
            InputError: something else came to lie at `output` meanwhile, or the disk is full or failed.
        """
        records = self._complete()
        sums = {key: sum(record[key] for record in records) for key in ("parameters", "bytes")}
        index = {
            "metadata": {"total_parameters": sums["parameters"], "total_size": sums["bytes"]},
            "weight_map": {name: self._name(n) for n, record in enumerate(records) for name in record["names"]},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        with self._disk_errors():
            durably(self.folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"))
            for name, content in rewritten(source).items():
                durably(self.folder / name, partial(Path.write_text, data=content, encoding="utf-8"))
            for path in companions(source):
                if not (self.folder / path.name).exists():
                    # Content only: the source's files may be read-only or links.
                    durably(self.folder / path.name, partial(shutil.copyfile, path))
        self._move()

    def finish_as(self, save: Callable[[Path], None]) -> None:
        """Write the model otherwise in place of the shards, and move it with the other files to `output`.

        Args:
            save: writes it into a folder.

        Raises:
            ValueError, InputError: as `finish`.
        """
        for n in range(len(self._complete())):
            self.path(n).unlink()
        with self._disk_errors():
            save(self.folder)
            for path in self.folder.iterdir():
                # safetensors makes files that only the owner can read.
                path.chmod(self.folder.stat().st_mode & 0o666)
        self._move()

    def _complete(self) -> list[dict[str, Any]]:
        """The records of all shards."""
        records = self._partial.records
        if len(records) != self.shards:
            raise ValueError(f"{len(records)} shards of {self.shards} were written")
        return records

    def _move(self) -> None:
        check_free(self.output, self.overwrite)
        self._partial.move_into_place()
        self._done = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._partial.restore_output()
        finished = self._leave()
        if error and finished and not self._done:
            error.add_note(f"{finished} of {self.shards} parts are finished: the same command goes on from there")
        if kind is None and not self._done:
            raise RuntimeError("finish() was not called, so the output is not there")

    def _leave(self) -> int:
        """Keep the finished parts of an unfinished run, remove everything else; returns the number of parts."""
        finished = len(self._partial.records)
        if self._done or not finished:
            self._partial.remove()
            self._remove_parents()
        else:
            self._partial.release()
        return finished

    def _remove_parents(self) -> None:
        for folder in self._made:
            # A folder that is in use stays.
            with contextlib.suppress(OSError):
                folder.rmdir()


def check_free(output: Path, overwrite: bool) -> None:
    """Refuse an output that is a file, or a folder with something in it that may not be replaced.

    Raises:
        InputError: it is one.
    """
    if not os.path.lexists(output):
        return
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: a file; --output is a folder")
    if output.is_mount():
        raise InputError(f"{output}: a mount point, which cannot be replaced; give a folder inside it")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{output}: exists and is not empty; choose another --output or add --overwrite")
    if not any((output / name).is_file() for name in (CONFIG, REPORT)):
        raise InputError(f"{output}: not a checkpoint (no {CONFIG}), so --overwrite will not remove it")
