"""Find a checkpoint, and check it without loading a tensor.

Only safetensors is read: no pickle, and no code of a checkpoint. No file outside of the checkpoint's folder and the
Hub's cache is opened. `inspect` reads the headers, and everything that it returns about files and tensors has been
checked.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open

from sparsefw.checkpoint.files import CONFIG, MAX_JSON_BYTES, parse_object, read_bounded, roots_of
from sparsefw.checkpoint.quantization import FP8_DTYPES, Quantization, joined, most_bytes, quantization_of
from sparsefw.checkpoint.tensors import Infos, TensorInfo, in_files, stamp_of
from sparsefw.errors import InputError, errors_in_one_line, first_line, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# transformers passes the entries of both to the tokenizer's class.
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_CONFIGS = (TOKENIZER_CONFIG, "special_tokens_map.json")
ADAPTER = "adapter_config.json"

FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
FILE_DTYPES |= {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
FILE_DTYPES |= {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)}
AGAIN = "download or copy it again"

# Keys whose values count layers. No model has more than MOST_LAYERS; to build one takes milliseconds.
LAYERS, MOST_LAYERS = re.compile(r"((?<!per_)layers?|blocks|depths?)$"), 2000

# timm downloads and opens the files that a name with such a beginning leads to.
TIMM = ("local-dir:", "hf-hub:", "hf_hub:")

# transformers reads the files of this folder along with the tokenizer.
TEMPLATES = "additional_chat_templates"

# Patterns of the names, in lower case, of the files that make a model's inputs: of tokens; of images, sound and video.
TOKENIZERS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "*_vocab.json", "vocab.txt",
    "tokenizer.model*", "sentencepiece*.model", "spiece.model", "spm*.model", "*.spm", "*.tiktoken", "tekken.json",
    "merges.txt", "dict.txt", "bpe.codes", "prophetnet.tokenizer", "normalizer.json", "emoji.json",
    "byte_maps.json", "word_shape.json", "word_pronunciation.json",
)  # fmt: skip
PROCESSORS = ("*processor_config.json", "audio_tokenizer_config.json")

# Patterns of the files, in lower case, that are copied from a source to the output. A folder may hold any other file
# besides those of its checkpoint, so this lists the files that belong to a model.
COPIED = (
    "config.json", "generation_config.json", "chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja",
    *PROCESSORS, *TOKENIZERS,
    # sentence-transformers' steps before and after the model: pooling, or a dense layer with its weights.
    "modules.json", "config_sentence_transformers.json", "sentence_*_config.json",
    "[0-9]_*/*.json", "[0-9]_*/model.safetensors",
    # Terms of use.
    "licen[cs]e*", "notice", "notice.md", "notice.txt", "use_policy.md",
)  # fmt: skip
# Ends of the names, in lower case, of the files that a run writes itself.
RUN_FILES = (
    ".safetensors", ".safetensors.index.json", "sha256sums",
    "report.json", "report.html", "readme.md", "calibration.jsonl",
)  # fmt: skip

# Patterns, with capitals, of the files that are downloaded from the Hub. All folders but that of templates, and
# consolidated.safetensors, hold the same weights in other formats.
SMALL_FILES = [*COPIED, "LICEN[CS]E*", "NOTICE*", "*.md"]
WANTED = [*SMALL_FILES, "*.safetensors", INDEX, ADAPTER]
UNWANTED = ["[!a0-9]*/*", "[0-9][!_]*/*", "consolidated*"]


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint that has been checked.

    Attributes:
        folder: folder of its files.
        config: content of config.json.
        tensors: its tensors by their names in the files. A quantized tensor has the name that it has in a checkpoint
            without quantization.
        dtype: floating dtype of the most bytes, those of quantized tensors counted after they are dequantized.
        quantization: format of its quantized tensors; None without any.
    """

    folder: Path
    config: dict
    tensors: Infos
    dtype: torch.dtype
    quantization: Quantization | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in a model."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def fingerprint(checkpoint: Checkpoint) -> str:
    """Compute the SHA-256, in hex, of the config and of the names, dtypes and shapes of all tensors.

    It depends neither on where the files are nor on how the tensors are spread over them.
    """
    tensors = sorted((name, str(info.dtype), info.shape) for name, info in in_files(checkpoint.tensors).items())
    return hashlib.sha256((checkpoint.folder / CONFIG).read_bytes() + repr(tensors).encode()).hexdigest()


def sample(checkpoint: Checkpoint) -> str:
    """Compute a SHA-256 of the first 4 KiB of every tensor, where versions of a model differ; 16 hex digits."""
    digest = hashlib.sha256()
    for _, info in sorted(in_files(checkpoint.tensors).items()):
        with info.file.open("rb") as file:
            file.seek(info.offset)
            digest.update(file.read(min(info.nbytes, 4096)))
    return digest.hexdigest()[:16]


def stamps(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Return size and time of every file of tensors by name, which tell whether a checkpoint has changed."""
    return {info.file.name: info.stamp for info in in_files(checkpoint.tensors).values()}


def locate(model: str, wanted: list[str] = WANTED) -> Path:
    """Return the folder of a checkpoint, and download it if it is on the Hub.

    Args:
        model: a local folder, or a Hub id such as "org/name". A name that starts with `.`, `/` or `~`, or that
            exists, is local and never looked up on the Hub.
        wanted: patterns of the files to download.

    Raises:
        InputError: the folder or the id does not exist, or there is neither a network nor a cached copy.
    """
    # Path.expanduser fails where there is no such user.
    path = Path(os.path.expanduser(model))
    if model and path.is_dir():
        return path
    if not model or path.exists() or model.startswith((".", "/", "~")):
        raise InputError(f"{model or repr(model)}: no such folder; give the folder of a checkpoint or a Hub id")
    with errors_in_one_line(
        f"{model}: no such folder, and it could not be downloaded from the Hub",
        "check the name, log in with `hf auth login` if the model is gated, or give the path of a local checkpoint",
    ):
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted, ignore_patterns=UNWANTED))


def inspect(folder: Path) -> Checkpoint:
    """Read and check the headers of a checkpoint: one model.safetensors, or shards with an index.

    If both exist, model.safetensors is read, as in transformers.

    Args:
        folder: a local folder, such as a snapshot in the Hub's cache.

    Raises:
        InputError: files are missing, damaged, contradict each other, or lie outside of the folder; the weights are
            only there as pickle; a tensor has a dtype that cannot be pruned; the model is quantized by a method that is
            not read, or its scales do not fit; a config is refused by `checked_config`.
    """
    if os.path.lexists(folder / ADAPTER):
        raise InputError(
            f"{folder}: a LoRA adapter ({ADAPTER}); merge it into its base model first: merge_and_unload() of peft, "
            "then save_pretrained(NEW_FOLDER); remove this file if it is merged"
        )
    if not os.path.lexists(folder / CONFIG):
        raise InputError(f"{folder}: no config.json; give the folder of a Hugging Face checkpoint in safetensors")
    config = checked_config(folder / CONFIG)
    for name in TOKENIZER_CONFIGS:
        if os.path.lexists(folder / name):
            checked_config(folder / name)
    quantization = quantization_of(config, folder / CONFIG)
    tensors = _find_tensors(folder, FILE_DTYPES | (FP8_DTYPES if quantization else {}))
    dtype = most_bytes(tensors.values())
    if quantization:
        tensors, dtype = joined(tensors, quantization, config, folder / CONFIG)
    companions(folder)
    if dtype is None:
        raise InputError(f"{folder}: no floating-point tensor in it; give the checkpoint of a language model")
    return Checkpoint(folder, config, tensors, dtype, quantization)


def checked_config(path: Path) -> dict[str, Any]:
    """Read config.json or one of TOKENIZER_CONFIGS.

    A config is refused for which transformers would run code, open files elsewhere, or build layers for minutes.

    Raises:
        InputError: an entry would cause that, transformers has no class for the model, or as for `read_json`.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = read_json(path)
    kind = config.get("model_type")
    of_tokenizer = path.name in TOKENIZER_CONFIGS
    if isinstance(kind, str) and kind not in CONFIG_MAPPING and not of_tokenizer:
        raise InputError(
            f"{path}: transformers {transformers.__version__} has no class for model_type {shown(kind)}; give another "
            "model, or install a later version: code of a checkpoint (auto_map) is never run"
        )
    for key, value in _entries(config):
        text = str(value)
        # The implementation of an attention may be a kernel on the Hub.
        elsewhere = (key.endswith("_implementation") and "/" in text) or text.startswith(TIMM)
        of_file = key.endswith(("_file", "_spm"))
        if isinstance(value, str) and os.path.isfile(text) and (of_tokenizer or (of_file and "/" in text)):
            # A path may be that of the machine on which the config was saved. Then the file next to the config is read.
            elsewhere = not (of_file and (path.parent / os.path.basename(text)).exists())
        if elsewhere:
            raise InputError(f"{path}: {key} {shown(text)} lies outside of the checkpoint; remove the entry")
        if isinstance(value, int) and value > MOST_LAYERS and LAYERS.search(key):
            raise InputError(f"{path}: {key} {value}: more than {MOST_LAYERS}; give the config of a real model")
    return config


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield key and value of all entries of a JSON value, nested ones included. List elements have the list's key."""
    for inner_key, inner in value.items() if isinstance(value, dict) else ((key, element) for element in value):
        yield inner_key, inner
        if isinstance(inner, dict | list):
            yield from _entries(inner, inner_key)


def check_file(path: Path, folder: Path | None = None) -> None:
    """Refuse a path that is missing, that is no file (a pipe would block for ever), or that leads out of its
    checkpoint.

    Args:
        path: the file.
        folder: the folder of the checkpoint; None: the folder of the file.

    Raises:
        InputError: the path is refused.
    """
    if not path.is_file():
        raise InputError(f"{path}: missing, or not a file; {AGAIN}")
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in roots_of(folder or path.parent)):
        raise InputError(
            f"{path}: a link to {shown(target, 4096)}, outside of the checkpoint; put the file itself there, or set "
            "HF_HUB_CACHE if it is in a cache of the Hub"
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a checkpoint that holds a JSON object.

    Raises:
        InputError: the file is missing, too large, no JSON object, or lies outside of its folder.
    """
    check_file(path)
    return parse_object(read_bounded(path, MAX_JSON_BYTES), path)


def _find_tensors(folder: Path, dtypes: dict[str, torch.dtype]) -> Infos:
    """Read the headers of all tensors of a checkpoint. `dtypes` are those allowed, by their names in the files."""
    if os.path.lexists(folder / SINGLE):
        return read_headers(folder, [SINGLE], dtypes)
    if not os.path.lexists(folder / INDEX):
        raise InputError(
            f"{folder}: neither {SINGLE} nor {INDEX}; give a checkpoint in safetensors: pickle files are never read, "
            "since they can run code, nor are other formats"
        )
    shard_of = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of or not all(isinstance(x, str) for x in shard_of.values()):
        raise InputError(f"{folder / INDEX}: no weight_map with names of files in it; {AGAIN}")
    tensors = read_headers(folder, sorted({*shard_of.values()}), dtypes)
    for name in [*tensors, *shard_of]:
        if name not in shard_of or name not in tensors or tensors[name].file != folder / shard_of[name]:
            raise InputError(f"{folder / INDEX}: tensor {shown(name)} is not where it says; {AGAIN}")
    return tensors


def read_headers(folder: Path, names: Iterable[str], dtypes: dict[str, torch.dtype] = FILE_DTYPES) -> Infos:
    """Read the headers of safetensors files. A tensor in more than one of them is refused.

    Args:
        folder: folder of the files.
        names: names of the files.
        dtypes: the allowed dtypes, by their names in the files.
    """
    tensors: Infos = {}
    for path in (folder / name for name in names):
        check_file(path, folder)
        for name, tensor in _read_header(path, dtypes).items():
            if name in tensors:
                raise InputError(f"{path}: tensor {name} is in {tensors[name].file.name} too; keep one")
            tensors[name] = tensor
    return tensors


def _read_header(path: Path, dtypes: dict[str, torch.dtype]) -> Infos:
    tensors = {}
    try:
        with path.open("rb") as content:
            stamp = stamp_of(os.fstat(content.fileno()))
            offset = 8 + int.from_bytes(content.read(8), "little")
        # safetensors has checked offsets, shapes, dtypes and sizes: the tensors fill the rest of the file, in this
        # order.
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                entry = file.get_slice(name)
                if entry.get_dtype() not in dtypes:
                    raise InputError(
                        f"{path}: tensor {name} has dtype {entry.get_dtype()}; give a checkpoint in fp32, fp16 or bf16"
                    )
                dtype, shape = dtypes[entry.get_dtype()], tuple(entry.get_shape())
                tensors[name] = TensorInfo(path, dtype, shape, offset, stamp)
                offset += tensors[name].nbytes
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({shown(first_line(error))}); {AGAIN}") from error
    return tensors


def companions(folder: Path) -> list[Path]:
    """List the small files of a checkpoint that are copied to the output: config, tokenizer, chat templates, license.

    Raises:
        InputError: a file is a link out of the checkpoint, a pipe or a device.
    """
    paths = {
        path.relative_to(folder).as_posix().lower(): path for path in (*folder.iterdir(), *folder.glob("[a0-9]*/*"))
    }
    copied = [path for name, path in paths.items() if matches(name, COPIED) and not path.is_dir()]
    for path in copied:
        check_file(path, folder)
    return sorted(copied)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether one of the patterns matches a name in lower case."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def note_of_others(folder: Path) -> list[str]:
    """Name, in a line, the files of a source's folder that are not copied. Weights and hidden files are not named."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.lower().endswith((*RUN_FILES, TEMPLATES)))
    copied = {path.relative_to(folder).parts[0] for path in companions(folder)}
    others = [name for name in names if not (name.startswith(".") or name in copied)]
    if not others:
        return []
    named = ", ".join(shown(name, 60) for name in others[:3]) + (", ..." if len(others) > 3 else "")
    return [f"not copied, since they are no part of a checkpoint: {len(others)} files or folders ({named})"]
