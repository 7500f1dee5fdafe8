"""Quantized checkpoints: what comes out equals what comes of the checkpoint that transformers dequantizes."""

import json

import pytest
import torch
from helpers.commands import report_of, run, shards, tensors_of
from helpers.families import first_is_fast
from helpers.quantized import change_stored, dequantized, fp8, save_fp8, save_mxfp4
from helpers.verifying import change_tensor, flip_bit, only_failure, passed, put
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsefw.checkpoint.quantization import Fp8
from sparsefw.checkpoint.source import CONFIG, SINGLE, inspect
from sparsefw.estimate.profile import shape_of

SAVE = {
    "qwen3": lambda folder: save_fp8(folder, "qwen3"),
    "one scale": lambda folder: save_fp8(folder, "qwen3", None, activation_scheme="static"),
    "qwen3_moe": lambda folder: save_fp8(folder, "qwen3_moe", (8, 8)),
    "deepseek_v3": lambda folder: save_fp8(folder, "deepseek_v3"),
    "gpt_oss": save_mxfp4,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """source(name) -> a quantized checkpoint, which must not be changed; made once."""
    made = {}

    def make(name: str = "qwen3"):
        if name not in made:
            made[name] = SAVE[name](tmp_path_factory.mktemp("source") / "model")
        return made[name]

    return make


@pytest.mark.parametrize("name", first_is_fast(SAVE))
def test_pruned_as_the_checkpoint_that_transformers_dequantizes(name, source, text, tmp_path, out, capsys):
    plain = dequantized(source(name), tmp_path / "plain")
    assert run(source(name), text, out, "--method", "sparsegpt") == 0
    said = capsys.readouterr().out
    assert run(plain, text, tmp_path / "expected", "--method", "sparsegpt") == 0
    assert shards(out) == shards(tmp_path / "expected")
    notes = report_of(out)["notes"]
    count = sum(name.endswith(("_scale_inv", "_scales")) for name in load_file(source(name) / SINGLE))
    assert f": {count} tensors are converted to bfloat16" in notes[0]
    assert f"note: {notes[0]}\n" in said
    passed(capsys, out)
    config = json.loads((out / CONFIG).read_text())
    before = json.loads((source(name) / CONFIG).read_text())
    assert before.pop("quantization_config")
    assert config == before
    model, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("out", "expected"))
    assert model.dtype == torch.bfloat16
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_quantized_tensors_outside_of_the_blocks(text, tmp_path, out, capsys):
    """Embeddings, and a layer that the model's class has no use for, larger than a block."""
    folder = save_fp8(tmp_path / "model", "qwen3")
    small = shape_of(inspect(folder)).quantized_bytes
    embeddings, unused = "model.embed_tokens.weight", "model.layers.3.eh_proj.weight"
    x, scale = torch.randn(512, 32), f"{unused}_scale_inv"

    def quantize(tensors):
        for name, tensor in ((embeddings, tensors[embeddings].float()), (unused, x)):
            tensors[name], tensors[f"{name}_scale_inv"] = fp8(tensor, (16, 16))

    change_stored(folder, quantize)
    shape, stored = shape_of(inspect(folder)), load_file(folder / SINGLE)
    assert shape.quantized_bytes == stored[unused].nbytes + stored[scale].nbytes > small
    assert run(folder, text, out, "--method", "wanda") == 0
    assert "kept weights are the source's" in passed(capsys, out)
    written = tensors_of(out)
    assert not {f"{embeddings}_scale_inv", scale} & written.keys()
    for name in (embeddings, unused):
        expected = Fp8((16, 16)).dequantize(stored[name], stored[f"{name}_scale_inv"], torch.bfloat16)
        assert torch.equal(written[name], expected)
    change_tensor(out, unused, put((5, 5), flip_bit))
    assert unused in only_failure(capsys, out, "others")
