"""Checkpoints with quantized tensors: read in their small form, and refused where they are not well formed."""

import json

import pytest
import torch
from helpers.checkpoints import TENSORS, refused
from helpers.quantized import change_stored, save_fp8, save_mxfp4
from safetensors.torch import load_file, save_file

from sparsefw.checkpoint.evidence import Evidence
from sparsefw.checkpoint.reader import read_tensors
from sparsefw.checkpoint.source import CONFIG, SINGLE, inspect
from sparsefw.checkpoint.tensors import QuantizedTensor, dequantize_fp8
from sparsefw.model import StreamedModel

Q = "model.layers.1.self_attn.q_proj.weight"
Q_SCALE = f"{Q}_scale_inv"
UP = "model.layers.0.mlp.experts.gate_up_proj"


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
