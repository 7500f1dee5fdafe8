"""Checkpoints on disk: what is in one, whether it can be trusted, and how a new one is written.

Only safetensors is read: no pickle, no code that a checkpoint brings along. `inspect` reads headers and loads no
tensor; everything it says about files and tensors it has checked. `Writer` puts shards into a hidden folder beside
the output and moves it into place when all of it is there.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsefw.errors import InputError, first_line

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
DTYPES |= {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)}

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
# Neither weights in any format nor code goes from the input to the output.
NOT_COPIED = PICKLES | {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".py"}
# The largest tokenizers have about 40 MB; what is larger than this is no part of a checkpoint.
MAX_COPIED_BYTES = 256 * 2**20

# What is asked of the Hub. Folders hold other formats of the same weights, and so does consolidated.safetensors.
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
UNWANTED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies (path of its file), its torch dtype and its shape."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        folder: where it lies.
        config: the content of config.json.
        tensors: every tensor, by its name in the files.
        dtype: the floating dtype that most bytes have.
    """

    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def locate(model: str) -> Path:
    """The folder of a checkpoint, downloaded if it has to be.

    Args:
        model: a local folder, or a Hub id such as "org/name". What starts with `.`, `/` or `~`, or exists, is local
            and never looked up on the Hub.

    Raises:
        InputError: there is no such folder, no such id, or no network and no cached copy.
    """
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    if model and path.is_dir():
        return path
    if model and path.exists():
        raise InputError(f"{model}: a file; give the folder of a checkpoint or a Hub id")
    if not model or model.startswith((".", "/", "~")):
        raise InputError(f"{model or '--model'}: no such folder; give the folder of a checkpoint or a Hub id")
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except HFValidationError as error:
        raise InputError(f"{model}: neither a folder nor a valid Hub id (ORG/NAME)") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{model}: no such folder and no such model on the Hub, or you have no access to it; "
            "check the name, and log in with `hf auth login` if it is gated"
        ) from error
    # HTTPError: a proxy that fails is passed on by the Hub's library as it is.
    except (OSError, HTTPError) as error:
        raise InputError(
            f"{model}: no such folder, and it could not be downloaded from the Hub ({first_line(error)}); "
            "give the path of a local checkpoint"
        ) from error


def inspect(folder: Path) -> Checkpoint:
    """Read and check the headers of a checkpoint: one model.safetensors, or shards with an index.

    As in transformers, model.safetensors is the one that counts where there are both.

    Args:
        folder: a local folder, such as a snapshot in the Hub's cache.

    Raises:
        InputError: files are missing, damaged, disagree, or lie outside of the folder; only pickle is there; a
            tensor's dtype cannot be pruned; the model is quantized.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give the folder of a checkpoint")
    if not os.path.lexists(folder / CONFIG):
        raise InputError(f"{folder}: no {CONFIG}; give the folder of a Hugging Face checkpoint")
    config = _read_json(folder / CONFIG)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get("quantization_config"):
            raise InputError(
                f"{folder / CONFIG}: the model is quantized (quantization_config); give the unquantized checkpoint"
            )
    if os.path.lexists(folder / SINGLE):
        tensors = _read_header(folder / SINGLE)
    elif os.path.lexists(folder / INDEX):
        tensors = _read_shards(folder)
    else:
        raise _without_safetensors(folder)
    _companions(folder)

    held = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            held[tensor.dtype] += tensor.nbytes
    if not held:
        raise InputError(f"{folder}: no floating-point tensor in it; give the checkpoint of a language model")
    return Checkpoint(folder, config, tensors, held.most_common(1)[0][0])


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with NaN or Inf.

    Args:
        name: of the tensor, for the message.
        tensor: any shape, dtype and device.

    Raises:
        InputError: it holds NaN or Inf; says how many.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # Both ends are finite exactly if all is: NaN spreads to them. One pass, and no copy of a large tensor.
    low, high = torch.aminmax(tensor)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise InputError(f"{name}: holds {nan} NaN and {inf} Inf among {tensor.numel()} values; finite ones are needed")


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
    target, root = output.resolve(), _root(source)
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
        for path in _companions(source):
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


def _root(folder: Path) -> Path:
    """The folder that a checkpoint's links may point into: its own, or the model's in the Hub's cache."""
    folder = folder.resolve()
    model = folder.parent.parent
    return model if folder.parent.name == "snapshots" and (model / "blobs").is_dir() else folder


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing, or not a file; download or copy the checkpoint again")
    if not path.resolve().is_relative_to(_root(path.parent)):
        raise InputError(f"{path}: a link to {path.resolve()}, outside of the checkpoint; put the file itself there")


def _read_json(path: Path) -> dict:
    _check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)}); download or copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; download or copy it again")
    return content


def _read_header(path: Path) -> dict[str, TensorInfo]:
    _check_file(path)
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                view = file.get_slice(name)
                tensors[name] = (view.get_dtype(), tuple(view.get_shape()))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({first_line(error)}); download or copy it again"
        ) from error
    for name, (dtype, _) in tensors.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: tensor {name} has dtype {dtype}; give a checkpoint in fp32, fp16 or bf16")
    return {name: TensorInfo(path, DTYPES[dtype], shape) for name, (dtype, shape) in tensors.items()}


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{index}: no weight_map in it; download or copy it again")
    for name, shard in shard_of.items():
        if not _is_shard_name(shard):
            raise InputError(f"{index}: tensor {name} is in {shard!r}, which is not the name of a .safetensors file")
    tensors = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in _read_header(folder / shard).items():
            if name in tensors:
                raise InputError(f"{folder / shard}: tensor {name} is in {tensors[name].file.name} too; keep one")
            if name not in shard_of:
                raise InputError(
                    f"{folder / shard}: tensor {name} is missing from the index {INDEX}; rebuild the index"
                )
            tensors[name] = tensor
    for name, shard in shard_of.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise InputError(f"{folder / shard}: tensor {name}, which {INDEX} says is here, is missing")
    return tensors


def _is_shard_name(shard: object) -> bool:
    # Separators of either system, drive letters and control characters: anything that could lead elsewhere.
    return (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and shard.isprintable()
        and not set(shard) & set('/\\:*?"<>|')
    )


def _without_safetensors(folder: Path) -> InputError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return InputError(
            f"{folder}: only pickle files ({pickles[0]}), which are never read because they can run code; if you trust "
            "them, convert them with transformers: from_pretrained(...), then save_pretrained(NEW_FOLDER)"
        )
    return InputError(f"{folder}: neither {SINGLE} nor {INDEX}; give a checkpoint in safetensors format")


def _companions(folder: Path) -> list[Path]:
    """The small files that belong to a checkpoint beside its weights: config, tokenizer, chat template, license."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in NOT_COPIED or path.name.endswith(".index.json") or not path.is_file():
            continue
        _check_file(path)
        if path.stat().st_size <= MAX_COPIED_BYTES:
            found.append(path)
    return found


def _temporary(n: int) -> str:
    return f"model-{n:05d}.safetensors"
