"""Checkpoints on disk: what is in one, and whether it can be trusted.

Only safetensors is read: no pickle, no code that a checkpoint brings along. `inspect` reads headers and loads no
tensor; everything it says about files and tensors it has checked.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsefw.checkpoint import trust
from sparsefw.checkpoint.trust import shown
from sparsefw.errors import InputError, first_line

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
# transformers reads what is in here beside the tokenizer.
TEMPLATES = "additional_chat_templates"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
DTYPES |= {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)}

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}

# safetensors itself reads up to 100 MB, in many times the memory; real ones have 10 KB to 20 MB.
MAX_HEADER_BYTES = 32 * 2**20
# Real tensors have names of 100 characters, 5 dimensions and 2^36 elements at most.
MAX_NAME = 512
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48

AGAIN = "download or copy it again"

# Neither weights in any format nor code goes from the input to the output.
NOT_COPIED = PICKLES | {".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".py"}
# The largest tokenizers have about 40 MB; what is larger than this is no part of a checkpoint.
MAX_COPIED_BYTES = 256 * 2**20

# Of these, transformers reads whole files.
READ = {".json", ".jinja", ".model", ".txt", ".tiktoken"}

# What is asked of the Hub. Folders hold other formats of the same weights, and so does consolidated.safetensors.
WANTED = ["*.safetensors", *sorted(f"*{suffix}" for suffix in READ)]
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
    # Path.expanduser fails where there is no such user.
    path = Path(os.path.expanduser(model))
    if model and path.is_dir():
        return path
    if model and path.exists():
        raise InputError(f"{model}: a file; give the folder of a checkpoint or a Hub id")
    if not model or model.startswith((".", "/", "~")):
        raise InputError(f"{model or '--model'}: no such folder; give the folder of a checkpoint or a Hub id")
    with from_hub(model):
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=WANTED, ignore_patterns=UNWANTED))


@contextmanager
def from_hub(model: str) -> Iterator[None]:
    """Say in one line why what is downloaded inside could not be.

    Raises:
        InputError: no such id, no access to it, or no network and no cached copy.
    """
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{model}: neither a local path nor a valid Hub id (ORG/NAME)") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{model}: no such folder and no such model on the Hub, or you have no access to it; "
            "check the name, and log in with `hf auth login` if it is gated"
        ) from error
    # HTTPError: a proxy that fails is passed on by the Hub's library as it is.
    except (OSError, HTTPError) as error:
        raise InputError(
            f"{model}: no such folder, and it could not be downloaded from the Hub ({shown(first_line(error))}); "
            "give the path of a local checkpoint"
        ) from error


def inspect(folder: Path) -> Checkpoint:
    """Read and check the headers of a checkpoint: one model.safetensors, or shards with an index.

    As in transformers, model.safetensors is the one that counts where there are both.

    Args:
        folder: a local folder, such as a snapshot in the Hub's cache.

    Raises:
        InputError: files are missing, damaged, disagree, or lie outside of the folder; only pickle is there; a
            tensor's dtype cannot be pruned; the model is quantized; a file says what no real one does (see `trust`).
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give the folder of a checkpoint")
    if not os.path.lexists(folder / CONFIG):
        raise InputError(f"{folder}: no {CONFIG}; give the folder of a Hugging Face checkpoint")
    config = _read_json(folder / CONFIG, trust.MAX_CONFIG_BYTES)
    trust.check_config(config, folder / CONFIG)
    if os.path.lexists(folder / SINGLE):
        tensors = _read_header(folder / SINGLE)
    elif os.path.lexists(folder / INDEX):
        tensors = _read_shards(folder)
    else:
        raise _without_safetensors(folder)
    trust.check_sizes(config, folder / CONFIG, [tensor.shape for tensor in tensors.values()])
    companions(folder)
    trust.check_tokenizer(config, folder / CONFIG)
    if os.path.lexists(folder / TOKENIZER_CONFIG):
        content = _read_json(folder / TOKENIZER_CONFIG, trust.MAX_TOKENIZER_CONFIG_BYTES)
        trust.check_tokenizer(content, folder / TOKENIZER_CONFIG)

    held = Counter()
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point:
            held[tensor.dtype] += tensor.nbytes
    if not held:
        raise InputError(f"{folder}: no floating-point tensor in it; give the checkpoint of a language model")
    return Checkpoint(folder, config, tensors, held.most_common(1)[0][0])


def all_finite(tensor: Tensor) -> Tensor:
    """Whether a floating tensor that is not empty has neither NaN nor Inf: a bool on its device, not waited for."""
    # Both ends are finite exactly if all is: NaN spreads to them. One pass, and no copy of a large tensor.
    low, high = torch.aminmax(tensor)
    return low.isfinite() & high.isfinite()


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
    if bool(all_finite(tensor)):
        return
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise InputError(f"{name}: holds {nan} NaN and {inf} Inf among {tensor.numel()} values; finite ones are needed")


def root_of(folder: Path) -> Path:
    """The folder that a checkpoint's links may point into: its own, or the model's in the Hub's cache."""
    folder = folder.resolve()
    model = folder.parent.parent
    return model if folder.parent.name == "snapshots" and (model / "blobs").is_dir() else folder


def check_file(path: Path, folder: Path | None = None) -> None:
    """Refuse a file that is missing, is a link out of its checkpoint, or is none: a pipe would block for ever.

    Args:
        path: of the file.
        folder: of the checkpoint; None: the one that the file lies in.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing, or not a file; {AGAIN}")
    if not path.resolve().is_relative_to(root_of(folder or path.parent)):
        target = shown(path.resolve(), 4096)
        raise InputError(f"{path}: a link to {target}, outside of the checkpoint; put the file itself there")


def _read_json(path: Path, limit: int) -> dict:
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {shown(first_line(error))}") from error
    if len(content) > limit:
        raise InputError(f"{path}: more than {limit // 2**20} MiB, which no real one has; {AGAIN}")
    return trust.parse_object(content, path)


def _read_header(path: Path) -> dict[str, TensorInfo]:
    check_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path}: not a whole safetensors file (its header says {length} bytes); {AGAIN}")
            content = file.read(length)
        # The library compares offsets, shapes, dtypes and the size of the file; it lets a name stand twice.
        with safe_open(path, framework="pt"):
            header = trust.parse_object(content, path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({shown(first_line(error))}); {AGAIN}") from error
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: object) -> TensorInfo:
    """What one entry of a header says; the library has accepted it."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise InputError(f"{path}: a tensor is called {shown(name)}, which no tensor of a model is; {AGAIN}")
    if not isinstance(entry, dict):
        raise InputError(f"{path}: tensor {name} is described by a list, not by names; {AGAIN}")
    if entry["dtype"] not in DTYPES:
        raise InputError(f"{path}: tensor {name} has dtype {entry['dtype']}; give a checkpoint in fp32, fp16 or bf16")
    tensor = TensorInfo(path, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    # Of an empty one any other dimension fits into the file.
    if len(tensor.shape) > MAX_DIMENSIONS or math.prod(max(1, d) for d in tensor.shape) > MAX_ELEMENTS:
        raise InputError(f"{path}: tensor {name} has the shape {shown(tensor.shape)}, which no tensor has; {AGAIN}")
    return tensor


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index = folder / INDEX
    shard_of = _read_json(index, trust.MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{index}: no weight_map in it; {AGAIN}")
    for name, shard in shard_of.items():
        if not (isinstance(shard, str) and shard.endswith(".safetensors") and trust.is_plain(shard)):
            raise InputError(
                f"{index}: tensor {shown(name)} is in {shown(repr(shard))}, "
                "which is not the name of a .safetensors file beside it"
            )
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
            raise InputError(f"{folder / shard}: tensor {shown(name)}, which {INDEX} says is here, is missing")
    return tensors


def _without_safetensors(folder: Path) -> InputError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return InputError(
            f"{folder}: only pickle files ({shown(pickles[0])}), which are never read because they can run code; "
            "if you trust them, convert them with transformers: from_pretrained(...), then save_pretrained(NEW_FOLDER)"
        )
    return InputError(f"{folder}: neither {SINGLE} nor {INDEX}; give a checkpoint in safetensors format")


def companions(folder: Path) -> list[Path]:
    """The small files that belong to a checkpoint beside its weights: config, tokenizer, chat template, license.

    Raises:
        InputError: one is a link out of the checkpoint, a pipe or a device, larger than any that transformers reads,
            or has a name that cannot be printed.
    """
    files = _files(folder, folder)
    templates = _files(folder / TEMPLATES, folder) if (folder / TEMPLATES).is_dir() else []
    for path in (*files, *templates):
        if path.suffix.lower() in READ and path.stat().st_size > MAX_COPIED_BYTES:
            raise InputError(f"{path}: {path.stat().st_size // 2**20} MiB, more than any tokenizer has; remove it")
    return [p for p in files if not p.name.endswith(".index.json") and p.stat().st_size <= MAX_COPIED_BYTES]


def _files(folder: Path, checkpoint: Path) -> list[Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in NOT_COPIED or path.is_dir() or not path.exists():
            continue
        if not path.name.isprintable():
            raise InputError(f"{folder}: a file is called {shown(path.name)}; remove it")
        check_file(path, checkpoint)
        found.append(path)
    return found
