"""Quantized tensors: dequantized as transformers does it, and refused where they are not well formed."""

import json
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import TENSORS, refused
from helpers.quantized import change_stored, fp8, mxfp4, save_fp8, save_mxfp4
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sparsefw.checkpoint import quantization, tensors, trust
from sparsefw.checkpoint.evidence import Evidence
from sparsefw.checkpoint.reader import read_tensors
from sparsefw.checkpoint.source import CONFIG, SINGLE, inspect
from sparsefw.checkpoint.tensors import QuantizedTensor, dequantize_fp8, dequantize_mxfp4
from sparsefw.model import StreamedModel

PATH = Path("config.json")
Q = "model.layers.1.self_attn.q_proj.weight"
Q_SCALE = f"{Q}_scale_inv"
UP = "model.layers.0.mlp.experts.gate_up_proj"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
# Chunks of a few rows, or all rows at once.
CHUNKS = pytest.mark.parametrize("chunk", [1, 200, 2**20])


# The values


@DTYPES
@CHUNKS
def test_fp8_is_what_transformers_makes_of_it(dtype, chunk, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    for shape, block in [((48, 32), (16, 16)), ((48, 32), (24, 8)), ((37, 131), (37, 131))]:
        values, scales = fp8(random(*shape), block)
        expected = Fp8Dequantize(None)._dequantize_one(values, scales, dtype)
        assert torch.equal(bits(dequantize_fp8(values, scales, block, dtype)), bits(expected))
    values, scales = fp8(random(37, 131), None)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, dtype)
    assert torch.equal(bits(dequantize_fp8(values, scales, (37, 131), dtype)), bits(expected))


@CHUNKS
def test_blocks_of_fp8_that_are_smaller_at_the_ends(chunk, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    x = random(37, 131)
    values, scales = fp8(x, (16, 48))
    assert scales.shape == (3, 3)
    result = dequantize_fp8(values, scales, (16, 48), torch.float32)
    for i in range(37):
        for j in range(131):
            assert result[i, j] == values[i, j].float() * scales[i // 16, j // 48]
    assert (result - x).abs().max() < 0.07 * x.abs().max()


class Largest(TorchDispatchMode):
    """Inside the `with` block `entries` becomes that of the largest tensor in fp32 that torch makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.entries = max(self.entries, out.numel())
        return out


@pytest.mark.parametrize("block", [(16, 16), (512, 40), (2**16, 1), (1, 2**16), (2**16, 2**16)])
def test_no_block_of_fp8_takes_memory_of_its_size(block, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", 400)
    values = random(512, 40).to(torch.float8_e4m3fn)
    scales = random(-(-512 // block[0]), -(-40 // block[1])).bfloat16()
    with Largest() as largest:
        result = dequantize_fp8(values, scales, block, torch.bfloat16)
    # Factors are cut to the matrix after they were repeated, and the scales are there in fp32.
    assert largest.entries <= max(2 * 400, scales.numel())
    each = scales.float()[torch.arange(512)[:, None] // block[0], torch.arange(40) // block[1]]
    assert torch.equal(result, (values.float() * each).bfloat16())


def test_stacked_fp8_and_scales_that_are_exponents():
    stacked = [fp8(x, (16, 16)) for x in random(3, 48, 32)]
    values, scales = (torch.stack(part) for part in zip(*stacked, strict=True))
    scales = scales.to(torch.float8_e8m0fnu)
    result = dequantize_fp8(values, scales, (16, 16), torch.bfloat16)
    assert result.shape == (3, 48, 32)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
    assert torch.equal(bits(result), bits(expected))
    one = dequantize_fp8(values, torch.tensor([1.0, 2.0, 4.0]), (48, 32), torch.float32)
    assert torch.equal(one, values.float() * torch.tensor([1.0, 2.0, 4.0])[:, None, None])


@DTYPES
@CHUNKS
def test_mxfp4_is_what_transformers_makes_of_it(dtype, chunk, monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK", chunk)
    x = random(3, 96, 37)
    values, scales = mxfp4(x)
    assert values.shape == (3, 37, 3, 16)
    result = dequantize_mxfp4(values, scales, dtype)
    assert result.shape == x.shape
    assert result.is_contiguous()
    assert torch.equal(bits(result), bits(convert_moe_packed_tensors(values, scales, dtype=dtype)))
    assert (result.float() - x).abs().max() < 0.26 * x.abs().max()
    # All bytes, with the least and the greatest exponents that fit.
    values = torch.arange(256).to(torch.uint8).view(1, 4, 4, 16)
    scales = torch.tensor([0, 1, 100, 127, 128, 139, 140, 251] * 2, dtype=torch.uint8).view(1, 4, 4)
    expected = convert_moe_packed_tensors(values, scales, dtype=dtype)
    assert torch.equal(bits(dequantize_mxfp4(values, scales, dtype)), bits(expected))


# Reading


def test_the_small_form_is_read(tmp_path):
    inspected = inspect(save_fp8(tmp_path, "qwen3"))
    stored = load_file(tmp_path / SINGLE)
    assert inspected.tensors.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    assert inspected.dtype == torch.bfloat16
    assert inspected.tensors[Q].nbytes == 2 * stored[Q].nbytes
    assert inspected.stored_nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert inspected.nbytes == sum(2 * t.numel() for name, t in stored.items() if not name.endswith("_scale_inv"))
    read = read_tensors(inspected.tensors)
    assert isinstance(read[Q], QuantizedTensor)
    assert (read[Q].shape, read[Q].dtype) == (stored[Q].shape, torch.bfloat16)
    assert torch.equal(read[Q].to("cpu"), dequantize_fp8(stored[Q], stored[Q_SCALE], (16, 16), torch.bfloat16))
    # A parameter that is kept in fp32 is not rounded to bf16 before.
    exact = dequantize_fp8(stored[Q], stored[Q_SCALE], (16, 16), torch.float32)
    assert torch.equal(read[Q].to("cpu", torch.float32), exact)
    assert not torch.equal(exact.bfloat16().float(), exact)
    assert torch.equal(read["lm_head.weight"], stored["lm_head.weight"])


@pytest.mark.parametrize("save", [lambda folder: save_fp8(folder, "qwen3"), save_mxfp4])
def test_another_scale_is_found(tmp_path, save):
    folder = save(tmp_path)
    evidence = Evidence(inspect(folder))
    evidence.read(inspect(folder).tensors)
    name = next(name for name in load_file(folder / SINGLE) if name.endswith(("_scale_inv", "_scales")))
    change_stored(folder, lambda tensors: tensors[name].view(-1)[:1].mul_(2))
    assert Evidence(inspect(folder)).find_difference(evidence.take()) == name


def test_scales_of_inputs_are_left_out(tmp_path):
    folder = save_fp8(tmp_path, "qwen3", None, activation_scheme="static")
    names = inspect(folder).tensors.keys()
    scale = Q.replace("weight", "activation_scale")
    change_stored(folder, lambda tensors: tensors.update({scale: torch.tensor(1.0), "activation_scale": torch.ones(1)}))
    # The other one belongs to no weight.
    inspected = inspect(folder)
    assert inspected.tensors.keys() == names | {"activation_scale"}
    assert inspected.left_out == (scale,)
    notes = StreamedModel(inspected, torch.device("cpu")).notes
    assert f"scales of activations are not written: 1, {scale} first" in notes


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_matrix(tmp_path, shape):
    folder = save_fp8(tmp_path, "qwen3", None)
    change_stored(folder, lambda tensors: tensors.update({Q_SCALE: torch.full(shape, 0.5)}))
    read = read_tensors(inspect(folder).tensors)[Q].to(dtype=torch.float32)
    assert torch.equal(read, load_file(folder / SINGLE)[Q].float() / 2)


def test_one_scale_for_each_expert(tmp_path):
    folder = save_fp8(tmp_path, "qwen3", None)
    values = load_file(folder / SINGLE)[Q]
    stack, factors = torch.stack([values, values]), torch.tensor([0.5, 2.0])
    change_stored(folder, lambda tensors: tensors.update(x=stack, x_scale_inv=factors))
    read = read_tensors(inspect(folder).tensors)["x"].to(dtype=torch.float32)
    assert torch.equal(read, values.float() * factors[:, None, None])
    change_stored(folder, lambda tensors: tensors.update(x_scale_inv=torch.tensor(1.0)))
    with refused(r"tensor x_scale_inv has the shape \(\), and x of shape \(2, 32, 32\) .* needs \(2, 1, 1\)"):
        inspect(folder)


@pytest.mark.parametrize("name", ["scale", "qscale_weight"])
def test_other_names_of_scales(tmp_path, name):
    folder = save_fp8(tmp_path, "qwen3")
    before = inspect(folder).tensors.keys()
    change_stored(folder, lambda tensors: tensors.update({Q.replace("weight", name): tensors.pop(Q_SCALE)}))
    assert inspect(folder).tensors.keys() == before


@pytest.mark.parametrize(
    ("named", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float8_e4m3fn", torch.bfloat16),
        (None, torch.bfloat16),
    ],
)
def test_the_dtype_that_the_config_names(tmp_path, named, dtype):
    folder = save_fp8(tmp_path, "qwen3")
    content = json.loads((folder / CONFIG).read_text()) | {"dtype": named}
    (folder / CONFIG).write_text(json.dumps(content))
    assert inspect(folder).dtype == inspect(folder).tensors[Q].dtype == dtype


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_SCALE), rf"tensor {Q} is in FP8, and its scale {Q_SCALE} is missing"),
        (
            lambda t: t.update({Q_SCALE: torch.ones(2, 3)}),
            rf"tensor {Q_SCALE} has the shape \(2, 3\), and {Q} of shape \(32, 32\) in blocks of 16 x 16 needs "
            r"\(2, 2\)",
        ),
        (lambda t: t.update({Q_SCALE: torch.ones(())}), rf"tensor {Q_SCALE} has the shape \(\), and .* needs \(2, 2\)"),
        (
            lambda t: t.update({Q_SCALE: torch.ones(2, 2, dtype=torch.uint8)}),
            rf"tensor {Q_SCALE} has dtype torch.uint8, which no scale of FP8 has",
        ),
        (
            lambda t: t.update({Q: t[Q].bfloat16()}),
            rf"tensor {Q} has a scale, {Q_SCALE}, but is not in FP8 \(torch.bfloat16\)",
        ),
        (
            lambda t: t.update({Q: t[Q].view(-1)}),
            rf"tensor {Q} is in FP8 and has the shape \(1024,\)",
        ),
        (
            lambda t: t.update({"x.scale": torch.ones(1).to(torch.float8_e8m0fnu)}),
            "tensor x.scale is a scale, and what it scales is missing",
        ),
        (
            lambda t: t.update({"x.weight_scale_inv": torch.ones(1)}),
            "tensor x.weight_scale_inv is a scale, and what it scales is missing",
        ),
        (
            lambda t: t.update({"x": torch.ones(1).to(torch.float8_e5m2)}),
            "tensor x has dtype F8_E5M2; give a checkpoint in fp32, fp16 or bf16",
        ),
    ],
)
def test_fp8_that_is_not_well_formed(tmp_path, change, message):
    folder = save_fp8(tmp_path, "qwen3")
    change_stored(folder, change)
    with refused(rf"{SINGLE}: {message}"):
        inspect(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}_scales"), rf"tensor {UP}_blocks is in MXFP4, and {UP}_scales is missing"),
        (lambda t: t.pop(f"{UP}_blocks"), rf"tensor {UP}_scales is in MXFP4, and {UP}_blocks is missing"),
        (
            lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][:, 1:]}),
            rf"tensor {UP}_scales has the shape \(4, 127, 1\) and dtype torch.uint8, and .* needs \(4, 128, 1\) in",
        ),
        (
            lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].float()}),
            rf"tensor {UP}_scales has the shape \(4, 128, 1\) and dtype torch.float32, and .* in uint8",
        ),
        (
            lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"].view(4, 128, 2, 8)}),
            rf"tensor {UP}_blocks has the shape \(4, 128, 2, 8\), and MXFP4 has \(experts, rows, groups, 16\)",
        ),
        (
            lambda t: t.update(x_blocks=torch.ones(1, 4, 0, 16).byte(), x_scales=torch.ones(1, 4, 0).byte()),
            r"tensor x_blocks has the shape \(1, 4, 0, 16\), and MXFP4 has",
        ),
        (lambda t: t.update({UP: torch.ones(1)}), rf"tensor {UP} is there quantized \({UP}_blocks\) and not; keep one"),
    ],
)
def test_mxfp4_that_is_not_well_formed(tmp_path, change, message):
    folder = save_mxfp4(tmp_path)
    change_stored(folder, change)
    with refused(rf"{SINGLE}: {message}"):
        inspect(folder)


def test_scales_that_are_not_finite(tmp_path):
    folder = save_fp8(tmp_path / "fp8", "qwen3")
    change_stored(folder, lambda tensors: tensors[Q_SCALE].view(-1)[1:3].copy_(torch.tensor([torch.nan, torch.inf])))
    with refused(rf"^{Q_SCALE}: holds 1 NaN and 1 Inf among 4 values; finite ones are needed$"):
        read_tensors(inspect(folder).tensors)
    folder = save_mxfp4(tmp_path / "mxfp4")
    change_stored(folder, lambda tensors: tensors[f"{UP}_scales"].view(-1)[1:2].fill_(255))
    with refused(rf"^{UP}_scales: holds 1 NaN and 0 Inf among 512 values; finite ones are needed$"):
        read_tensors(inspect(folder).tensors)


def test_a_config_that_is_wrong_about_its_tensors(folder):
    config = {"quantization_config": {"quant_method": "fp8"}}
    (folder / CONFIG).write_text(json.dumps(config))
    with refused("config.json: quantization_config says fp8, but no tensor is quantized; remove the entry"):
        inspect(folder)
    save_file(TENSORS | {"odd": torch.ones(2, 2).to(torch.float8_e4m3fn)}, folder / SINGLE)
    (folder / CONFIG).write_text("{}")
    with refused("tensor odd has dtype F8_E4M3; give a checkpoint in fp32, fp16 or bf16"):
        inspect(folder)


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({"quant_method": "\x1b[31m"}, r"\\x1b\[31m"),
        ({"quant_method": ["fp8"]}, r"\['fp8'\]"),
        ({"group_size": 64, "bits": 4}, "an unnamed method"),
    ],
)
def test_other_methods(content, name, inner):
    config = {"quantization_config": content}
    with refused(
        rf"^config.json: the model is quantized by {name}, which is not read; "
        r"give the unquantized checkpoint that it was made from \(quantization_config\)$"
    ):
        quantization.quantization_of({"text_config": config} if inner else config, PATH)


def test_compressed_tensors():
    for config in (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        {"compression_config": {"format": "x"}},
    ):
        with refused(r"^config.json: .*compressed-tensors.*, or dequantize it first with the tool that made it \("):
            trust.check_config(config, PATH)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
@pytest.mark.parametrize(
    "entry",
    [
        {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]},
        {"weight_block_size": [128, True]},
        {"weight_block_size": [128, 10**9]},
        {"weight_block_size": "128"},
        {"weight_block_size": {"0": 1}},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": [1]},
        {"modules_to_not_convert": ["x" * 1000]},
        {"modules_to_not_convert": ["\x1b[31m"]},
        {"ignored_layers": {}},
        {"activation_scheme": "other"},
        {"expert_dtype": "fp4"},
        {"scale_fmt": 1},
        {"dequantize": 1},
        {"dequantize": "org/name"},
        {"modules_to_import": ["os"]},
        {"_name_or_path": "x"},
    ],
)
def test_entries_that_no_real_config_has(method, entry):
    with refused(
        rf"^config.json: {next(iter(entry))} .* is not what {method} has; .* \(quantization_config\)$"
    ) as caught:
        trust.check_config({"quantization_config": {"quant_method": method} | entry}, PATH)
    assert str(caught.value).isprintable()


REAL = [
    {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128], "ignored_layers": None},
    {
        **{"quant_method": "fp8", "activation_scheme": "static", "dequantize": False, "weight_block_size": None},
        **{"modules_to_not_convert": ["model.vision_tower", "lm_head"]},
    },
    {"quant_method": "fp8", "fmt": "float8_e4m3fn", "modules_to_not_convert": ["gate"]},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
]


@pytest.mark.parametrize("content", REAL)
def test_real_configs(content):
    for config in ({"quantization_config": content}, {"text_config": {"quantization_config": content}}):
        trust.check_config(config, PATH)
        parsed = quantization.quantization_of(config, PATH)
        block = content.get("weight_block_size", (128, 128)) if content["quant_method"] == "fp8" else None
        assert (parsed.method, parsed.block) == (content["quant_method"], block and tuple(block))


def test_quantized_in_other_places():
    with refused(r"^config.json: a part of the model is quantized by itself; .* \(quantization_config\)$"):
        trust.check_config({"vision_config": {"quantization_config": REAL[0]}}, PATH)
    with refused("^config.json: the text_config is quantized in another way than the rest"):
        trust.check_config({"quantization_config": REAL[0], "text_config": {"quantization_config": REAL[2]}}, PATH)
    with refused("^config.json: quantization_config is fp8, not an object"):
        trust.check_config({"quantization_config": "fp8"}, PATH)
    assert quantization.quantization_of({"quantization_config": None}, PATH) is None
