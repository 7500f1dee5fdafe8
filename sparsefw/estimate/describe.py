"""The model that a config.json describes, as a checkpoint without files: enough for its shapes."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparsefw import checkpoint
from sparsefw.checkpoint import trust
from sparsefw.checkpoint.source import CONFIG, INDEX, SINGLE, Checkpoint, TensorInfo
from sparsefw.checkpoint.trust import shown
from sparsefw.errors import InputError, first_line
from sparsefw.estimate.flops import Traits
from sparsefw.model.shapes import ModelShape, shape_of
from sparsefw.model.skeleton import LOADING

# Weights are pruned in these; what a config that names none is taken for comes first.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Elements of a tensor: three times the experts of one layer of the largest models.
MAX_ELEMENTS = 2**35
# Tensors of a model: `trust.bounded` lets many times as many modules and parameters be made.
MAX_TENSORS = 4096


@dataclass(frozen=True)
class Described:
    """What a config describes.

    Attributes:
        name: of the model's class.
        shape: of the model.
        traits: what its forward does beside the products of its layers.
        dtype: of the weights.
        max_seqlen: longest window it takes, or None where it says none.
        notes: one line each about what was assumed.
    """

    name: str
    shape: ModelShape
    traits: Traits
    dtype: torch.dtype
    max_seqlen: int | None
    notes: list[str]


def describe(model: str) -> Described:
    """The model of a config; of weights nothing is read, and nothing but the config is downloaded.

    Args:
        model: a folder with a config.json, a config file, or a Hub id.

    Raises:
        InputError: there is none, it is damaged, or asks for what no model has or transformers does not know.
    """
    path = _find(model)
    _check(path)
    folder = path.parent if path.name == CONFIG else path
    notes = []
    # The headers say more of the dtype than the config, where there are any.
    stored = any((path.parent / name).exists() for name in (SINGLE, INDEX)) and path.name == CONFIG
    dtype = checkpoint.inspect(path.parent).dtype if stored else None
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if dtype is None and config.dtype is None:
            notes.append(f"{path}: names no dtype: taken for {DTYPES[0]}")
        dtype = dtype or config.dtype or DTYPES[0]
        if dtype not in DTYPES:
            raise InputError(f"{path}: weights in {dtype} cannot be pruned; give a model in fp32, fp16 or bf16")
        empty = _empty(config, dtype, path)
    except InputError:
        raise
    except LOADING as error:
        raise InputError(f"{path}: transformers cannot build this model: {shown(first_line(error))}") from error
    tied = empty.all_tied_weights_keys
    tensors = {n: TensorInfo(path, t.dtype, tuple(t.shape)) for n, t in empty.state_dict().items() if n not in tied}
    for name, tensor in tensors.items():
        if math.prod(tensor.shape) > MAX_ELEMENTS:
            raise InputError(f"{path}: asks for {name} of shape {shown(tensor.shape)}, which no model has")
    text = config.get_text_config()
    if not getattr(text, "num_hidden_layers", 1):
        raise InputError(f"{path}: num_hidden_layers is 0: there is nothing to prune")
    shape = _shape(Checkpoint(folder, {}, tensors, dtype), path)
    return Described(
        name=type(empty).__name__,
        shape=shape,
        traits=_traits(text, shape, path, notes),
        dtype=dtype,
        max_seqlen=getattr(text, "max_position_embeddings", None),
        notes=notes,
    )


def _empty(config: Any, dtype: torch.dtype, path: Path) -> nn.Module:
    """The model on the meta device."""
    try:
        with torch.device("meta"), trust.bounded(MAX_TENSORS):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    except InputError as error:
        raise InputError(f"{path}: asks for a model of more parts than any has") from error


def _shape(model: Checkpoint, path: Path) -> ModelShape:
    """Of a model, one block of which may do anything when it is run."""
    try:
        return shape_of(model)
    except InputError:
        raise
    except (*LOADING, MemoryError) as error:
        raise InputError(f"{path}: unsupported model: a block cannot be run: {shown(first_line(error))}") from error


def _traits(config: Any, shape: ModelShape, path: Path, notes: list[str]) -> Traits:
    heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "v_head_dim", None) or getattr(config, "head_dim", None)
    chosen = getattr(config, "num_experts_per_tok", None)
    if not isinstance(chosen, int) and any(layer.experts for block in shape.blocks for layer in block.layers):
        notes.append(f"{path}: no num_experts_per_tok: one expert per token is counted")
    return Traits(heads * width if heads and width else shape.hidden * bool(heads), chosen or 1)


def _find(model: str) -> Path:
    path = Path(os.path.expanduser(model))
    if model and path.is_file():
        return path
    if model and path.is_dir():
        if not (path / CONFIG).exists():
            raise InputError(f"{path}: no {CONFIG}; give the folder of a Hugging Face checkpoint, or a config file")
        return path / CONFIG
    if not model or path.exists() or model.startswith((".", "/", "~")):
        raise InputError(f"{model or '--model'}: no such folder or file; give one with a config, or a Hub id")
    with checkpoint.from_hub(model):
        return Path(huggingface_hub.hf_hub_download(model, CONFIG))


def _check(path: Path) -> None:
    """Refuse a config that transformers should not see."""
    checkpoint.check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(trust.MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {first_line(error)}") from error
    if len(content) > trust.MAX_CONFIG_BYTES:
        raise InputError(f"{path}: more than {trust.MAX_CONFIG_BYTES // 2**20} MiB, which no real config has")
    config = trust.parse_object(content, path)
    trust.check_config(config, path)
    for key, value in _numbers(config):
        limit = trust.COUNT_ALLOWED if trust.COUNT.search(key) else trust.SIZE_ALLOWED
        if value > limit and (limit == trust.COUNT_ALLOWED or not trust.LARGE.search(key)):
            raise InputError(f"{path}: {shown(key)} is {shown(value)}, which no model has")


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float):
            yield key, value
