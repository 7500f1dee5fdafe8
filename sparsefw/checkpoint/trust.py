"""Checks of the entries of a checkpoint's files.

transformers reads the files of a checkpoint, too. Wherever it follows an entry (to another file, to another class, to a
number of modules), the entry is checked here before transformers sees it. This does not keep out somebody who changes
files while they are read.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sparsefw.checkpoint.quantization import KEY, ORIGINAL, WAYS_OUT, given_in, quantization_of
from sparsefw.checkpoint.transformers_names import (
    knows_model_type,
    version,
)
from sparsefw.errors import InputError, shown
from sparsefw.memory import host_limited

# Real configs have less than 100 KB; tokenizer configs 2 MB; the indices of models with 10^12 weights 20 MB.
MAX_CONFIG_BYTES = 2**20
MAX_TOKENIZER_CONFIG_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 32 * 2**20

# No real config is nested deeper, and code that recurses may fail on one that is.
MAX_DEPTH = 32

# Entries of a config that make transformers read other files, or understand entries differently, than was checked.
REFUSED = {
    "compression_config": f"the model is quantized by compressed-tensors; {WAYS_OUT['compressed-tensors']}",
    "configuration_files": "another config would be read in its place; remove the entry",
    "transformers_weights": "other weights would be read than the usual files hold; remove the entry",
    "attribute_map": "entries would get other names; remove the entry",
    "sub_configs": "parts of it would be left out; remove the entry",
    "sub_configs_defaults": "parts of it would be left out; remove the entry",
}
# Entries that name an implementation, usually by a word such as "eager". The name of a repository would make
# transformers run the code in it.
IMPLEMENTATIONS = {f"{prefix}{kind}_implementation" for prefix in ("", "_") for kind in ("attn", "experts")}

# Entries that give a number of layers. Each layer has a tensor at least; experts share tensors.
COUNT = re.compile(r"(^|_)((n|num)_layer|n?layers|blocks|stages|stacks)(_per_[a-z]+)?$")
# Entries whose length is a number of layers.
PATTERN = re.compile(r"layer|block|pattern")
# This many layers are built in a second or two, and every config may ask for them: that of a tiny checkpoint may count
# more layers than there are tensors.
COUNT_ALLOWED = 1024
# Entries that give a number of classes, and the tables of their names. transformers makes entries of the tables for the
# number, and prints them many times while it checks a config. The most that models of pictures tell apart is 21,841.
LABELS = re.compile(r"(^|_)num_(labels|classes)$")
LABEL_TABLES = {"id2label", "label2id"}
LABELS_ALLOWED = 2**16
# Only these may be larger than every dimension in the checkpoint: they count positions, tokens and the like.
LARGE = re.compile(r"theta|base|freq|pos|len|seq|ctx|context|window|chunk|token|scal|seed|param|flop|step|total|sample")
# A smaller size costs a few MB at most before it is compared with the checkpoint.
SIZE_ALLOWED = 2**20
# The objects of a model and its computed tables, without weights. The largest take some hundred MB.
BUILDING_ALLOWED = 8 * 2**30

# The models that a config may be made of. transformers makes a config for each, with all its defaults.
MODELS_ALLOWED = 64
# Entries that timm takes for the arguments of a function which opens files, and for a model that may have a place.
TIMM_ARGUMENTS = "model_args"
TIMM_MODELS = {"architecture", "backbone"}
TIMM_PLACES = re.compile(r"path|file|url|pretrained|checkpoint|cfg|config|cache|weights|tag")


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse a config that makes transformers read something that was not checked, or run code.

    Args:
        config: the content of config.json.
        path: the file's path, for the message.

    Raises:
        InputError: it does that, is nested too deeply, holds control characters, or is that of a model which is
            quantized by a method that is not read.
    """
    quantized = models = 0
    for key, value in entries(config, path):
        if _has_controls(key) or (isinstance(value, str) and _has_controls(value)):
            raise InputError(f"{path}: control characters in {shown(key)}: {shown(value)}; remove them")
        quantized += key == KEY and value is not None
        if value is not None and key in REFUSED:
            raise InputError(f"{path}: {REFUSED[key]} ({key})")
        models += key == "model_type"
        if models > MODELS_ALLOWED:
            raise InputError(f"{path}: made of more than {MODELS_ALLOWED} models, which no model is")
        if key in TIMM_MODELS and isinstance(value, str) and ":" in value:
            raise InputError(f"{path}: {key} {shown(value)} is a model elsewhere; remove the entry")
        if key == TIMM_ARGUMENTS and isinstance(value, dict) and (named := sorted(filter(TIMM_PLACES.search, value))):
            raise InputError(f"{path}: {key} names a file or a place ({shown(named[0])}); remove the entry")
        if key in IMPLEMENTATIONS and "/" in json.dumps(value):
            raise InputError(f"{path}: {key} {shown(value)} is code on the Hub, which is never run; remove the entry")
    if quantized > len(given_in(config)):
        raise InputError(f"{path}: a part of the model is quantized by itself; {ORIGINAL} ({KEY})")
    quantization_of(config, path)


def check_model_type(config: dict[str, Any], path: Path) -> None:
    """Refuse a model that transformers has no class for.

    Args:
        config: the content of config.json.
        path: the file's path, for the message.

    Raises:
        InputError: it has none; the message says so if the checkpoint has code of its own.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or knows_model_type(model_type):
        return
    if config.get("auto_map"):
        raise InputError(
            f"{path}: model_type {shown(model_type)} exists as code of the checkpoint (auto_map), which is never run, "
            f"and transformers {version()} has no class for it; give a model that transformers has"
        )
    raise InputError(
        f"{path}: transformers {version()} has no class for model_type {shown(model_type)}; give a model that it has, "
        "or install a later version"
    )


def _has_controls(text: str) -> bool:
    # A message that quotes them could change a terminal. Chat templates may have several lines.
    return any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in text)


def check_sizes(config: dict[str, Any], path: Path, shapes: list[tuple[int, ...]]) -> None:
    """Refuse a config that asks for far more than its checkpoint holds.

    Parameters cost nothing before they are compared with the checkpoint's. But every layer is many objects, and some
    models compute with other sizes while they are built.

    Args:
        config: the content of config.json.
        path: the file's path, for the message.
        shapes: shapes of the checkpoint's tensors.

    Raises:
        InputError: it asks for more layers or blocks than there are tensors, or for a size larger than any of their
            dimensions.
    """
    widest = max((d for shape in shapes if math.prod(shape) for d in shape), default=0)
    _check_labels(config, path)
    for key, value in entries(config, path):
        count: float = 0
        if isinstance(value, list | str):
            count = len(value) if PATTERN.search(key) else 0
        elif isinstance(value, int | float) and COUNT.search(key):
            count = value
        if count > max(COUNT_ALLOWED, len(shapes)):
            raise InputError(f"{path}: {shown(key)} asks for {shown(count)} parts, but there are {len(shapes)} tensors")
    for key, size in numbers(config, path):
        if not isinstance(size, int) or LARGE.search(key) or COUNT.search(key):
            continue
        if size > max(SIZE_ALLOWED, widest):
            raise InputError(f"{path}: {shown(key)} is {shown(size)}, but no tensor is larger than {widest} in any way")


def _check_labels(config: dict[str, Any], path: Path) -> None:
    """Refuse more classes than any model has, in all of its parts together."""
    labels: float = sum(size for key, size in numbers(config, path) if LABELS.search(key) and size > 0)
    labels += sum(len(value) for key, value in entries(config, path) if key in LABEL_TABLES and isinstance(value, dict))
    if labels > LABELS_ALLOWED:
        raise InputError(
            f"{path}: {shown(labels)} classes (num_labels, num_classes, id2label), more than any model has"
        )


def numbers(config: dict[str, Any], path: Path) -> Iterator[tuple[str, int | float]]:
    """All numbers in a config and in what is nested in it; those in a list come under the list's key."""
    for key, value in entries(config, path):
        pending = [value]
        while pending:
            inner = pending.pop()
            if isinstance(inner, int | float):
                yield key, inner
            elif isinstance(inner, list):
                pending.extend(inner)


def entries(config: dict[str, Any], path: Path) -> Iterator[tuple[str, Any]]:
    """All entries of a config and of the objects nested in it; elements of a list come under the list's key."""
    pending = [("", config, 1)]
    while pending:
        key, value, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise InputError(f"{path}: nested more than {MAX_DEPTH} deep; no config of a model is")
        inner = value.items() if isinstance(value, dict) else [(key, element) for element in value]
        for entry in inner:
            if isinstance(value, dict):
                yield entry
            if isinstance(entry[1], dict | list):
                pending.append((*entry, depth + 1))


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in the same folder, on any system."""
    # Without separators, drive letters and control characters, and no longer than file systems allow.
    return (
        name.isprintable()
        and name not in {"", ".", ".."}
        and not set(name) & set('/\\:*?"<>|')
        and len(name.encode()) <= 255
    )


@contextmanager
def bounded(tensors: int) -> Iterator[None]:
    """Stop the building of a model, inside the `with` block, if it becomes far larger than its checkpoint.

    Counts modules and parameters, whichever entry asks for them: a model has a parameter for every tensor, and a few
    modules around it. Limits the memory, whatever takes it.

    Args:
        tensors: number of tensors in the checkpoint.

    Raises:
        InputError: the model becomes too large.
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
        with host_limited(BUILDING_ALLOWED):
            yield
    except MemoryError as error:
        gib = BUILDING_ALLOWED // 2**30
        raise InputError(f"config.json asks for a model of more than {gib} GiB without its weights") from error
    finally:
        for hook in hooks:
            hook.remove()
