"""Quantized tensors are dequantized as transformers does it, and better where blocks are smaller at the ends."""

import pytest
import torch
from helpers.quantized import fp8, mxfp4
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sparsefw.checkpoint import quantization
from sparsefw.checkpoint.quantization import Fp8, Mxfp4


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
# Chunks of a few rows, or all rows at once.
CHUNKS = pytest.mark.parametrize("chunk", [1, 200, 2**20])


@DTYPES
@CHUNKS
def test_fp8_is_what_transformers_makes_of_it(dtype, chunk, monkeypatch):
    monkeypatch.setitem(quantization.CHUNK, "cpu", chunk)
    for shape, block in [((48, 32), (16, 16)), ((48, 32), (24, 8)), ((37, 131), (37, 131)), ((37, 131), None)]:
        values, scales = fp8(random(*shape), block)
        expected = Fp8Dequantize(None)._dequantize_one(values, scales, dtype)
        assert torch.equal(bits(Fp8(block or shape).dequantize(values, scales, dtype)), bits(expected))


@CHUNKS
def test_blocks_of_fp8_that_are_smaller_at_the_ends(chunk, monkeypatch):
    monkeypatch.setitem(quantization.CHUNK, "cpu", chunk)
    x = random(37, 131)
    values, scales = fp8(x, (16, 48))
    assert scales.shape == (3, 3)
    result = Fp8((16, 48)).dequantize(values, scales, torch.float32)
    entries = scales.repeat_interleave(16, 0)[:37].repeat_interleave(48, 1)[:, :131]
    assert torch.equal(result, values.float() * entries)
    assert (result - x).abs().max() < 0.07 * x.abs().max()


def test_stacked_fp8_and_scales_that_are_exponents():
    stacked = [fp8(x, (16, 16)) for x in random(3, 48, 32)]
    values, scales = (torch.stack(part) for part in zip(*stacked, strict=True))
    scales = scales.to(torch.float8_e8m0fnu)
    result = Fp8((16, 16)).dequantize(values, scales, torch.bfloat16)
    assert result.shape == (3, 48, 32)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
    assert torch.equal(bits(result), bits(expected))
    one = Fp8((48, 32)).dequantize(values, torch.tensor([1.0, 2.0, 4.0]), torch.float32)
    assert torch.equal(one, values.float() * torch.tensor([1.0, 2.0, 4.0])[:, None, None])


@DTYPES
@CHUNKS
def test_mxfp4_is_what_transformers_makes_of_it(dtype, chunk, monkeypatch):
    monkeypatch.setitem(quantization.CHUNK, "cpu", chunk)
    x = random(3, 96, 37)
    values, scales = mxfp4(x)
    assert values.shape == (3, 37, 3, 16)
    result = Mxfp4().dequantize(values, scales, dtype)
    assert result.shape == x.shape
    assert result.is_contiguous()
    assert torch.equal(bits(result), bits(convert_moe_packed_tensors(values, scales, dtype=dtype)))
    assert (result.float() - x).abs().max() < 0.26 * x.abs().max()
    # All bytes, with the least and the greatest exponents that fit.
    values = torch.arange(256).to(torch.uint8).view(1, 4, 4, 16)
    scales = torch.tensor([0, 1, 100, 127, 128, 139, 140, 251] * 2, dtype=torch.uint8).view(1, 4, 4)
    expected = convert_moe_packed_tensors(values, scales, dtype=dtype)
    assert torch.equal(bits(Mxfp4().dequantize(values, scales, dtype)), bits(expected))
