"""Checkpoints with quantized tensors: read in their small form, and refused where they are not well formed."""

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import TENSORS, refused
from helpers.quantized import change_stored, save_fp8, save_mxfp4
from safetensors.torch import load_file, save_file

from sparsefw.checkpoint.quantization import Fp8, Mxfp4, Packed, quantization_of, without_quantization
from sparsefw.checkpoint.source import CONFIG, SINGLE, inspect
from sparsefw.checkpoint.tensors import QuantizedTensor, read_tensors

Q = "model.layers.1.self_attn.q_proj.weight"
Q_SCALE = f"{Q}_scale_inv"
UP = "model.layers.0.mlp.experts.gate_up_proj"
PATH = Path("config.json")


class TestConfigs:
    @pytest.mark.parametrize("inner", [False, True])
    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ({"quant_method": "fp8", "weight_block_size": [64, 32], "fmt": "e4m3"}, Fp8((64, 32))),
            ({"quant_method": "fp8", "modules_to_not_convert": None}, Fp8((128, 128))),
            ({"quant_method": "fp8", "weight_block_size": None}, Fp8()),
            ({"quant_method": "mxfp4"}, Mxfp4()),
            ({"quant_method": "sparsefw", "format": 1, "kept": 0.5}, Packed(0.5)),
            (None, None),
        ],
    )
    def test_that_are_read(self, content, expected, inner):
        config = {"quantization_config": content}
        assert quantization_of({"text_config": config} if inner else config, PATH) == expected

    @pytest.mark.parametrize("method", ["gptq", "\x1b[31m", ["fp8"], None])
    def test_of_other_methods(self, method):
        with refused("config.json: the model is quantized by .*, which is not read; give the unquantized checkpoint"):
            quantization_of({"quantization_config": {"quant_method": method}}, PATH)

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("fp8", "the model is quantized by an unnamed method"),
            *[
                ({"quant_method": "fp8", "weight_block_size": size}, "weight_block_size is .*, and not two positive")
                for size in (128, "128x128", [128], [0, 0], [64, 32, 2], [1.5, 2])
            ],
            ({"quant_method": "sparsefw", "format": 2, "kept": 0.5}, "packed in format 2: update sparsefw"),
            ({"quant_method": "sparsefw", "kept": 0.5}, "packed in format None"),
            ({"quant_method": "sparsefw", "format": 1}, "kept is None"),
        ],
    )
    def test_that_are_wrong(self, content, problem):
        with refused(f"config.json: .*{problem}"):
            quantization_of({"quantization_config": content}, PATH)

    @pytest.mark.parametrize(("dtype", "kept"), [("bfloat16", {"dtype": "bfloat16"}), ("float8_e4m3fn", {})])
    def test_what_is_written(self, dtype, kept):
        given = {"quantization_config": {"quant_method": "fp8"}, "dtype": dtype, "x": 1}
        assert without_quantization({"text_config": given, "y": 2}) == {"text_config": {"x": 1} | kept, "y": 2}
        assert without_quantization({"dtype": dtype}) == {"dtype": dtype}


def test_the_small_form_is_read(tmp_path):
    inspected = inspect(save_fp8(tmp_path, "qwen3"))
    stored = load_file(tmp_path / SINGLE)
    assert inspected.tensors.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    assert inspected.dtype == torch.bfloat16
    assert sum(x.stored_nbytes for x in inspected.tensors.values()) == sum(x.nbytes for x in stored.values())
    assert inspected.nbytes == sum(2 * t.numel() for name, t in stored.items() if not name.endswith("_scale_inv"))
    read = read_tensors(inspected.tensors)
    assert isinstance(read[Q], QuantizedTensor)
    assert (read[Q].shape, read[Q].dtype) == (stored[Q].shape, torch.bfloat16)
    assert torch.equal(read[Q].to("cpu"), Fp8((16, 16)).dequantize(stored[Q], stored[Q_SCALE], torch.bfloat16))
    # A parameter that is kept in fp32 is not rounded to bf16 before.
    exact = Fp8((16, 16)).dequantize(stored[Q], stored[Q_SCALE], torch.float32)
    assert torch.equal(read[Q].to("cpu", torch.float32), exact)
    assert not torch.equal(exact.bfloat16().float(), exact)


def test_scales_of_inputs_are_left_out(tmp_path):
    folder = save_fp8(tmp_path, "qwen3", None, activation_scheme="static")
    names = inspect(folder).tensors.keys()
    scale = Q.replace("weight", "activation_scale")
    change_stored(folder, lambda tensors: tensors.update({scale: torch.tensor(1.0), "activation_scale": torch.ones(1)}))
    # The other one belongs to no weight.
    assert inspect(folder).tensors.keys() == names | {"activation_scale"}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_matrix(tmp_path, shape):
    """Of a stack of matrices, each has one."""
    folder, factors = save_fp8(tmp_path, "qwen3", None), torch.tensor([0.5, 2.0])
    values = load_file(folder / SINGLE)[Q]
    scales = {Q_SCALE: torch.full(shape, 0.5), "x": torch.stack([values, values]), "x_scale_inv": factors}
    change_stored(folder, lambda tensors: tensors.update(scales))
    read = read_tensors(inspect(folder).tensors)
    assert torch.equal(read[Q].to(dtype=torch.float32), values.float() / 2)
    assert torch.equal(read["x"].to(dtype=torch.float32), values.float() * factors[:, None, None])
    change_stored(folder, lambda tensors: tensors.update(x_scale_inv=torch.tensor(1.0)))
    with refused(r"tensor x_scale_inv of shape \(\) .* does not fit x .* need \(2, 1, 1\)"):
        inspect(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_SCALE), rf"tensor {Q} is quantized .fp8., and {Q_SCALE} is missing"),
        (
            lambda t: t.update({Q_SCALE: torch.ones(2, 3)}),
            r"blocks of 16 x 16 need \(2, 2\)",
        ),
        (lambda t: t.update({Q_SCALE: torch.ones(2, 2, dtype=torch.uint8)}), "dtype torch.uint8 does not fit"),
        (lambda t: t.update({Q: t[Q].bfloat16()}), rf"tensor {Q} has a scale, {Q_SCALE}, but is not in FP8"),
        (lambda t: t.update({"x": torch.ones(1).to(torch.float8_e5m2)}), "tensor x has dtype F8_E5M2"),
        (lambda t: t.pop(f"{UP}_scales"), rf"tensor {UP}_blocks is quantized .mxfp4., and {UP}_scales is missing"),
        (
            lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"][:, 1:]}),
            rf"tensor {UP}_scales of shape \(4, 127, 1\) .* does not fit",
        ),
        (
            lambda t: t.update({f"{UP}_scales": t[f"{UP}_scales"].float()}),
            f"tensor {UP}_scales .* dtype torch.float32 does not fit",
        ),
    ],
)
def test_what_is_not_well_formed(tmp_path, change, message):
    """FP8, and experts in MXFP4."""
    folder = save_mxfp4(tmp_path) if UP in message else save_fp8(tmp_path, "qwen3")
    change_stored(folder, change)
    with refused(rf"{SINGLE}: .*{message}"):
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
    (folder / CONFIG).write_text('{"quantization_config": {"quant_method": "fp8"}}')
    with refused("config.json: quantization_config says fp8, but no tensor is quantized; remove the entry"):
        inspect(folder)
    save_file(TENSORS | {"odd": torch.ones(2, 2).to(torch.float8_e4m3fn)}, folder / SINGLE)
    (folder / CONFIG).write_text("{}")
    with refused("tensor odd has dtype F8_E4M3; give a checkpoint in fp32, fp16 or bf16"):
        inspect(folder)
