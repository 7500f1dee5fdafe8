"""Tiny quantized checkpoints, made from plain ones by the public formats, and what transformers makes of them."""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import torch
from helpers.commands import tensors_of
from helpers.families import change_config, save_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.quantizers import quantizer_finegrained_fp8

from sparsefw.checkpoint.source import CONFIG, INDEX, SINGLE

FP8 = torch.float8_e4m3fn
# Matrices that FP8 checkpoints hold in FP8; routers, embeddings and the head are left.
MATRICES = re.compile(r"layers\.\d+\..*_proj(_with_mqa)?\.weight|layers\.\d+\..*_[ab]_proj\.weight")


def save_fp8(folder: Path, family: str, block: tuple[int, int] | None = (16, 16), **entries) -> Path:
    """A checkpoint in FP8; `entries` go into its quantization config."""
    save_model(folder, family, torch.bfloat16)
    tensors = {}
    for name, tensor in tensors_of(folder).items():
        if MATRICES.search(name):
            values, scales = fp8(tensor.float(), block)
            tensors |= {name: values, f"{name}_scale_inv": scales}
        else:
            tensors[name] = tensor
    content = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block and list(block)}
    content |= {"activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
    return _replace(folder, tensors, content | entries)


def save_mxfp4(folder: Path) -> Path:
    """A checkpoint of gpt-oss with experts in MXFP4."""
    save_model(folder, "gpt_oss", torch.bfloat16)
    tensors = {}
    for name, tensor in tensors_of(folder).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            values, scales = mxfp4(tensor.float())
            tensors |= {f"{name}_blocks": values, f"{name}_scales": scales}
        else:
            tensors[name] = tensor
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _replace(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})


def fp8(x: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """Values in FP8 of a matrix, and their scales: one for each block, the last of which may be smaller."""
    if block is None:
        scale = x.abs().amax() / 448
        return (x / scale).to(FP8), scale
    rows, columns = (-(-n // b) for n, b in zip(x.shape, block, strict=True))
    scales = torch.zeros(rows, columns)
    values = torch.zeros(x.shape, dtype=FP8)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = x[part].abs().amax() / 448
            values[part] = (x[part] / scales[i, j]).to(FP8)
    return values, scales


def mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """Packed values (experts, out, groups, 16) and exponents (experts, out, groups) of x (experts, in, out)."""
    groups = x.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1) / 6)) + 1
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    bits = (groups.unsqueeze(-1) / torch.exp2(exponents)[..., None, None] - table).abs().argmin(-1).to(torch.uint8)
    return bits[..., 0::2] | bits[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def dequantized(source: Path, folder: Path) -> Path:
    """The checkpoint that transformers dequantizes and saves, with the source's tokenizer."""
    method = json.loads((source / CONFIG).read_text())["quantization_config"]["quant_method"]
    config = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method](dequantize=True)
    # It asks for accelerate, and needs nothing of it.
    with mock.patch.object(quantizer_finegrained_fp8, "is_accelerate_available", return_value=True):
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    # Before 5.22 it saved the names of the quantized tensors.
    vars(model).pop("_weight_conversions", None)
    model.save_pretrained(folder)
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def change_stored(folder: Path, change) -> None:
    """Change the tensors in the files of a checkpoint."""
    tensors = tensors_of(folder)
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def _replace(folder: Path, tensors: dict[str, Tensor], quantization: dict) -> Path:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    change_config(folder, quantization_config=quantization)
    return folder
