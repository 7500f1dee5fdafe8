"""The model that a config.json describes: its shapes, without its weights."""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from sparsefw import checkpoint
from sparsefw.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint, trust
from sparsefw.checkpoint.quantization import Quantization, dtype_in, quantization_of
from sparsefw.checkpoint.source import read_json
from sparsefw.checkpoint.tensors import TensorInfo
from sparsefw.errors import InputError, first_line, shown
from sparsefw.model import shape_of
from sparsefw.model.hf import from_config
from sparsefw.model.shapes import LayerShape, ModelShape
from sparsefw.model.skeleton import LOADING, class_of, forget_quantization, max_seqlen

# Dtypes of weights that can be pruned. A model whose config names no dtype is taken to have the first.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The most elements that a tensor may have: three times the experts of one layer of the largest models.
MAX_ELEMENTS = 2**35
# The most tensors that a model may have; `trust.bounded` lets many times as many modules and parameters be made.
MAX_TENSORS = 4096


@dataclass(frozen=True)
class DescribedModel:
    """A model as its config describes it.

    Attributes:
        name: name of the model's class.
        shape: shape of the model.
        dtype: dtype of the weights.
        max_seqlen: tokens in the longest window that it takes; None if the config does not say.
        notes: what was assumed, one line each.
    """

    name: str
    shape: ModelShape
    dtype: torch.dtype
    max_seqlen: int | None
    notes: list[str]


def describe(model: str) -> DescribedModel:
    """The model of a config. Nothing else is downloaded, and no weights are read.

    Args:
        model: a folder with a config.json, a config file, or a Hub id.

    Raises:
        InputError: there is no such model; its config is damaged, asks for what no model has, or describes one that
            transformers does not know.
    """
    path = _find_config(model)
    quantization, named = _check_config(path)
    folder = path.parent if path.name == CONFIG else path
    notes: list[str] = []
    stored = _stored(path)
    try:
        with trust.bounded(MAX_TENSORS):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        forget_quantization(config)
        if quantization:
            dtype = stored.dtype if stored else named or DTYPES[0]
            written = str(dtype).removeprefix("torch.")
            notes.append(
                f"{path}: quantized by {quantization.method}: tensors are dequantized and written as {written}"
            )
        else:
            dtype = _dtype(stored.dtype if stored else None, config, path, notes)
        empty = _empty_model(config, dtype, path)
    except InputError:
        raise
    except LOADING as error:
        raise InputError(f"{path}: transformers cannot build this model: {shown(first_line(error))}") from error
    tensors = _tensors(empty, path)
    text_config = config.get_text_config()
    if not getattr(text_config, "num_hidden_layers", 1):
        raise InputError(f"{path}: num_hidden_layers is 0: there is nothing to prune")
    shape = _shape(Checkpoint(folder, {}, tensors, dtype), path)
    # As if each expert were a tensor of its own.
    shape = replace(shape, joined=max((_stacked(layer, dtype) for b in shape.blocks for layer in b.layers), default=0))
    if quantization:
        # As if all of a block were quantized. Without the weights as if everything were, which is the least to read.
        share = quantization.share(dtype)
        quantized = int(share * max(block.nbytes for block in shape.blocks))
        shape = replace(shape, quantized=quantized, stored=stored.stored_nbytes / stored.nbytes if stored else share)
    try:
        longest = max_seqlen(config)
    # Entries that differ between layers cannot be read for all of them.
    except LOADING as error:
        raise InputError(f"{path}: unsupported model: {shown(first_line(error))}") from error
    return DescribedModel(
        name=type(empty).__name__,
        shape=shape,
        dtype=dtype,
        max_seqlen=longest,
        notes=notes,
    )


def _find_config(model: str) -> Path:
    path = Path(os.path.expanduser(model))
    if model and path.is_file():
        return path
    if model and path.is_dir():
        if not (path / CONFIG).exists():
            raise InputError(f"{path}: no config.json; give the folder of a Hugging Face checkpoint, or a config file")
        return path / CONFIG
    if not model or path.exists() or model.startswith((".", "/", "~")):
        raise InputError(f"{model or '--model'}: no such folder or file; give one with a config, or a Hub id")
    with checkpoint.from_hub(model):
        return Path(huggingface_hub.hf_hub_download(model, CONFIG))


def _check_config(path: Path) -> tuple[Quantization | None, torch.dtype | None]:
    """Refuse a config that transformers should not see.

    Returns:
        How the checkpoint is quantized, and the dtype that the config names.
    """
    config = read_json(path)
    trust.check_config(config, path)
    trust.check_model_type(config, path)
    return quantization_of(config, path), dtype_in(config)


def _stored(path: Path) -> Checkpoint | None:
    """The checkpoint beside a config, whose dtype counts more than the config's; None if there are no weights."""
    if path.name == CONFIG and any((path.parent / name).exists() for name in (SINGLE, INDEX)):
        return checkpoint.inspect(path.parent)
    return None


def _dtype(stored: torch.dtype | None, config: PretrainedConfig, path: Path, notes: list[str]) -> torch.dtype:
    """The dtype of the weights, else the config's, else the one that is assumed."""
    if stored is None and config.dtype is None:
        notes.append(f"{path}: names no dtype: taken for {DTYPES[0]}")
    dtype = stored or config.dtype or DTYPES[0]
    if dtype not in DTYPES:
        raise InputError(f"{path}: weights in {dtype} cannot be pruned; give a model in fp32, fp16 or bf16")
    return dtype


def _empty_model(config: PretrainedConfig, dtype: torch.dtype, path: Path) -> PreTrainedModel:
    """The model on the meta device."""
    kind, config = class_of(config, path)
    try:
        with torch.device("meta"), trust.bounded(MAX_TENSORS):
            return from_config(kind, config, dtype=dtype)
    except InputError as error:
        raise InputError(f"{path}: asks for a model of more parts than any has") from error


def _tensors(empty: PreTrainedModel, path: Path) -> dict[str, TensorInfo]:
    """The tensors that a checkpoint of the model has, each tied tensor once."""
    tied = empty.all_tied_weights_keys
    tensors = {n: TensorInfo(path, t.dtype, tuple(t.shape)) for n, t in empty.state_dict().items() if n not in tied}
    for name, tensor in tensors.items():
        if math.prod(tensor.shape) > MAX_ELEMENTS:
            raise InputError(f"{path}: asks for {name} of shape {shown(tensor.shape)}, which no model has")
    return tensors


def _stacked(layer: LayerShape, dtype: torch.dtype) -> int:
    """Bytes of the parameter in which a layer's experts are stacked; 0 for a layer that is no expert."""
    return layer.experts * layer.rows * layer.d * dtype.itemsize


def _shape(model: Checkpoint, path: Path) -> ModelShape:
    try:
        return shape_of(model)
    except InputError:
        raise
    # A block runs the code of its architecture on sizes that the config chose.
    except (*LOADING, MemoryError) as error:
        raise InputError(f"{path}: unsupported model: a block cannot be run: {shown(first_line(error))}") from error
