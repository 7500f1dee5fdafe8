"""Quantized checkpoints: which are read, and which tensors in their files make one tensor of the model.

FP8 as DeepSeek-V3 and Qwen3 ship it, MXFP4 as gpt-oss does, and packed ones, whose matrices lack their zeros (see
`packed`). Their tensors are dequantized where they are used (see `tensors`), and what is written is not quantized. All
other methods are refused.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsefw.checkpoint.packed import MASK
from sparsefw.checkpoint.tensors import EXPONENT, QuantizedInfo, TensorInfo
from sparsefw.errors import InputError, shown

KEY = "quantization_config"
METHODS = ("fp8", "mxfp4", "sparsefw")
# transformers' own key for the name of the weights' file. What is no name of one keeps it from loading packed matrices.
GUARD = "transformers_weights"
# transformers takes blocks of this size where a config does not say. null means one scale for a matrix.
DEFAULT_BLOCK = (128, 128)
# The way out where a checkpoint is not read.
ORIGINAL = "give the unquantized checkpoint that it was made from"

FP8 = torch.float8_e4m3fn
# dtypes in the files of an FP8 checkpoint beside those of others, by their names there.
FP8_DTYPES = {"F8_E4M3": FP8, "F8_E8M0": EXPONENT}
SCALE_DTYPES = {torch.float32, torch.bfloat16, torch.float16, EXPONENT}
# Values (E2M1) that share an exponent in MXFP4, as bytes.
GROUP_BYTES = 16

# dtypes that a quantized model may be written in, the most usual first, and the entries of a config that name one.
MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPE_KEYS = ("dtype", "torch_dtype")

# Ends of the names of an FP8 weight's scale; the first one may follow the name of any tensor.
SCALE, OTHER_SCALES = "_scale_inv", (".scale", ".qscale_weight")
# Ends of the names of values and scales in MXFP4.
BLOCKS, SCALES = "_blocks", "_scales"
ACTIVATION_SCALE = "activation_scale"

# A tensor of the model by its name there.
Joint = tuple[str, QuantizedInfo]


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        method: one of METHODS.
        block: (rows, columns) that share a scale in FP8; None: all of a matrix.
        kept: fraction of the weights that a packed matrix keeps.
    """

    method: str
    block: tuple[int, int] | None = None
    kept: float = 0.0

    @property
    def words(self) -> tuple[str, str]:
        """Two words for messages: its tensors are the first, and a run makes them the second."""
        packed = self.method == "sparsefw"
        return ("packed", "unpacked") if packed else (f"quantized ({self.method})", "dequantized")

    def share(self, dtype: torch.dtype) -> float:
        """Bytes of a quantized tensor as it is stored, for each byte of it in another dtype."""
        if self.method == "mxfp4":
            return (GROUP_BYTES + 1) / (2 * GROUP_BYTES * dtype.itemsize)
        if self.method == "sparsefw":
            return self.kept + 1 / (8 * dtype.itemsize)
        return (1 + (4 / math.prod(self.block) if self.block else 0)) / dtype.itemsize


def quantization_of(config: dict[str, Any], path: Path) -> Quantization | None:
    """How a checkpoint with this config is quantized; None if it is not.

    Args:
        config: the content of config.json.
        path: the file's path, for the message.

    Raises:
        InputError: the method is not one that is read.
    """
    content = next((section[KEY] for section in _configs(config) if section.get(KEY) is not None), None)
    if content is None:
        return None
    method = content.get("quant_method", "an unnamed method") if isinstance(content, dict) else content
    if method not in METHODS:
        raise InputError(f"{path}: the model is quantized by {shown(method)}, which is not read; {ORIGINAL} ({KEY})")
    if method == "sparsefw":
        return Quantization(method, kept=float(content["kept"]))
    block = content.get("weight_block_size", DEFAULT_BLOCK)
    return Quantization(method, tuple(block) if block and method == "fp8" else None)


def _configs(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Where transformers looks for a quantization config."""
    text_config = config.get("text_config")
    return [config, text_config] if isinstance(text_config, dict) else [config]


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A config as that of a model which is not quantized."""
    if not any(section.get(KEY) is not None for section in _configs(config)):
        return config
    config = copy.deepcopy(config)
    config.pop(GUARD, None)
    named = dtype_in(config)
    for section in _configs(config):
        # Only a quantized model has another dtype: transformers would cast the weights to it.
        for key in (KEY, *(() if named else DTYPE_KEYS)):
            section.pop(key, None)
    return config


def joined(
    stored: dict[str, TensorInfo], quantization: Quantization, config: dict[str, Any], path: Path
) -> tuple[dict[str, TensorInfo], torch.dtype]:
    """The tensors of a quantized checkpoint as the model has them.

    Args:
        stored: the tensors in the files. Scales of activations are left out.
        quantization: how they are quantized.
        config: the content of config.json, which may name the dtype of the result. Else it is the one that most bytes
            have which are not quantized.
        path: the file's path, for messages.

    Returns:
        The tensors by name, and the dtype of the result.

    Raises:
        InputError: scales are missing, or scales or values have a dtype or shape that does not fit.
    """
    join = {"fp8": _join_fp8, "mxfp4": _join_mxfp4, "sparsefw": _join_packed}[quantization.method]
    quantized = dict(found for name in stored if (found := join(stored, name, quantization)))
    if not quantized:
        raise InputError(f"{path}: {KEY} says {quantization.method}, but no tensor is quantized; remove the entry")
    used = {part for info in quantized.values() for part in info.parts}
    used |= {name for name in stored if _scales_activations(name, stored)}
    others = {name: info for name, info in stored.items() if name not in used}
    if quantization.method == "sparsefw":
        return quantized | others, most_bytes([*quantized.values(), *others.values()]) or MODEL_DTYPES[0]
    dtype = dtype_in(config) or most_bytes(others.values()) or MODEL_DTYPES[0]
    return {name: replace(info, dtype=dtype) for name, info in quantized.items()} | others, dtype


def dtype_in(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a config names for the weights; None if it names none that can be pruned."""
    named = [section.get(key) for section in _configs(config) for key in DTYPE_KEYS]
    return next((dtype for name in named for dtype in MODEL_DTYPES if f"torch.{name}" == str(dtype)), None)


def most_bytes(tensors: Iterable[TensorInfo]) -> torch.dtype | None:
    """The floating dtype that most bytes have; None without any."""
    bytes_of: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            bytes_of[tensor.dtype] += tensor.nbytes
    return bytes_of.most_common(1)[0][0] if bytes_of else None


def note(used: Iterable[TensorInfo], quantization: Quantization | None) -> str:
    """A line about the tensors of a model that are dequantized; empty if none is."""
    infos = list(used)
    quantized = [info for info in infos if isinstance(info, QuantizedInfo)]
    if not quantized or quantization is None:
        return ""
    written, read = sum(info.nbytes for info in infos), sum(info.stored_nbytes for info in infos)
    dtype = str(quantized[0].dtype).removeprefix("torch.")
    stored, done = quantization.words
    return (
        f"the source is {stored}: {len(quantized)} tensors are {done} and written as {dtype}, all tensors take "
        f"{written / 1e9:.3g} GB instead of {read / 1e9:.3g} GB"
    )


def _scales_activations(name: str, stored: dict[str, TensorInfo]) -> bool:
    """Whether a tensor is the scale of an FP8 weight's input: nothing is multiplied with it once the weight is not."""
    stem = name.removesuffix(ACTIVATION_SCALE)
    weights = [stored[other] for other in (f"{stem}weight", stem.removesuffix("_")) if other in stored]
    return stem != name and any(weight.dtype == FP8 for weight in weights)


def _join_fp8(stored: dict[str, TensorInfo], name: str, quantization: Quantization) -> Joint | None:
    """The name of the tensor whose values are called `name`, and the tensor; None if that is none in FP8."""
    values, stem = stored[name], name.removesuffix(".weight")
    names = [f"{name}{SCALE}", *(f"{stem}{other}" for other in OTHER_SCALES if stem != name)]
    scale = next((other for other in names if other in stored), None)
    if values.dtype != FP8:
        if scale == f"{name}{SCALE}":
            raise InputError(f"{values.file}: tensor {name} has a scale, {scale}, but is not in FP8 ({values.dtype})")
        return None
    if scale is None:
        raise InputError(f"{values.file}: tensor {name} is in FP8, and its scale {name}{SCALE} is missing; {ORIGINAL}")
    scales, shape = stored[scale], values.shape
    *lead, rows, columns = shape if len(shape) >= 2 and all(shape) else (0, 0)
    height, width = quantization.block or (rows, columns)
    grid = (*lead, -(-rows // height), -(-columns // width)) if rows else ()
    # One scale for a matrix may have fewer dimensions.
    fewer = {(1,), ()} if not lead else {tuple(lead)}
    fits = scales.shape == grid or (quantization.block is None and scales.shape in fewer)
    if not rows or not fits or scales.dtype not in SCALE_DTYPES:
        raise InputError(
            f"{scales.file}: tensor {scale} of shape {scales.shape} and dtype {scales.dtype} does not fit {name} of "
            f"shape {shape} in blocks of {height} x {width}, which needs {grid} in floating point"
        )
    parts = {name: values, scale: scales}
    return name, QuantizedInfo(values.file, MODEL_DTYPES[0], shape, "fp8", parts, (height, width))


def _join_mxfp4(stored: dict[str, TensorInfo], name: str, quantization: Quantization) -> Joint | None:
    """The name of the tensor whose values are called `name`, and the tensor; None if that is none in MXFP4."""
    if stored[name].dtype != torch.uint8 or not name.endswith(BLOCKS):
        return None
    joint = name.removesuffix(BLOCKS)
    scale = f"{joint}{SCALES}"
    if scale not in stored:
        raise InputError(f"{stored[name].file}: tensor {name} is in MXFP4, and {scale} is missing; {ORIGINAL}")
    values, scales = stored[name], stored[scale]
    sound = len(values.shape) == 4 and values.shape[-1] == GROUP_BYTES and all(values.shape)
    if not sound or (scales.dtype, scales.shape) != (torch.uint8, values.shape[:-1]):
        raise InputError(
            f"{scales.file}: tensor {scale} of shape {scales.shape} and dtype {scales.dtype} does not fit "
            f"{name} of shape {values.shape}; MXFP4 has (experts, rows, groups, {GROUP_BYTES}) and a byte a group"
        )
    experts, rows, groups, width = values.shape
    shape = (experts, groups * 2 * width, rows)
    return joint, QuantizedInfo(values.file, MODEL_DTYPES[0], shape, "mxfp4", {name: values, scale: scales})


def _join_packed(stored: dict[str, TensorInfo], name: str, quantization: Quantization) -> Joint | None:
    """The tensor whose values are called `name`, and that name; None if it is not packed."""
    values, mask = stored[name], stored.get(name + MASK)
    if mask is None:
        return None
    kept = (*mask.shape[:-1], values.shape[-1]) if values.shape else ()
    sound = mask.dtype == torch.uint8 and len(mask.shape) > 1 and values.shape in (kept, kept[-1:])
    if not sound or not values.dtype.is_floating_point:
        raise InputError(
            f"{mask.file}: tensor {name}{MASK} of shape {mask.shape} and dtype {mask.dtype} does not fit {name} of "
            f"shape {values.shape}; a mask has a row for each row, and a byte for 8 columns"
        )
    shape = (*mask.shape[:-1], 8 * mask.shape[-1])
    return name, QuantizedInfo(values.file, values.dtype, shape, "sparsefw", {name: values, name + MASK: mask})
