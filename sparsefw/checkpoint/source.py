"""Find a checkpoint, and check all that can be checked without loading a tensor.

Only safetensors is read: no pickle, and no code from the checkpoint. `inspect` reads the headers, and has checked
everything that it returns about files and tensors.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open

from sparsefw.checkpoint import foreign, tokenizer_trust, trust
from sparsefw.checkpoint.copied import COPIED, TEMPLATES, in_any_case, is_copied
from sparsefw.checkpoint.files import parse_object, read_bounded
from sparsefw.checkpoint.quantization import Quantization, joined, most_bytes, quantization_of
from sparsefw.checkpoint.tensors import TensorInfo
from sparsefw.errors import InputError, first_line, shown

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
DTYPES |= {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)}
# Others that models in memory may have, in schedules of diffusion, say. No layer of a language model has them.
OTHER_DTYPES = {"F64": torch.float64, "C64": torch.complex64}

# Real headers have 10 KB to 20 MB. safetensors itself takes up to 100 MB, and many times that in memory.
MAX_HEADER_BYTES = 32 * 2**20
# Real tensors have at most 100 characters in their names, 5 dimensions and 2^36 elements.
MAX_NAME = 512
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48

AGAIN = "download or copy it again"

# The largest tokenizers have about 40 MB; a larger file is no part of a checkpoint.
MAX_COPIED_BYTES = 256 * 2**20

# Files that transformers reads whole.
READ = {".json", ".jinja", ".model", ".txt", ".tiktoken"}

# Files that are downloaded from the Hub: weights, what transformers reads, and what is copied. Other folders and
# consolidated.safetensors hold the same weights in other formats. Patterns of the Hub's library tell capitals apart.
WANTED = ["*.safetensors", *sorted(f"*{suffix}" for suffix in READ), *map(in_any_case, COPIED)]
UNWANTED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint.

    Attributes:
        folder: the folder of its files.
        config: the content of config.json.
        tensors: every tensor, by its name in the files. A quantized one is called as if it were not.
        dtype: the floating dtype that most bytes have; that of a quantized model once it is dequantized.
        quantization: how some of the tensors are quantized; None if none is.
        left_out: names of tensors in the files that are not among `tensors`, and are no part of one: scales of the
            activations of a quantized model.
    """

    folder: Path
    config: dict
    tensors: dict[str, TensorInfo]
    dtype: torch.dtype
    quantization: Quantization | None = None
    left_out: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of all tensors, in the memory of a model."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored_nbytes(self) -> int:
        """Size of all tensors, as they are stored."""
        return sum(part.nbytes for name, tensor in self.tensors.items() for part in tensor.stored(name).values())


def locate(model: str) -> Path:
    """The folder of a checkpoint, downloaded if it has to be.

    Args:
        model: a local folder, or a Hub id such as "org/name". A name that starts with `.`, `/` or `~`, or that
            exists, is local and never looked up on the Hub.

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
        raise InputError(f"{model or repr(model)}: no such folder; give the folder of a checkpoint or a Hub id")
    with from_hub(model):
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=WANTED, ignore_patterns=UNWANTED))
        # No pattern tells this folder from others. The snapshot's name is that of its commit.
        huggingface_hub.snapshot_download(model, revision=folder.name, allow_patterns=[f"{TEMPLATES}/*.jinja"])
        return folder


@contextmanager
def from_hub(model: str) -> Iterator[None]:
    """Turn a failed download inside into an error of one line.

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
    # The Hub's library passes on the HTTPError of a proxy as it is.
    except (OSError, HTTPError) as error:
        raise InputError(
            f"{model}: no such folder, and it could not be downloaded from the Hub ({shown(first_line(error))}); "
            "give the path of a local checkpoint"
        ) from error


def inspect(folder: Path) -> Checkpoint:
    """Read and check the headers of a checkpoint: one model.safetensors, or shards with an index.

    If both are there, model.safetensors counts, as in transformers.

    Args:
        folder: a local folder, such as a snapshot in the Hub's cache.

    Raises:
        InputError: files are missing, damaged, disagree, or lie outside of the folder; only pickle is there; a
            tensor's dtype cannot be pruned; the model is quantized by a method that is not read, or its scales do not
            fit; a file says what no real one does (see `trust`).
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give the folder of a checkpoint")
    if not os.path.lexists(folder / CONFIG):
        raise foreign.without_config(folder)
    config = read_json(folder / CONFIG, trust.MAX_CONFIG_BYTES)
    trust.check_config(config, folder / CONFIG)
    quantization = quantization_of(config, folder / CONFIG)
    tensors = _read_headers(folder, DTYPES | (quantization.dtypes if quantization else {}))
    foreign.check_adapter(folder)
    dtype, left_out = None, list[str]()
    if quantization:
        tensors, dtype, left_out = joined(tensors, quantization, config, folder / CONFIG)
    trust.check_sizes(config, folder / CONFIG, [tensor.shape for tensor in tensors.values()])
    inspect_tokenizer(folder)
    dtype = dtype or most_bytes(tensors.values())
    if dtype is None:
        raise InputError(f"{folder}: no floating-point tensor in it; give the checkpoint of a language model")
    return Checkpoint(folder, config, tensors, dtype, quantization, tuple(left_out))


def inspect_tokenizer(folder: Path) -> None:
    """Check the files of a tokenizer; there need be no model beside them.

    Raises:
        InputError: see `companions`, `tokenizer_trust.check_tokenizer` and `check_followed`.
    """
    companions(folder)
    if os.path.lexists(folder / CONFIG):
        config = read_json(folder / CONFIG, trust.MAX_CONFIG_BYTES)
        trust.check_config(config, folder / CONFIG)
        tokenizer_trust.check_tokenizer(config, folder / CONFIG)
    if os.path.lexists(folder / TOKENIZER_CONFIG):
        content = read_json(folder / TOKENIZER_CONFIG, trust.MAX_TOKENIZER_CONFIG_BYTES)
        tokenizer_trust.check_tokenizer(content, folder / TOKENIZER_CONFIG)
        tokenizer_trust.check_followed(content, folder / TOKENIZER_CONFIG)


def root_of(folder: Path) -> Path:
    """The folder that a checkpoint is a part of: its own, or the model's in the Hub's cache."""
    folder = folder.resolve()
    return folder.parent.parent if _is_cached(folder) else folder


def _is_cached(folder: Path) -> bool:
    """Whether a folder without links in its path is a snapshot in the Hub's cache, where only the Hub's library writes.

    Another folder that looks like one may come with its links from anybody.
    """
    model = folder.parent.parent
    return (
        folder.parent.name == "snapshots"
        and model.name.startswith("models--")
        and model.parent == Path(constants.HF_HUB_CACHE).resolve()
    )


def _check_link(path: Path, folder: Path) -> None:
    folder, target = folder.resolve(), path.resolve()
    roots = [folder]
    if _is_cached(folder):
        # Models of the cache share large files.
        roots += [root_of(folder) / "blobs", root_of(folder).parent / "blobs"]
    if any(target.is_relative_to(root) for root in roots):
        return
    remedy = "put the file itself there"
    if folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs":
        cache = folder.parent.parent.parent
        remedy = f"set HF_HUB_CACHE={cache} if that is a cache of the Hub that you trust, or give the model's Hub id"
    raise InputError(f"{path}: a link to {shown(target, 4096)}, outside of the checkpoint; {remedy}")


def check_file(path: Path, folder: Path | None = None) -> None:
    """Refuse a path that is missing, a link out of its checkpoint, or no file: a pipe would block for ever.

    Args:
        path: the file.
        folder: the folder of the checkpoint; None: the folder of the file.

    Raises:
        InputError: it is one of these.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing, or not a file; {AGAIN}")
    _check_link(path, folder or path.parent)


def check_utf8(path: Path) -> None:
    """Refuse a path that is not UTF-8: the library of safetensors writes files there, and does not open them again.

    Raises:
        InputError: it is none.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path}: no path in UTF-8, and safetensors files are opened by no other; rename it or the folder around it"
        ) from error


def read_json(path: Path, limit: int) -> dict:
    """Read a file that holds a JSON object, of at most `limit` bytes.

    Raises:
        InputError: it is missing, too large, no JSON object, or lies outside of its folder.
    """
    check_file(path)
    return parse_object(read_bounded(path, limit), path)


def _read_headers(folder: Path, dtypes: dict[str, torch.dtype]) -> dict[str, TensorInfo]:
    """All tensors in the files of a folder.

    Args:
        folder: the checkpoint's folder.
        dtypes: the dtypes that a tensor may have, by their names in the files.
    """
    if os.path.lexists(folder / SINGLE):
        return _read_header(folder / SINGLE, dtypes)
    if os.path.lexists(folder / INDEX):
        return _read_shards(folder, dtypes)
    raise foreign.without_safetensors(folder)


def tensors_in(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of all safetensors files in a folder, whatever the files' names, without a config or an index.

    Raises:
        InputError: there is no such file, one is damaged, or two of them have a tensor of the same name.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in _read_header(path, DTYPES | OTHER_DTYPES).items():
            if name in tensors:
                raise InputError(f"{path}: tensor {name} is in {tensors[name].file.name} too; keep one")
            tensors[name] = tensor
    if not tensors:
        raise InputError(f"{folder}: no tensors in safetensors files; give a folder that sparsefw.run wrote")
    return tensors


def _read_header(path: Path, dtypes: dict[str, torch.dtype]) -> dict[str, TensorInfo]:
    check_file(path)
    check_utf8(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path}: not a whole safetensors file (its header says {length} bytes); {AGAIN}")
            content = file.read(length)
        # The library compares offsets, shapes, dtypes and the size of the file, but accepts a name that occurs twice.
        with safe_open(path, framework="pt"):
            header = parse_object(content, path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({shown(first_line(error))}); {AGAIN}") from error
    header.pop("__metadata__", None)
    return {name: _tensor(path, name, entry, dtypes) for name, entry in header.items()}


def _tensor(path: Path, name: str, entry: object, dtypes: dict[str, torch.dtype]) -> TensorInfo:
    """The tensor that an entry of a header describes; the library has accepted the entry."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise InputError(f"{path}: a tensor is called {shown(name)}, which no tensor of a model is; {AGAIN}")
    if not isinstance(entry, dict):
        raise InputError(f"{path}: tensor {name} is described by a list, not by names; {AGAIN}")
    if entry["dtype"] not in dtypes:
        raise InputError(f"{path}: tensor {name} has dtype {entry['dtype']}; give a checkpoint in fp32, fp16 or bf16")
    tensor = TensorInfo(path, dtypes[entry["dtype"]], tuple(entry["shape"]))
    # An empty tensor may have other dimensions of any size and still fit into the file.
    if len(tensor.shape) > MAX_DIMENSIONS or math.prod(max(1, d) for d in tensor.shape) > MAX_ELEMENTS:
        raise InputError(f"{path}: tensor {name} has the shape {shown(tensor.shape)}, which no tensor has; {AGAIN}")
    return tensor


def _read_shards(folder: Path, dtypes: dict[str, torch.dtype]) -> dict[str, TensorInfo]:
    index = folder / INDEX
    shard_of = read_json(index, trust.MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise InputError(f"{index}: no weight_map in it; {AGAIN}")
    for name, shard in shard_of.items():
        if not (isinstance(shard, str) and shard.endswith(".safetensors") and trust.is_plain(shard)):
            raise InputError(
                f"{index}: tensor {shown(name)} is in {shown(repr(shard))}, "
                "which is not the name of a .safetensors file beside it"
            )
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(shard_of.values())):
        for name, tensor in _read_header(folder / shard, dtypes).items():
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


def companions(folder: Path) -> list[Path]:
    """The small files of a checkpoint that are copied to the output: config, tokenizer, chat templates, license.

    Raises:
        InputError: one of these, or another file that transformers may read, is a link out of the checkpoint, a pipe or
            a device, larger than any that transformers reads, or has a name that cannot be printed.
    """
    templates = [*(folder / TEMPLATES).iterdir()] if (folder / TEMPLATES).is_dir() else []
    copied = []
    for path in sorted([*folder.iterdir(), *templates]):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or not path.exists() or not (is_copied(name) or path.suffix.lower() in READ):
            continue
        if not path.name.isprintable():
            raise InputError(f"{path.parent}: a file is called {shown(path.name)}; remove it")
        check_file(path, folder)
        if path.stat().st_size > MAX_COPIED_BYTES:
            raise InputError(f"{path}: {path.stat().st_size // 2**20} MiB, more than any tokenizer has; remove it")
        if is_copied(name):
            copied.append(path)
    return copied
