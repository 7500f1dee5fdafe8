"""A model computes in fp32 where half precision is slow, and stays what it is on the disk; NaN and Inf are found."""

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import TOKENS, first_is_fast, save_model
from helpers.tensors import assert_equal
from transformers import AutoModelForCausalLM

from sparsefw import arithmetic, prune
from sparsefw.arithmetic import check_finite
from sparsefw.driver.reconstruct import BlockFit

BF16, FP16 = torch.bfloat16, torch.float16
OPTIONS = dict(kernel="torch", recover=0, steps=3, refit=2, rounds=0, sparsity="0.5", dataset=TOKENS)
WANDA = dict(kernel="torch", method="wanda", dataset=TOKENS, reconstruct=1)


@pytest.fixture
def slow(monkeypatch):
    """Half precision is slow on this processor."""
    monkeypatch.setattr(arithmetic, "slowdown", lambda dtype: 20.0)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_only_half_precision_on_a_slow_cpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(arithmetic, "slowdown", lambda dtype: {BF16: 20.0, FP16: 0.9}[dtype])
    cases = [(BF16, cpu), (FP16, cpu), (torch.float32, cpu), (BF16, gpu)]
    assert [arithmetic.computes_in_fp32(*case) for case in cases] == [True, False, False, False]


@pytest.mark.parametrize(("family", "dtype"), first_is_fast([("llama", BF16), ("qwen3_moe", FP16)]))
def test_pruned_as_in_fp32_and_rounded(family, dtype, slow, tmp_path):
    half = save_model(tmp_path / "half", family, dtype, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32)
    model.save_pretrained(tmp_path / "full")
    result = prune(half, tmp_path / "of-half", reconstruct=0, **OPTIONS)
    full = prune(tmp_path / "full", tmp_path / "of-full", reconstruct=0, **OPTIONS)
    assert "computed in fp32" in str(result.report.notes)
    assert not any("computed in fp32" in note for note in full.report.notes)
    written, expected = weights(result.output), weights(full.output)
    assert {x.dtype for x in written.values()} == {dtype}
    # The first stage has the same inputs; those of the others come through weights that were rounded.
    first = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    assert all(torch.equal(written[name], expected[name].to(dtype)) for name in first)
    # A model in memory is pruned to the same weights.
    model = AutoModelForCausalLM.from_pretrained(half, dtype=dtype)
    prune(model, reconstruct=0, **OPTIONS)
    assert_equal(model.state_dict(), written)


@pytest.mark.parametrize(("began", "now"), first_is_fast([(20.0, 1.2), (1.2, 20.0)]))
def test_a_resumed_run_computes_as_it_began(began, now, tmp_path, out, monkeypatch):
    """Even if a new timing says otherwise. Blocks that are read are rounded, and so are those in memory."""
    half, written = save_model(tmp_path / "half", "llama", BF16, num_hidden_layers=2), []
    monkeypatch.setattr(arithmetic, "slowdown", lambda dtype: began)

    def stop(line):
        written.append(line)
        if line.startswith("layers.1"):
            raise KeyboardInterrupt

    whole = prune(half, tmp_path / "whole", **WANDA)
    with pytest.raises(KeyboardInterrupt):
        prune(half, out, log=stop, **WANDA)
    lines = []
    monkeypatch.setattr(arithmetic, "slowdown", lambda dtype: now)
    result = prune(half, out, log=lines.append, **WANDA)
    assert "resuming" in str(lines)
    # Losses of the finished block, too.
    blocks, others = ([block.reconstruction for block in of.report.blocks] for of in (result, whole))
    assert all(others)
    assert blocks == others
    assert_equal(weights(out), weights(whole.output))


def test_steps_round_their_products_and_losses_do_not(tmp_path, out, monkeypatch):
    """A resumed run rounds as it began, whatever the processor does now; a caller may ask for exact products."""
    folder, found = save_model(tmp_path / "model", "llama", num_hidden_layers=2), set()
    loss_of = BlockFit.loss_of

    def note(fit, j, learned=False):
        found.add((learned, torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return loss_of(fit, j, learned)

    def stop(line):
        if line.startswith("layers.1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(BlockFit, "loss_of", note)
    exact, steps = (False, "ieee", "ieee"), (True, "bf16", "tf32")
    monkeypatch.setattr(arithmetic, "rounds_products", lambda *of: True)
    prune(folder, tmp_path / "exact", precision="ieee", **WANDA)
    assert found == {exact, (True, "ieee", "ieee")}
    found.clear()
    with pytest.raises(KeyboardInterrupt):
        prune(folder, out, log=stop, **WANDA)
    assert found == {exact, steps}
    found.clear()
    monkeypatch.setattr(arithmetic, "rounds_products", lambda *of: False)
    result = prune(folder, out, **WANDA)
    assert found == {exact, steps}
    assert "multiply in bf16" in str(result.report.notes)
    found.clear()
    prune(folder, tmp_path / "small", **WANDA)
    assert found == {exact, (True, "ieee", "ieee")}


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16])
def test_check_finite(dtype):
    tensor = torch.linspace(-1, 1, 37 * 131).view(37, 131).to(dtype)
    tensor[0, 0] = torch.finfo(dtype).max
    for finite in (tensor, tensor.T, tensor[:0], torch.zeros(3, dtype=torch.int64)):
        check_finite("w", finite)
    tensor[3, 5] = float("-inf")
    with refused("w: holds 0 NaN and 1 Inf among 4847 values"):
        check_finite("w", tensor)
    tensor[36, 130] = tensor[7, 7] = float("nan")
    with refused("w: holds 2 NaN and 1 Inf"):
        check_finite("w", tensor)
