"""Checkpoints on disk: what is in one, and whether it can be trusted.

Only safetensors is read: no pickle, no code that a checkpoint brings along. `inspect` reads headers and loads no
tensor; everything it says about files and tensors it has checked.
"""

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
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
    companions(folder)

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


def root_of(folder: Path) -> Path:
    """The folder that a checkpoint's links may point into: its own, or the model's in the Hub's cache."""
    folder = folder.resolve()
    model = folder.parent.parent
    return model if folder.parent.name == "snapshots" and (model / "blobs").is_dir() else folder


def check_file(path: Path) -> None:
    """Refuse a file that is missing or is a link out of its checkpoint."""
    if not path.is_file():
        raise InputError(f"{path}: missing, or not a file; download or copy the checkpoint again")
    if not path.resolve().is_relative_to(root_of(path.parent)):
        raise InputError(f"{path}: a link to {path.resolve()}, outside of the checkpoint; put the file itself there")


def _read_json(path: Path) -> dict:
    check_file(path)
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
    check_file(path)
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


def companions(folder: Path) -> list[Path]:
    """The small files that belong to a checkpoint beside its weights: config, tokenizer, chat template, license."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in NOT_COPIED or path.name.endswith(".index.json") or not path.is_file():
            continue
        check_file(path)
        if path.stat().st_size <= MAX_COPIED_BYTES:
            found.append(path)
    return found
