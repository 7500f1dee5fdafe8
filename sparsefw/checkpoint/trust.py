"""What a checkpoint's files may say: limits, and how to print what strangers wrote.

Files of a checkpoint are read by more than this package. Wherever transformers follows what they say (to another file,
to another class, to a number of modules), it is checked here before transformers sees it. Whoever can change files
while they are read is not kept out.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from sparsefw.errors import InputError, first_line

# Real configs have less than 100 KB; tokenizer configs 2 MB; the indices of models with 10^12 weights 20 MB.
MAX_CONFIG_BYTES = 2**20
MAX_TOKENIZER_CONFIG_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 32 * 2**20

# Nested deeper than this is no real config, and trouble for all code that recurses.
MAX_DEPTH = 32

# Entries of a config that make transformers read or believe something else than what was checked.
REFUSED = {
    "quantization_config": "the model is quantized; give the unquantized checkpoint",
    "configuration_files": "another config would be read in its place; remove the entry",
    "transformers_weights": "other weights would be read than the usual files hold; remove the entry",
    "attribute_map": "entries would get other names; remove the entry",
    "sub_configs": "parts of it would be left out; remove the entry",
    "sub_configs_defaults": "parts of it would be left out; remove the entry",
}
# Usually words such as "eager". The name of a repository stands for the code in it.
IMPLEMENTATIONS = {f"{_}{kind}_implementation" for _ in ("", "_") for kind in ("attn", "experts")}

# Entries that say of how many layers a model is built, each of them with a tensor at least. Experts share tensors.
COUNT = re.compile(r"(^|_)((n|num)_layer|n?layers|blocks|stages|stacks)(_per_[a-z]+)?$")
# Entries whose length says it.
PATTERN = re.compile(r"layer|block|pattern")
# So many are built in a second or two, whatever the checkpoint: tiny ones may say more than they have.
COUNT_ALLOWED = 1024
# Only these may be larger than every dimension in the checkpoint: they stand for positions, tokens, frequencies, ...
LARGE = re.compile(r"theta|base|freq|pos|len|seq|ctx|context|window|chunk|token|scal|seed|param|flop|step|total|sample")
# Of what is no larger, no more than a few MB can be made before it is compared with the checkpoint.
SIZE_ALLOWED = 2**20


def shown(text: object, limit: int = 200) -> str:
    """Text from a checkpoint as it may be printed: on one line, without control characters, cut where it is long."""
    text = str(text)
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit])
    return line if len(text) <= limit else f"{line}... ({len(text)} characters)"


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object in which every key stands once.

    Args:
        content: what the file holds, or the part of it that is JSON.
        path: of the file, for the message.

    Raises:
        InputError: it is not JSON in UTF-8, no object, holds a key twice, or is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            # Whoever looks at the first one sees something else than who looks at the last.
            raise InputError(f"{path}: {shown(key)} is in it twice; keep one")
        return found

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({shown(first_line(error))}); download or copy it again") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(parsed).__name__}; download or copy it again")
    return parsed


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse a config with which transformers would read something else than what was checked, or run code.

    Args:
        config: the content of config.json.
        path: of the file, for the message.

    Raises:
        InputError: it does, is nested too deeply, holds control characters, or is that of a quantized model.
    """
    for key, value in _entries(config, path):
        if _has_controls(key) or (isinstance(value, str) and _has_controls(value)):
            raise InputError(f"{path}: control characters in {shown(key)}: {shown(value)}; remove them")
        if value is not None and key in REFUSED:
            raise InputError(f"{path}: {REFUSED[key]} ({key})")
        if key in IMPLEMENTATIONS and "/" in json.dumps(value):
            raise InputError(f"{path}: {key} {shown(value)} is code on the Hub, which is never run; remove the entry")


def _has_controls(text: str) -> bool:
    # What could change a terminal, if a message quotes it. Chat templates may have several lines.
    return any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in text)


def check_sizes(config: dict[str, Any], path: Path, shapes: list[tuple[int, ...]]) -> None:
    """Refuse a config that asks for far more than its checkpoint holds.

    Parameters cost nothing before they are compared with the checkpoint's. Every layer is many objects, though, and
    some models compute with other sizes while they are built.

    Args:
        config: the content of config.json.
        path: of the file, for the message.
        shapes: of the checkpoint's tensors.

    Raises:
        InputError: there are more layers or blocks than tensors, or another number is larger than every
            dimension of them, where that makes no sense.
    """
    widest = max((d for shape in shapes if math.prod(shape) for d in shape), default=0)
    for key, value in _entries(config, path):
        count = size = 0
        if isinstance(value, list | str):
            count = len(value) if PATTERN.search(key) else 0
        elif isinstance(value, int | float) and COUNT.search(key):
            count = value
        elif isinstance(value, int) and not LARGE.search(key):
            size = value
        if count > max(COUNT_ALLOWED, len(shapes)):
            raise InputError(f"{path}: {shown(key)} asks for {shown(count)} parts, but there are {len(shapes)} tensors")
        if size > max(SIZE_ALLOWED, widest):
            raise InputError(f"{path}: {shown(key)} is {shown(size)}, but no tensor is larger than {widest} in any way")


def _entries(config: dict[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """All entries of a config and of what is nested in it; elements of a list under the list's key."""
    left = [("", config, 1)]
    while left:
        key, value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise InputError(f"{path}: nested more than {MAX_DEPTH} deep; no config of a model is")
        inner = value.items() if isinstance(value, dict) else [(key, x) for x in value]
        for entry in inner:
            if isinstance(value, dict):
                yield entry
            if isinstance(entry[1], dict | list):
                left.append((*entry, depth + 1))


def check_tokenizer(config: dict[str, Any], path: Path) -> None:
    """Refuse a config with which transformers would read something else as a tokenizer.

    Args:
        config: the content of tokenizer_config.json, or of config.json.
        path: of the file, for the message.

    Raises:
        InputError: the class is no tokenizer (a model's would be loaded with its weights, pickled ones too), or a file
            lies elsewhere.
    """
    name = config.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and _is_tokenizer(name)):
        raise InputError(f"{path}: tokenizer_class {shown(name)} is not the name of a tokenizer")
    for key, value in _entries(config, path):
        if key == "model_type" and isinstance(value, str) and not _is_tokenizer(_tokenizer_of(value)):
            # One of several parts, each in a folder of its own that nothing has checked.
            raise InputError(f"{path}: models of type {shown(value)} have no tokenizer that can be trusted")
    files = config.get("fast_tokenizer_files", [])
    if not isinstance(files, list) or not all(isinstance(file, str) and is_plain(file) for file in files):
        raise InputError(f"{path}: fast_tokenizer_files {shown(files)} are not names of files beside it")


def _tokenizer_of(model_type: str) -> str:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return TOKENIZER_MAPPING_NAMES.get(model_type) or ""


def _is_tokenizer(name: str) -> bool:
    """Whether transformers knows nothing but tokenizers under a name, with "Fast" and without: it tries both."""
    # Slow to import, and most of what is refused is refused without it.
    import transformers

    stem = re.sub("(Fast)+$", "", name)
    for candidate in {name, f"{name}Fast", stem, f"{stem}Fast"} & _names_of_transformers():
        # To look at anything else would import it.
        if not candidate.endswith(("Tokenizer", "TokenizerFast", "Backend")):
            return False
        found = getattr(transformers, candidate)
        # A stand-in for a class whose library is missing says so when it is used.
        stand_in = type(found).__name__ == "DummyObject"
        if not stand_in and not issubclass(found, transformers.PreTrainedTokenizerBase):
            return False
    return True


@cache
def _names_of_transformers() -> frozenset[str]:
    import transformers

    return frozenset(dir(transformers))


def is_plain(name: str) -> bool:
    """Whether a name is that of a file beside the one that names it, on any system."""
    # Separators, drive letters, control characters; and more bytes than names have.
    return (
        name.isprintable()
        and name not in {"", ".", ".."}
        and not set(name) & set('/\\:*?"<>|')
        and len(name.encode()) <= 255
    )


@contextmanager
def bounded(tensors: int) -> Iterator[None]:
    """While a model is built inside, stop if it becomes far larger than its checkpoint.

    Counts modules and parameters, wherever the numbers come from: a model has a parameter for every tensor, and a few
    modules around it.

    Args:
        tensors: in the checkpoint.

    Raises:
        InputError: it does.
    """
    allowed, built = 16 * max(COUNT_ALLOWED, tensors), 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > allowed:
            raise InputError(f"config.json asks for a model of more than {allowed} parts for {tensors} tensors")

    hooks = [
        nn.modules.module.register_module_module_registration_hook(count),
        nn.modules.module.register_module_parameter_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
