"""Quantized checkpoints: which formats are read, and how the tensors in the files make the tensors of the model.

A quantized tensor is two tensors in the files: its values, and scales that multiply them. Supported are FP8 as in
DeepSeek-V3 and Qwen3, MXFP4 as in gpt-oss, and packed matrices, which store a mask in place of scales (see `packed`).
All other methods are refused. A tensor is dequantized where it is used (see `tensors`), and what a run writes is not
quantized.
"""

import copy
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefw.checkpoint import packed
from sparsefw.checkpoint.packed import MASK
from sparsefw.checkpoint.tensors import EXPONENT, Infos, TensorInfo
from sparsefw.errors import InputError, shown

KEY = "quantization_config"
# transformers reads the name of the weights' file under this key. If the value is no file, transformers cannot load a
# packed folder, unless the quantizer of sparsefw removes the key.
GUARD = "transformers_weights"
# The block size of transformers if a config names none. `weight_block_size: null` means one scale for a matrix.
DEFAULT_BLOCK = (128, 128)
# The remedy where a checkpoint is not read.
ORIGINAL = "give the unquantized checkpoint that it was made from"

FP8 = torch.float8_e4m3fn
# The dtypes that occur only in quantized checkpoints, by their names in safetensors.
FP8_DTYPES = {"F8_E4M3": FP8, "F8_E8M0": EXPONENT}
SCALE_DTYPES = {torch.float32, torch.bfloat16, torch.float16, EXPONENT}
# Suffixes of an FP8 scale's name. SCALE follows the full name of a tensor; OTHER_SCALES replace `.weight`.
SCALE, OTHER_SCALES = "_scale_inv", (".scale", ".qscale_weight")
ACTIVATION_SCALE = "activation_scale"

# Values of a 4-bit float with one mantissa bit (E2M1), by its bits.
FP4_VALUES = [sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
# Bytes of a group of 4-bit floats that share an exponent.
GROUP_BYTES = 16
# Ends of the names of values and scales in MXFP4.
BLOCKS, SCALES = "_blocks", "_scales"

# dtypes that a quantized model may be written in, the most usual first, and the entries of a config that name one.
MODEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPE_KEYS = ("dtype", "torch_dtype")

# Most entries that are dequantized at once, by type of device, and the bytes that each of them takes meanwhile. On a
# GPU every chunk costs some launches.
CHUNK = {"cpu": 2**20, "cuda": 2**24}
BYTES_OF_CHUNK = 12


# The shape of a quantized tensor in the model, () if its scales do not fit its values; and what would fit, in words.
Fit = tuple[tuple[int, ...], str]


# The name of a quantized tensor in the model, and the name of its scales; None: the tensor is not quantized.
Found = tuple[str, str] | None


@dataclass(frozen=True)
class Fp8:
    """Values in FP8, with a scale for each block of a matrix.

    Attributes:
        block: (rows, columns) of a block; None: a matrix has one scale.
    """

    block: tuple[int, int] | None = None
    method = "fp8"
    form = "quantized (fp8)"

    def share(self, dtype: torch.dtype) -> float:
        """Return the stored bytes of a tensor for each byte that it has in another dtype."""
        return (1 + (4 / math.prod(self.block) if self.block else 0)) / dtype.itemsize

    def find(self, stored: Infos, name: str) -> Found:
        """Return the name in the model, and the name of the scales, of a tensor in FP8; None if it is in no FP8.

        Raises:
            InputError: a tensor that is not in FP8 has scales.
        """
        stem = name.removesuffix(".weight")
        scales = [f"{name}{SCALE}", *(f"{stem}{other}" for other in OTHER_SCALES if stem != name)]
        dtype = stored[name].dtype
        if dtype == FP8:
            return name, next((scale for scale in scales if scale in stored), scales[0])
        if scales[0] in stored:
            raise InputError(
                f"{stored[name].file}: tensor {name} has a scale, {scales[0]}, but is not in FP8 ({dtype})"
            )
        return None

    def fit(self, values: TensorInfo, scales: TensorInfo) -> Fit:
        """Find the shape of a tensor with these scales."""
        shape = values.shape
        if len(shape) < 2 or not all(shape):
            return (), "FP8 has matrices"
        *lead, rows, columns = shape
        height, width = self.block or (rows, columns)
        grid = (*lead, -(-rows // height), -(-columns // width))
        # One scale for a matrix may have fewer dimensions.
        fewer = [] if self.block else [tuple(lead)] if lead else [(), (1,)]
        fits = scales.shape in (grid, *fewer) and scales.dtype in SCALE_DTYPES
        return shape if fits else (), f"blocks of {height} x {width} need {grid} in floating point"

    def dequantize(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply every block of values by its scale in fp32, and round once.

        transformers does the same, but divides the size of the matrix by the number of scales to get the block size.
        That is wrong where the last blocks are smaller, as in DeepSeek-V3.

        Args:
            values: (..., rows, columns) in FP8.
            scales: (..., blocks of rows, blocks of columns), or one for each matrix; any floating dtype.
            dtype: dtype of the result.
        """
        rows, columns = values.shape[-2:]
        height, width = self.block or (rows, columns)
        matrices = values.reshape(-1, rows, columns)
        grids = scales.float().reshape(len(matrices), -(-rows // height), -(-columns // width))
        out = torch.empty(matrices.shape, dtype=dtype, device=values.device)
        step = max(1, CHUNK[values.device.type] // columns)
        row_blocks = torch.arange(rows, device=values.device) // height
        column_blocks = torch.arange(columns, device=values.device) // width
        for matrix, grid, result in zip(matrices, grids, out, strict=True):
            for first in range(0, rows, step):
                chunk = matrix[first : first + step].float()
                factors = grid[row_blocks[first : first + step]][:, column_blocks]
                result[first : first + step] = chunk.mul_(factors)
        return out.reshape(values.shape)


@dataclass(frozen=True)
class Mxfp4:
    """4-bit floats, with an exponent for each group of 32. A tensor holds the matrices of all experts."""

    method = "mxfp4"
    form = "quantized (mxfp4)"

    def share(self, dtype: torch.dtype) -> float:
        """Return the stored bytes of a tensor for each byte that it has in another dtype."""
        return (GROUP_BYTES + 1) / (2 * GROUP_BYTES * dtype.itemsize)

    def find(self, stored: Infos, name: str) -> Found:
        """Return the name in the model, and the name of the exponents, of a tensor in MXFP4; None if it is in none."""
        joint = name.removesuffix(BLOCKS)
        return (joint, f"{joint}{SCALES}") if joint != name and stored[name].dtype == torch.uint8 else None

    def fit(self, values: TensorInfo, scales: TensorInfo) -> Fit:
        """Find the shape of a tensor with these exponents."""
        needs = f"MXFP4 has (experts, rows, groups, {GROUP_BYTES}) and a byte a group"
        sound = len(values.shape) == 4 and values.shape[-1] == GROUP_BYTES and all(values.shape)
        if not sound or (scales.dtype, scales.shape) != (torch.uint8, values.shape[:-1]):
            return (), needs
        experts, rows, groups, width = values.shape
        return (experts, groups * 2 * width, rows), needs

    def dequantize(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply every group of floats by its power of two, and transpose the matrices as the model needs them.

        Args:
            values: (experts, rows, groups, bytes of a group) uint8. A byte holds two floats, the first in the lower
                bits.
            scales: (experts, rows, groups) uint8 exponents.
            dtype: dtype of the result.

        Returns:
            (experts, columns, rows), contiguous.
        """
        experts, rows, groups, width = values.shape
        table = torch.tensor(FP4_VALUES, device=values.device)
        out = torch.empty((experts, groups * 2 * width, rows), dtype=dtype, device=values.device)
        step = max(1, CHUNK[values.device.type] // (groups * 2 * width))
        for stored, exponents, result in zip(values, scales, out, strict=True):
            for first in range(0, rows, step):
                chunk = stored[first : first + step]
                floats = table[torch.stack([chunk & 0xF, chunk >> 4], -1).int()]
                powers = exponents[first : first + step].view(EXPONENT).float()
                floats = floats.reshape(len(chunk), groups, 2 * width) * powers.unsqueeze(-1)
                result[:, first : first + step] = floats.reshape(len(chunk), -1).T
        return out


@dataclass(frozen=True)
class Packed:
    """Matrices without their zeros, with a mask in place of scales, see `packed`.

    Attributes:
        kept: fraction of the weights that a matrix keeps.
    """

    kept: float
    method = "sparsefw"
    form = "packed"

    def share(self, dtype: torch.dtype) -> float:
        """Return the stored bytes of a tensor for each byte that it has unpacked."""
        return self.kept + 1 / (8 * dtype.itemsize)

    def find(self, stored: Infos, name: str) -> Found:
        """Return the name of a packed matrix, and the name of its mask; None if the tensor is not packed."""
        return (name, name + MASK) if name + MASK in stored else None

    def fit(self, values: TensorInfo, scales: TensorInfo) -> Fit:
        """Find the shape of a matrix with this mask."""
        lead, width = scales.shape[:-1], scales.shape[-1:]
        sound = scales.dtype == torch.uint8 and bool(lead) and values.dtype.is_floating_point
        sound = sound and bool(values.shape) and values.shape in ((*lead, values.shape[-1]), values.shape[-1:])
        shape = (*lead, 8 * width[0]) if sound else ()
        return shape, "a mask has a row for each row, and a byte for 8 columns"

    def dequantize(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Put the zeros back into a matrix."""
        return packed.unpack(values, scales).to(dtype)


# A format: `method` is its name in a config, and `form` what messages call its tensors.
Quantization = Fp8 | Mxfp4 | Packed


def quantization_of(config: dict[str, Any], path: Path) -> Quantization | None:
    """Read from a config how its checkpoint is quantized; None if it is not.

    Args:
        config: the content of config.json.
        path: the file's path, for the message.

    Raises:
        InputError: checkpoints of this method or format are not read, or one of its settings is wrong.
    """
    content = next((section[KEY] for section in _sections(config) if section.get(KEY) is not None), None)
    if content is None:
        return None
    content = content if isinstance(content, dict) else {}
    method = content.get("quant_method", "an unnamed method")
    if method == Fp8.method:
        match content.get("weight_block_size", DEFAULT_BLOCK):
            case None:
                return Fp8(None)
            case [int(height), int(width)] if height > 0 and width > 0:
                return Fp8((height, width))
            case block:
                raise InputError(f"{path}: weight_block_size is {shown(block)}, and not two positive integers ({KEY})")
    if method == Mxfp4.method:
        return Mxfp4()
    if method == Packed.method:
        if (found := content.get("format")) != packed.FORMAT:
            raise InputError(f"{path}: the checkpoint is packed in format {shown(found)}: update sparsefw")
        if not isinstance(kept := content.get("kept"), float):
            raise InputError(f"{path}: kept is {shown(kept)}, and not a fraction ({KEY})")
        return Packed(kept)
    raise InputError(f"{path}: the model is quantized by {shown(method)}, which is not read; {ORIGINAL} ({KEY})")


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """List the parts of a config in which transformers looks for a quantization config."""
    text_config = config.get("text_config")
    return [config, text_config] if isinstance(text_config, dict) else [config]


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the same model without quantization."""
    if not any(section.get(KEY) is not None for section in _sections(config)):
        return config
    config = copy.deepcopy(config)
    config.pop(GUARD, None)
    named = dtype_in(config)
    for section in _sections(config):
        # A dtype such as fp8 is removed, too: transformers would cast the weights to it.
        for key in (KEY, *(() if named else DTYPE_KEYS)):
            section.pop(key, None)
    return config


def joined(stored: Infos, quantization: Quantization, config: dict[str, Any], path: Path) -> tuple[Infos, torch.dtype]:
    """Join the tensors in the files of a quantized checkpoint to the tensors of the model.

    Args:
        stored: the tensors in the files. Scales of activations are dropped.
        quantization: the format.
        config: the content of config.json. If it names a dtype, the dequantized tensors have it. Otherwise they have
            the dtype that most bytes of the unquantized tensors have.
        path: the file's path, for messages.

    Returns:
        The tensors by name, and the dtype of the model.

    Raises:
        InputError: no tensor is quantized, scales are missing, or scales or values have a wrong dtype or shape.
    """
    quantized: Infos = {}
    for name, values in stored.items():
        if found := quantization.find(stored, name):
            joint, scale = found
            if scale not in stored:
                raise InputError(
                    f"{values.file}: tensor {name} is {quantization.form}, and {scale} is missing; {ORIGINAL}"
                )
            scales = stored[scale]
            shape, needs = quantization.fit(values, scales)
            if not shape:
                raise InputError(
                    f"{scales.file}: tensor {scale} of shape {scales.shape} and dtype {scales.dtype} does not fit "
                    f"{name} of shape {values.shape}; {needs}"
                )
            parts = {name: values, scale: scales}
            quantized[joint] = replace(values, shape=shape, dequantize=quantization.dequantize, parts=parts)
    if not quantized:
        raise InputError(f"{path}: {KEY} says {quantization.method}, but no tensor is quantized; remove the entry")
    used = {part for info in quantized.values() for part in info.parts}
    used |= {name for name in stored if _scales_activations(name, stored)}
    others = {name: info for name, info in stored.items() if name not in used}
    if isinstance(quantization, Packed):
        return quantized | others, most_bytes([*quantized.values(), *others.values()]) or MODEL_DTYPES[0]
    dtype = dtype_in(config) or most_bytes(others.values()) or MODEL_DTYPES[0]
    return {name: replace(info, dtype=dtype) for name, info in quantized.items()} | others, dtype


def dtype_in(config: dict[str, Any]) -> torch.dtype | None:
    """Read the dtype that a config names for the weights; None if it names none of MODEL_DTYPES."""
    named = [section.get(key) for section in _sections(config) for key in DTYPE_KEYS]
    return next((dtype for name in named for dtype in MODEL_DTYPES if f"torch.{name}" == str(dtype)), None)


def most_bytes(tensors: Iterable[TensorInfo]) -> torch.dtype | None:
    """Find the floating dtype that most bytes have; None if no tensor is floating."""
    bytes_of: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.dtype.is_floating_point:
            bytes_of[tensor.dtype] += tensor.nbytes
    return bytes_of.most_common(1)[0][0] if bytes_of else None


def note(infos: Collection[TensorInfo], quantization: Quantization | None) -> str:
    """Describe the dequantized tensors of a model in one line; empty if there is none."""
    quantized = [info for info in infos if info.dequantize]
    if not quantized or quantization is None:
        return ""
    written, read = sum(info.nbytes for info in infos), sum(info.stored_nbytes for info in infos)
    dtype = str(quantized[0].dtype).removeprefix("torch.")
    return (
        f"the source is {quantization.form}: {len(quantized)} tensors are converted to {dtype}, all tensors take "
        f"{written / 1e9:.3g} GB instead of {read / 1e9:.3g} GB"
    )


def _scales_activations(name: str, stored: Infos) -> bool:
    """Tell whether a tensor is the scale of an FP8 weight's input, which a dequantized weight does not need."""
    stem = name.removesuffix(ACTIVATION_SCALE)
    weights = [stored[other] for other in (f"{stem}weight", stem.removesuffix("_")) if other in stored]
    return stem != name and any(weight.dtype == FP8 for weight in weights)
