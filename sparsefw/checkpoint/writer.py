"""Write a checkpoint shard by shard, so that an interrupted run goes on after the last finished shard."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparsefw.checkpoint.checksums import SUMS, file_digest, sums_text
from sparsefw.checkpoint.evidence import Evidence
from sparsefw.checkpoint.progress import SILENT, Progress
from sparsefw.checkpoint.replaced import check_free
from sparsefw.checkpoint.resume import SAVED, Part, PartialFolder, durably
from sparsefw.checkpoint.rewritten import rewritten
from sparsefw.checkpoint.source import INDEX, check_utf8, companions
from sparsefw.errors import InputError, first_line
from sparsefw.ranks import ALONE, Ranks


class Writer:
    """Writes a checkpoint shard by shard; use it in a `with` statement.

    Everything goes into a hidden folder beside `output` (see `resume`), whose content `finish` moves into place.
    Until then an older output stays as it was. Finished shards survive whatever ends the `with` block, and a writer of
    the same identity goes on after them, if they and what they were made of are still the same. If no shard is
    finished, nothing is left behind.

    Args:
        output: folder for the checkpoint.
        shards: number of shards, one for each call of `write`.
        identity, chosen: what makes a run the same, and what it chose by itself, see `PartialFolder.open`.
        evidence: reads the source; None: what is read is not compared.
        overwrite: whether an older checkpoint may be replaced.
        restart: whether to discard what an unfinished run left.
        progress: tells the user of a long wait, and of parts that are of no use any more.
        ranks: the processes that write, each its share of the shards. Rank 0 opens the folder and finishes it.

    Attributes:
        output: folder for the checkpoint, links resolved.
        folder: where the checkpoint is until `finish`. A file put here moves with it, in place of the source's.
        finished: the notes that `write` was given with the finished shards; those of other ranks as of the beginning.
    """

    def __init__(
        self,
        output: Path,
        shards: int,
        identity: dict[str, Any] | None = None,
        chosen: dict[str, int] | None = None,
        *,
        evidence: Evidence | None = None,
        overwrite: bool = False,
        restart: bool = False,
        progress: Progress = SILENT,
        ranks: Ranks = ALONE,
    ) -> None:
        self.output = output.resolve()
        self.shards, self.overwrite = shards, overwrite
        self._identity, self._chosen, self._restart = identity or {}, chosen, restart
        self._evidence, self._progress, self._ranks = evidence, progress, ranks
        self._partial = PartialFolder(self.output)
        self.folder = self._partial.new
        # Digests of the files that were kept since the last shard, by name.
        self._kept: dict[str, str] = {}
        # Folders above the output that this writer made.
        self._made: list[Path] = []
        self._done = False

    def __enter__(self) -> "Writer":
        if self._ranks.first:
            self._lock()
        try:
            if self._ranks.first:
                self._open()
            parts, self._partial.chosen = self._ranks.broadcast_object((self._partial.parts, self._partial.chosen))
            if not self._ranks.first:
                self._partial.join(parts)
            self._check_read()
        except BaseException:
            self._leave()
            raise
        return self

    def _lock(self) -> None:
        """Make the folder, and keep other processes away from it."""
        check_utf8(self.output)
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

    def _open(self) -> None:
        """Open the folder, and check what is finished there."""
        # A kill may have come while the older output was being replaced.
        self._partial.restore_output()
        check_free(self.output, self.overwrite)
        self._partial.check_apart()
        self._partial.open(self._identity, self._chosen, self._restart, self._progress.say, self._ranks.count)
        self._check_finished()
        if not self._ranks.alone:
            self._partial.share()

    def _check_finished(self) -> None:
        """Refuse finished parts that are damaged; delete what is none."""
        parts, digests = self._partial.parts, dict[Path, str]()
        for n, part in parts.items():
            digests |= {self.path(n): part.sha256} | {self.kept(name): digest for name, digest in part.kept.items()}
        for path in digests:
            if path.is_symlink() or not path.is_file():
                raise self._partial.damaged(path, "it is missing, or no file")
        sizes = {path: path.stat().st_size for path in digests}
        with self._progress.hashing("finished parts", sum(sizes.values())) as done:
            for path, digest in digests.items():
                if file_digest(path) != digest:
                    raise self._partial.damaged(path)
                done(sizes[path])
        self._partial.remove_unknown(set(digests))

    def _check_read(self) -> None:
        """Refuse a source of which another one was read for the finished parts. Each rank may have one of its own."""
        if self._evidence:
            read = [file for part in self._partial.parts.values() for file in part.read]
            if (name := self._evidence.find_difference(read, self._progress)) is not None:
                raise self._partial.other_input(f"the model has another tensor {name} now")

    @property
    def finished(self) -> list[Any]:
        """See the class."""
        return [self._partial.parts[n].note for n in sorted(self._partial.parts)]

    @property
    def written(self) -> int:
        """Bytes of the tensors in the shards that are finished."""
        return sum(part.bytes for part in self._partial.parts.values())

    @property
    def chosen(self) -> dict[str, int]:
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

    def writes(self, n: int) -> bool:
        """Whether it is for this rank to write the n-th shard."""
        return n % self._ranks.count == self._ranks.number

    def write(self, tensors: dict[str, Tensor], note: Any = None, n: int | None = None) -> None:
        """Write a shard; once this returns it is on disk.

        Args:
            tensors: by name, on any device; none of them may have been written before.
            note: what a later run has to know of the shard, as JSON values.
            n: its number, from 0; None: that of the next one.

        Raises:
            ValueError: a name was written before, or two of the tensors are the same memory.
            InputError: the disk is full or failed.
        """
        parts = self._partial.parts
        if repeated := sorted(tensors.keys() & {name for part in parts.values() for name in part.names}):
            raise ValueError(f"{repeated[0]}: this tensor was already written")
        n = len(parts) if n is None else n
        digest = self._save(self.path(n), tensors)
        kept, self._kept = self._kept, {}
        part = Part(
            names=[*tensors],
            bytes=sum(tensor.nbytes for tensor in tensors.values()),
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            sha256=digest,
            kept=kept,
            read=self._evidence.take() if self._evidence else [],
            note=note,
        )
        with self._disk_errors():
            self._partial.add(n, part)

    def keep(self, name: str, tensors: dict[str, Tensor]) -> Path:
        """Write a file of tensors that is there until `finish`; returns its path, which depends on the name alone."""
        path = self.kept(name)
        path.parent.mkdir(exist_ok=True)
        self._kept[name] = self._save(path, tensors)
        return path

    def kept(self, name: str) -> Path:
        """Path of a file that `keep` writes."""
        return self._partial.kept(name)

    def _save(self, path: Path, tensors: dict[str, Tensor]) -> str:
        """Write a file of tensors; returns its digest."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

        def save(temporary: Path) -> None:
            save_file(tensors, temporary, metadata={"format": "pt"})
            # safetensors makes files that only the owner can read.
            temporary.chmod(self.folder.stat().st_mode & 0o666)

        with self._disk_errors():
            try:
                durably(path, save)
                # It is still in the system's memory.
                return file_digest(path)
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
        """Write the index and SHA256SUMS, copy the other files of the source and move all of it to `output`.

        Args:
            source: folder of the checkpoint that was read. Its config, tokenizer, chat template and what else
                `companions` finds are copied, but for what `rewritten` changes.

        Raises:
            ValueError: shards are missing.
            InputError: something else came to lie at `output` meanwhile, or the disk is full or failed.
        """
        parts = self._complete()
        if not self._ranks.first:
            self._await_end()
            return
        with self._disk_errors():
            _write_text(self.folder / INDEX, _index(parts, self._name))
            for name, content in rewritten(source).items():
                _write_text(self.folder / name, content)
            for path in companions(source):
                target = self.folder / path.relative_to(source)
                if not target.exists():
                    target.parent.mkdir(exist_ok=True)
                    # Content only: the source's files may be read-only or links.
                    durably(target, partial(shutil.copyfile, path))
        # Those of the shards were made when they were written.
        self._move(self.folder, {self._name(n): part.sha256 for n, part in enumerate(parts)})

    def finish_as(self, save: Callable[[Path], None]) -> None:
        """Write the model otherwise in place of the shards, and move it with the other files to `output`.

        Args:
            save: writes it into a folder.

        Raises:
            ValueError, InputError: as `finish`.
        """
        parts = self._complete()
        if not self._ranks.first:
            self._await_end()
            return
        with self._disk_errors():
            scratch = TemporaryDirectory(prefix=SAVED, dir=self._partial.folder)
        with scratch:
            # Unlike the folder around it, one with the usual permissions.
            folder = Path(scratch.name) / self.folder.name
            with self._disk_errors():
                folder.mkdir()
                save(folder)
                self._complement(folder, {self.path(n) for n in range(len(parts))})
            # The shards stay until the output is in its place: whatever comes before, a later run goes on.
            self._move(folder, {})

    def _complement(self, folder: Path, shards: set[Path]) -> None:
        """Move what lies beside the shards to a model that was saved, and make all of it readable as usual."""
        for path in self.folder.iterdir():
            # The model may have files of the same names.
            if path not in shards and not (folder / path.name).exists():
                path.rename(folder / path.name)
        for path in folder.rglob("*"):
            if path.is_file():
                # safetensors makes files that only the owner can read.
                path.chmod(folder.stat().st_mode & 0o666)

    def _complete(self) -> list[Part]:
        """All parts, in their order, when all ranks have written theirs."""
        parts = {n: part for known in self._ranks.gather(self._partial.parts) for n, part in known.items()}
        if len(parts) != self.shards:
            raise ValueError(f"{len(parts)} shards of {self.shards} were written")
        return [parts[n] for n in range(self.shards)]

    def _await_end(self) -> None:
        """Wait until rank 0 has moved all into place, and leave the folder to it."""
        self._ranks.barrier()
        self._partial.release()
        self._done = True
        self._ranks.barrier()

    def _move(self, folder: Path, digests: dict[str, str]) -> None:
        """Write SHA256SUMS and make a folder the output; `digests` are those that are known, by name."""
        with self._disk_errors():
            for path in folder.rglob("*"):
                name = path.relative_to(folder).as_posix()
                if path.is_file() and name not in digests:
                    digests[name] = file_digest(path)
            _write_text(folder / SUMS, sums_text(digests))
        check_free(self.output, self.overwrite)
        self._partial.move_into_place(folder)
        self._done = True
        # The other ranks leave the folder, so that it can be removed.
        self._ranks.barrier()
        self._ranks.barrier()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ranks.first:
            self._partial.restore_output()
        finished = self._leave()
        if error and finished and not self._done:
            error.add_note(f"{finished} of {self.shards} shards are finished: the same command goes on from there")
        if error and self._done:
            error.add_note(f"{self.output} is complete")
        if kind is None and not self._done:
            raise RuntimeError("finish() was not called, so the output is not there")

    def _leave(self) -> int:
        """Keep the finished parts of an unfinished run, remove everything else; returns the number of parts."""
        if self._done and not self._ranks.first:
            return 0
        # The shards may still be there, if a model was written in place of them.
        finished = 0 if self._done else self._partial.finished
        if finished or not self._ranks.first:
            self._partial.release()
        else:
            self._partial.remove()
            self._remove_parents()
        return finished

    def _remove_parents(self) -> None:
        for folder in self._made:
            # A folder that is in use stays.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _write_text(path: Path, content: str) -> None:
    durably(path, partial(Path.write_text, data=content, encoding="utf-8"))


def _index(parts: list[Part], name_of: Callable[[int], str]) -> str:
    """The content of the index of the shards; `name_of` gives their names."""
    index = {
        "metadata": {
            "total_parameters": sum(part.parameters for part in parts),
            "total_size": sum(part.bytes for part in parts),
        },
        "weight_map": {name: name_of(n) for n, part in enumerate(parts) for name in part.names},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"
