"""Quantized checkpoints: which are read, and which tensors in their files make one tensor of the model.

FP8 as DeepSeek-V3 and Qwen3 ship it, and MXFP4 as gpt-oss does. Their tensors are dequantized where they are used (see
`tensors`), and what is written is not quantized. All other methods are refused.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsefw.checkpoint.tensors import EXPONENT, QuantizedInfo, TensorInfo
from sparsefw.errors import InputError, shown

KEY = "quantization_config"

# Entries of a quantization config with the values that they may have. MODULES stands for a list of modules' names.
MODULES = object()
BLOCK = object()
_COMMON = {"modules_to_not_convert": MODULES, "dequantize": (None, True, False)}
ENTRIES: dict[str, dict[str, Any]] = {
    "fp8": {
        **_COMMON,
        "ignored_layers": MODULES,
        "modules_to_convert": MODULES,
        "activation_scheme": (None, "dynamic", "static"),
        "weight_block_size": BLOCK,
        "fmt": (None, "e4m3", "float8_e4m3fn"),
        "scale_fmt": (None, "float", "ue8m0"),
        "expert_dtype": (None, "fp8"),
    },
    "mxfp4": _COMMON,
}
# transformers takes blocks of this size where a config does not say. null means one scale for a matrix.
DEFAULT_BLOCK = (128, 128)
LARGEST_BLOCK = 2**16
# The largest real lists have three names for each of 100 layers; a name is at most as long as that of a tensor.
MAX_MODULES, MAX_NAME = 2**16, 512

# The way out for methods that are not read. Those that are not listed have ORIGINAL alone.
ORIGINAL = "give the unquantized checkpoint that it was made from"
WAYS_OUT = {"compressed-tensors": f"{ORIGINAL}, or dequantize it first with the tool that made it"}

FP8 = torch.float8_e4m3fn
# dtypes in the files of an FP8 checkpoint beside those of others, by their names there.
FP8_DTYPES = {"F8_E4M3": FP8, "F8_E8M0": EXPONENT}
SCALE_DTYPES = {torch.float32, torch.bfloat16, torch.float16, EXPONENT}
# Values (E2M1) that share an exponent in MXFP4, as bytes.
GROUP_BYTES = 16

# dtypes that a quantized model may be written in, the most usual first, and the entries of a config that name one.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPE_KEYS = ("dtype", "torch_dtype")

# Ends of the names of an FP8 weight's scale; the first one may follow the name of any tensor.
SCALE, OTHER_SCALES = "_scale_inv", (".scale", ".qscale_weight")
# Ends of the names of values and scales in MXFP4.
BLOCKS, SCALES = "_blocks", "_scales"
# Scales of activations: nothing is multiplied with them once the weights are not in FP8.
ACTIVATION_SCALE = "activation_scale"


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        method: "fp8" or "mxfp4".
        block: (rows, columns) that share a scale in FP8; None: all of a matrix.
    """

    method: str
    block: tuple[int, int] | None = None

    def share(self, dtype: torch.dtype) -> float:
        """Bytes of a quantized tensor as it is stored, for each byte of it in another dtype."""
        if self.method == "mxfp4":
            return (GROUP_BYTES + 1) / (2 * GROUP_BYTES * dtype.itemsize)
        return (1 + (4 / math.prod(self.block) if self.block else 0)) / dtype.itemsize

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """dtypes in the files beside those of other checkpoints, by their names there."""
        return FP8_DTYPES if self.method == "fp8" else {}


def quantization_of(config: dict[str, Any], path: Path) -> Quantization | None:
    """How a checkpoint with this config is quantized; None if it is not.

    Args:
        config: the content of config.json.
        path: the file's path, for the message.

    Raises:
        InputError: the method is not one that is read, or an entry is not what the method has.
    """
    given = given_in(config)
    if not given:
        return None
    if any(other != given[0] for other in given):
        raise InputError(f"{path}: the text_config is quantized in another way than the rest ({KEY}); remove one")
    return _parsed(given[0], path)


def given_in(config: dict[str, Any]) -> list[Any]:
    """The quantization configs of a config, in the places where transformers looks for them."""
    return [place[KEY] for place in _places(config) if place.get(KEY) is not None]


def _places(config: dict[str, Any]) -> list[dict[str, Any]]:
    text_config = config.get("text_config")
    return [config, text_config] if isinstance(text_config, dict) else [config]


def _parsed(content: Any, path: Path) -> Quantization:
    if not isinstance(content, dict):
        raise InputError(f"{path}: {KEY} is {shown(content)}, not an object; {ORIGINAL}")
    method = content.get("quant_method")
    if method is None and (content.get("load_in_8bit") or content.get("load_in_4bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or method not in ENTRIES:
        # MLX and others name no method.
        name = "an unnamed method" if method is None else shown(method)
        way_out = WAYS_OUT.get(name, ORIGINAL)
        raise InputError(f"{path}: the model is quantized by {name}, which is not read; {way_out} ({KEY})")
    for key, value in content.items():
        if key != "quant_method" and not _is_allowed(ENTRIES[method].get(key, ()), value):
            raise InputError(f"{path}: {key} {shown(value)} is not what {method} has; {ORIGINAL} ({KEY})")
    block = content.get("weight_block_size", DEFAULT_BLOCK)
    return Quantization(method, None if block is None or method != "fp8" else (block[0], block[1]))


def _is_allowed(allowed: Any, value: Any) -> bool:
    if allowed is MODULES:
        names = [] if value is None else value
        return isinstance(names, list) and len(names) <= MAX_MODULES and all(map(_is_name, names))
    if allowed is BLOCK:
        sizes = DEFAULT_BLOCK if value is None else value
        return (
            isinstance(sizes, list | tuple)
            and len(sizes) == 2
            and all(type(size) is int and 0 < size <= LARGEST_BLOCK for size in sizes)
        )
    # In Python 1 equals True.
    return any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and len(name) <= MAX_NAME


def joined(
    stored: dict[str, TensorInfo], quantization: Quantization, config: dict[str, Any], path: Path
) -> tuple[dict[str, TensorInfo], torch.dtype, list[str]]:
    """The tensors of a quantized checkpoint as the model has them.

    Args:
        stored: the tensors in the files.
        quantization: how they are quantized.
        config: the content of config.json, which may name the dtype of the result. Else it is the one that most bytes
            have which are not quantized.
        path: the file's path, for messages.

    Returns:
        The tensors by name, the dtype of the result, and the names of stored tensors that are no part of any: scales of
        activations.

    Raises:
        InputError: scales are missing, or scales or values have a dtype or shape that does not fit.
    """
    join = _join_fp8 if quantization.method == "fp8" else _join_mxfp4
    quantized: dict[str, QuantizedInfo] = {}
    for name in stored:
        if joint := join(stored, name, quantization):
            new = name if quantization.method == "fp8" else name.removesuffix(BLOCKS)
            if new in stored and new != name:
                raise InputError(f"{stored[new].file}: tensor {new} is there quantized ({name}) and not; keep one")
            quantized[new] = joint
    if not quantized:
        raise InputError(f"{path}: {KEY} says {quantization.method}, but no tensor is quantized; remove the entry")
    left_out = [name for name in stored if _is_left_out(name, stored)]
    used = {part for info in quantized.values() for part in info.parts}.union(left_out)
    others = {name: info for name, info in stored.items() if name not in used}
    for name, info in others.items():
        if info.dtype == EXPONENT or (quantization.method == "fp8" and name.endswith(SCALE)):
            raise InputError(f"{info.file}: tensor {name} is a scale, and what it scales is missing; {ORIGINAL}")
    dtype = dtype_in(config) or most_bytes(others.values()) or DTYPES[0]
    return {name: replace(info, dtype=dtype) for name, info in quantized.items()} | others, dtype, left_out


def dtype_in(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype that a config names for the weights; None if it names none that can be pruned."""
    for place in _places(config):
        for key in DTYPE_KEYS:
            for dtype in DTYPES:
                if place.get(key) == str(dtype).removeprefix("torch."):
                    return dtype
    return None


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
    written = sum(info.nbytes for info in infos)
    read = sum(part.nbytes for info in infos for part in info.stored("").values())
    dtype = str(quantized[0].dtype).removeprefix("torch.")
    return (
        f"the source is quantized ({quantization.method}): {len(quantized)} tensors are dequantized and written as "
        f"{dtype}, all tensors take {written / 1e9:.3g} GB instead of {read / 1e9:.3g} GB"
    )


def _is_left_out(name: str, stored: dict[str, TensorInfo]) -> bool:
    """Whether a tensor is the scale of an FP8 weight's input."""
    stem = name.removesuffix(ACTIVATION_SCALE)
    return stem != name and any(
        other in stored and stored[other].dtype == FP8 for other in (f"{stem}weight", stem.removesuffix("_"))
    )


def _join_fp8(stored: dict[str, TensorInfo], name: str, quantization: Quantization) -> QuantizedInfo | None:
    """The tensor whose values are called `name`; None if that is no tensor in FP8."""
    values = stored[name]
    if values.dtype != FP8:
        if scale := _scale_of(name, stored, ()):
            raise InputError(f"{values.file}: tensor {name} has a scale, {scale}, but is not in FP8 ({values.dtype})")
        return None
    scale = _scale_of(name, stored, OTHER_SCALES)
    if scale is None:
        raise InputError(f"{values.file}: tensor {name} is in FP8, and its scale {name}{SCALE} is missing; {ORIGINAL}")
    *lead, rows, columns = values.shape if len(values.shape) >= 2 else (0, 0, 0)
    if not rows or not columns:
        raise InputError(f"{values.file}: tensor {name} is in FP8 and has the shape {values.shape}; {ORIGINAL}")
    height, width = quantization.block or (rows, columns)
    grid = (*lead, -(-rows // height), -(-columns // width))
    scales = stored[scale]
    # One scale for a matrix may have fewer dimensions.
    fewer = {(1,), tuple(lead)} if not lead else {tuple(lead)}
    if scales.shape != grid and not (quantization.block is None and scales.shape in fewer):
        raise InputError(
            f"{scales.file}: tensor {scale} has the shape {scales.shape}, and {name} of shape {values.shape} in blocks "
            f"of {height} x {width} needs {grid}"
        )
    if scales.dtype not in SCALE_DTYPES:
        raise InputError(f"{scales.file}: tensor {scale} has dtype {scales.dtype}, which no scale of FP8 has")
    parts = {name: values, scale: scales}
    return QuantizedInfo(values.file, DTYPES[0], values.shape, name, scale, parts, (height, width))


def _scale_of(name: str, stored: dict[str, TensorInfo], others: tuple[str, ...]) -> str | None:
    """The name of a tensor's scale; None if it has none."""
    stem = name.removesuffix(".weight")
    names = [f"{name}{SCALE}", *(f"{stem}{other}" for other in others if stem != name)]
    return next((candidate for candidate in names if candidate in stored), None)


def _join_mxfp4(stored: dict[str, TensorInfo], name: str, quantization: Quantization) -> QuantizedInfo | None:
    """The tensor whose values are called `name`; None if that is no tensor in MXFP4."""
    values = stored[name]
    if values.dtype != torch.uint8:
        return None
    for own, other in ((BLOCKS, SCALES), (SCALES, BLOCKS)):
        missing = f"{name.removesuffix(own)}{other}"
        if name.endswith(own) and missing not in stored:
            raise InputError(f"{values.file}: tensor {name} is in MXFP4, and {missing} is missing; {ORIGINAL}")
    if not name.endswith(BLOCKS):
        return None
    scale = f"{name.removesuffix(BLOCKS)}{SCALES}"
    scales = stored[scale]
    if len(values.shape) != 4 or values.shape[-1] != GROUP_BYTES or not all(values.shape):
        raise InputError(
            f"{values.file}: tensor {name} has the shape {values.shape}, and MXFP4 has (experts, rows, groups, "
            f"{GROUP_BYTES})"
        )
    if (scales.dtype, scales.shape) != (torch.uint8, values.shape[:-1]):
        raise InputError(
            f"{scales.file}: tensor {scale} has the shape {scales.shape} and dtype {scales.dtype}, and {name} of shape "
            f"{values.shape} needs {values.shape[:-1]} in uint8"
        )
    experts, rows, groups, width = values.shape
    parts = {name: values, scale: scales}
    return QuantizedInfo(values.file, DTYPES[0], (experts, groups * 2 * width, rows), name, scale, parts, None)
