"""Checks of a checkpoint's configs before transformers sees them, and of the model that a config asks for.

No code of a checkpoint is run, and nothing is opened outside of its folder. transformers follows a few entries of a
config to another place: these are refused here.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from sparsefw.errors import InputError, shown
from sparsefw.memory import host_limited

# Modules and parameters that any model may have, and how many for each tensor of its checkpoint.
PARTS_ALLOWED, PARTS_PER_TENSOR = 2**14, 16
# The objects of a model and its computed tables, without weights. The largest take some hundred MB.
BUILDING_ALLOWED = 4 * 2**30


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse a config that makes transformers run code.

    Args:
        config: the content of config.json.
        path: the file's path, for the message.
    """
    for key, value in entries(config):
        # An attention may be the name of a kernel on the Hub.
        if key.endswith("_implementation") and "/" in str(value):
            raise InputError(f"{path}: {key} {shown(value)} is code from elsewhere, which is not run; remove the entry")
        # timm opens what such a name leads to, pickles too.
        if isinstance(value, str) and value.startswith(("local-dir:", "hf-hub:", "hf_hub:")):
            raise InputError(f"{path}: {key} {shown(value)} lies outside of the checkpoint; remove the entry")


def check_model_type(config: dict[str, Any], path: Path) -> None:
    """Refuse a model that transformers has no class for."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        raise InputError(
            f"{path}: transformers {transformers.__version__} has no class for model_type {shown(kind)}; give another "
            "model, or install a later version: code of a checkpoint (auto_map) is never run"
        )


def check_tokenizer(config: dict[str, Any], path: Path) -> None:
    """Refuse a config that makes transformers read something else than the tokenizer beside it.

    Args:
        config: the content of tokenizer_config.json or config.json.
        path: the file's path.
    """
    name = config.get("tokenizer_class")
    # A model's class would be loaded with its weights, pickled ones too.
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"\w+(Tokenizer|TokenizerFast|Backend)", name)):
        raise InputError(f"{path}: tokenizer_class {shown(name)} is not the name of a tokenizer")
    for key, value in entries(config):
        # Of the name of a file that was there once, the file beside the config takes the place.
        if isinstance(value, str) and "/" in value and key != "name_or_path" and os.path.exists(value):
            beside = path.parent / os.path.basename(value)
            if not os.path.isdir(value) and not (key.endswith("_file") and beside.exists()):
                raise InputError(
                    f"{path}: {key} {shown(value)} is a file outside of the checkpoint; remove the entry, and put the "
                    "files of the tokenizer beside it"
                )


def entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All entries of a JSON value and of what is nested in it; elements of a list come under the list's key."""
    for inner_key, inner in value.items() if isinstance(value, dict) else ((key, element) for element in value):
        yield inner_key, inner
        if isinstance(inner, dict | list):
            yield from entries(inner, inner_key)


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
    allowed, built = PARTS_ALLOWED + PARTS_PER_TENSOR * tensors, 0

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
