"""Writing a checkpoint: shards go into a hidden folder beside the output, which is moved into place at the end."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparsefw.checkpoint import CONFIG, INDEX, companions, root_of
from sparsefw.errors import InputError, first_line


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output folder that would harm something.

    Args:
        output: where the pruned checkpoint is to go.
        source: folder of the checkpoint that is read.
        overwrite: an older checkpoint may be replaced.

    Raises:
        InputError: output and source are one folder or one lies in the other; output is a file, or a folder with
            something in it that may not be replaced.
    """
    target, root = output.resolve(), root_of(source)
    if target == root or target in root.parents or root in target.parents:
        raise InputError(f"{output}: is, holds or lies in the input folder {source}; choose another --output")
    _check_free(output, overwrite)


class Writer:
    """Writes a checkpoint shard by shard; use it in a `with` statement.

    Everything goes into a hidden folder beside `output`, which `finish` moves into place. Whatever ends the `with`
    block before that leaves nothing behind, and an older output as it was.

    Attributes:
        output: where the checkpoint will be (links resolved).
        folder: where it is until then; a file put here goes with it, and is not replaced by the source's.
    """

    def __init__(self, output: Path, overwrite: bool = False):
        self.output = output.resolve()
        self.overwrite = overwrite
        self.folder = self.output
        self._shard_of: dict[str, int] = {}
        self._shards = self._bytes = self._parameters = 0
        self._finished = False

    def __enter__(self) -> "Writer":
        _check_free(self.output, self.overwrite)
        parent = self.output.parent
        self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._scratch = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.partial-", dir=parent))
            self.folder = self._scratch / "new"
            # Not the scratch folder itself: that one is private, this one has the usual permissions.
            self.folder.mkdir()
        except OSError as error:
            self._remove_parents()
            raise InputError(
                f"{self.output}: cannot be written ({first_line(error)}); choose another --output"
            ) from error
        return self

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Write one shard; an empty one is left out.

        Args:
            tensors: by name, on any device; none of them may have been written before.

        Raises:
            ValueError: a name was written before, or two of the tensors are the same memory.
            InputError: the disk is full or failed.
        """
        if not tensors:
            return
        if repeated := sorted(self._shard_of.keys() & tensors.keys()):
            raise ValueError(f"{repeated[0]}: this tensor was already written")
        path = self.folder / _temporary(self._shards + 1)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except RuntimeError as error:
            raise ValueError(f"tensors that share memory cannot be written: {first_line(error)}") from error
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.output}: writing a shard failed: {first_line(error)}") from error
        # safetensors makes files that only the owner can read.
        path.chmod(self.folder.stat().st_mode & 0o666)
        self._shards += 1
        self._shard_of |= dict.fromkeys(tensors, self._shards)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._parameters += sum(tensor.numel() for tensor in tensors.values())

    def finish(self, source: Path) -> None:
        """Name the shards, write the index, copy the other files of the source and move all of it to `output`.

        Args:
            source: folder of the checkpoint that was read. Its config, tokenizer, chat template and other small
                files are copied; weights of any format, code and folders are not.

        Raises:
            ValueError: no shard was written.
            InputError: something else came to lie at `output` meanwhile.
        """
        if not self._shards:
            raise ValueError("no shard was written")
        final = {n: f"model-{n:05d}-of-{self._shards:05d}.safetensors" for n in range(1, self._shards + 1)}
        for n, name in final.items():
            (self.folder / _temporary(n)).rename(self.folder / name)
        index = {
            "metadata": {"total_parameters": self._parameters, "total_size": self._bytes},
            "weight_map": {name: final[n] for name, n in self._shard_of.items()},
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.folder / INDEX).write_text(text, encoding="utf-8")
        for path in companions(source):
            if not (self.folder / path.name).exists():
                # Content only: the source's files may be read-only or links.
                shutil.copyfile(path, self.folder / path.name)
        _check_free(self.output, self.overwrite)
        if self.output.exists():
            self.output.rename(self._scratch / "old")
        self.folder.rename(self.output)
        self._finished = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        old = self._scratch / "old"
        if old.exists() and not self.output.exists():
            old.rename(self.output)
        shutil.rmtree(self._scratch)
        self._remove_parents()
        if kind is None and not self._finished:
            raise RuntimeError("finish() was not called, so nothing was written")

    def _remove_parents(self) -> None:
        for folder in self._made:
            # One that is in use stays.
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_free(output: Path, overwrite: bool) -> None:
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
    if not (output / CONFIG).is_file():
        raise InputError(f"{output}: not a checkpoint (no {CONFIG}), so --overwrite will not remove it")


def _temporary(n: int) -> str:
    return f"model-{n:05d}.safetensors"
