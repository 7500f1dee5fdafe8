"""Packed checkpoints: what is packed, how it is loaded, and that unpacking gives the same bytes."""

import sys
from contextlib import nullcontext

import pytest
import torch
from helpers.checkpoints import contents, refused
from helpers.commands import interrupted_at, run, tensors_of
from helpers.families import first_is_fast, save_model
from helpers.pretended_gpu import pretended_gpu
from helpers.tensors import assert_equal
from helpers.verifying import DOWN, WANDA, change_tensor, put
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

from sparsefw import pack, prune, recover, unpack, verify
from sparsefw.checkpoint import packed as layout
from sparsefw.data.text import OWN_TEXT
from sparsefw.data.tokens import load_tokenizer
from sparsefw.evaluation import evaluate
from sparsefw.extras.packed import matrices
from sparsefw.extras.packed.folders import generalized
from sparsefw.extras.packed.quantizer import METHOD, PackedLinear
from sparsefw.packed import PackedConfig
from sparsefw.solver.config import METHODS

TOKENS = torch.arange(40).view(2, 20)


def packed_of(output, folder):
    assert pack.main([str(output), str(folder / "packed")]) == 0
    return folder / "packed"


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def test_layers_may_be_on_the_disk(text, tmp_path):
    """Accelerate reads them there for every forward. This checkpoint has stacked experts and a buffer."""
    output = tmp_path / "out"
    assert run(save_model(tmp_path / "model", "glm_moe_dsa"), text, output, *WANDA) == 0
    packed = AutoModelForCausalLM.from_pretrained(
        packed_of(output, tmp_path), device_map="auto", max_memory={"cpu": 0}, offload_folder=tmp_path
    )
    assert next(packed.parameters()).is_meta
    assert torch.equal(logits(packed), logits(AutoModelForCausalLM.from_pretrained(output)))


def test_another_process_s_own_method_is_refused(output, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(METHODS, "wanda")
    assert pack.main([str(output), str(tmp_path / "packed")]) == verify.main([str(output)]) == 2
    assert capsys.readouterr().err.count("sparsefw: wanda: no method of this name; if it is your own") == 2


@pytest.mark.parametrize(
    ("family", "dtype", "flags"),
    first_is_fast(
        [
            ("llama", torch.bfloat16, WANDA),
            ("llama", torch.float32, (*WANDA, "--sparsity", "layer:0.6")),
            ("llama", torch.float32, (*WANDA, "--sparsity", "2:4")),
            ("granitemoe", torch.float16, WANDA),
        ]
    ),
)
def test_packed_checkpoints_are_smaller_and_the_same(pruned, tmp_path, capsys, family, dtype, flags):
    _, output = pruned(*flags, family=family, dtype=dtype)
    folder = packed_of(output, tmp_path)
    dense, small = tensors_of(output), tensors_of(folder)
    masked = [name for name in dense if name + layout.MASK in small]
    # Every matrix that was pruned.
    assert len(masked) >= 8
    for name in masked:
        share = small[name].nbytes + small[name + layout.MASK].nbytes
        kept = (0.5 if "2:4" in flags else 0.4) + 1 / (8 * dtype.itemsize)
        assert share <= (kept + 0.04) * dense[name].nbytes
    assert verify.main([str(folder), "--against", str(output)]) == 0
    assert "all is the source's, bit for bit" in capsys.readouterr().out
    assert unpack.main([str(folder), str(tmp_path / "dense")]) == 0
    unpacked, before = contents(tmp_path / "dense"), contents(output)
    # The cards name their folders.
    assert unpacked.pop("README.md") != before.pop("README.md")
    assert unpacked == before

    model = AutoModelForCausalLM.from_pretrained(folder)
    truth = AutoModelForCausalLM.from_pretrained(output)
    expected, exact = logits(truth), 1e-5 if dtype == torch.float32 else 2e-2
    assert (logits(model) - expected).abs().max() <= exact * expected.abs().max()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    restored = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PackedConfig(dequantize=True))
    assert not hasattr(restored.config, "quantization_config")
    for state in (restored.state_dict(), model.dequantize().state_dict()):
        assert_equal(state, truth.state_dict())


def test_gradients_of_inputs_are_those_of_the_dense_model(output, tmp_path):
    """Also of the model without its head."""
    gradients = []
    for folder in (output, packed_of(output, tmp_path)):
        layer = AutoModel.from_pretrained(folder).layers[0].mlp.down_proj
        x = torch.ones(3, layer.in_features, requires_grad=True)
        layer(x).square().sum().backward()
        gradients.append(x.grad)
    assert isinstance(layer, PackedLinear)
    torch.testing.assert_close(*gradients)


def test_without_sparsefw_loading_fails(output, tmp_path, monkeypatch):
    """transformers alone makes no weights up: it says what to install."""
    folder = packed_of(output, tmp_path)
    # As if sparsefw.packed were not imported: it makes two entries, and a process without it takes seconds.
    for entries in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(entries, METHOD)
    hint = "packed by sparsefw: install it from its repository, and import sparsefw.packed before from_pretrained$"
    with pytest.raises(ValueError, match=hint):
        AutoModelForCausalLM.from_pretrained(folder)


def test_perplexity_is_that_of_the_dense_checkpoint(pruned, tmp_path):
    source, output = pruned(*WANDA, dtype=torch.bfloat16)
    dense, packed = (
        [*evaluate(folder, texts=source.parent / "text.txt", seqlen=32).texts[0].results.values()]
        for folder in (output, packed_of(output, tmp_path))
    )
    assert dense == packed


def test_layers_of_other_classes_are_not_packed(tmp_path, out, text, capsys):
    source = save_model(tmp_path / "model", "falcon", num_hidden_layers=1)
    assert run(source, text, out, *WANDA) == 0
    assert pack.main([str(out), str(tmp_path / "packed")]) == 2
    assert "no matrix can be packed; those stay dense that keep nearly all" in capsys.readouterr().err


@pytest.mark.parametrize("command", [pack, unpack, recover])
def test_several_processes_are_refused(command, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.main(["in", "out"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_own_text_is_packed_too_and_folders_may_be_the_users(copied, monkeypatch):
    _, output = copied(*WANDA)
    (output / OWN_TEXT).write_text("{}")
    monkeypatch.setenv("HOME", str(output.parent))
    assert pack.main([f"~/{output.name}", "~/packed"]) == 0
    assert (output.parent / "packed" / OWN_TEXT).read_text() == "{}"


def test_an_interrupted_command_goes_on(output, tmp_path, capsys):
    whole = contents(packed_of(output, tmp_path / "whole"))
    # Behind the first shard and its record.
    with interrupted_at(8):
        assert pack.main([str(output), str(tmp_path / "packed")]) == 130
    assert "shards are finished: the same command goes on from there" in capsys.readouterr().err
    assert contents(packed_of(output, tmp_path)) == whole


def test_what_cannot_be_packed_is_refused(pruned, copied, tmp_path, capsys):
    source, output = pruned(*WANDA)
    folder, before, (_, changed) = packed_of(output, tmp_path), contents(output), copied(*WANDA)
    change_tensor(changed, DOWN, lambda tensor: tensor + 1)
    for command, *paths, message in (
        (pack, source, tmp_path / "x", "no report.json in it"),
        (pack, folder, tmp_path / "x", "packed already"),
        (pack, changed, tmp_path / "x", f"{DOWN}: a row has 48 weights that are not zero, and may keep 20"),
        (pack, output, output, "which is read; choose another folder"),
        (pack, output, output.parent, "--overwrite", "which is read; choose another folder"),
        (pack, output, folder, "--overwrite"),
        (unpack, output, tmp_path / "x", "not packed"),
    ):
        capsys.readouterr()
        assert command.main([str(path) for path in paths]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert contents(output) == before
    with refused(r"_proj: is packed; model.dequantize\(\) makes it dense"):
        prune(AutoModelForCausalLM.from_pretrained(folder), tokenizer=load_tokenizer(output))


@pytest.mark.parametrize("flags", [WANDA, (*WANDA, "--sparsity", "layer:0.6")])
def test_a_mask_that_does_not_fit_its_values_is_refused(pruned, tmp_path, capsys, flags):
    """Else weights would be read from behind the values."""
    folder = packed_of(pruned(*flags)[1], tmp_path)
    change_tensor(folder, f"{DOWN}_mask", put((0, 0), 255))
    with refused(r"down_proj\.weight_mask: keeps other numbers of weights"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert unpack.main([str(folder), str(tmp_path / "x")]) == 2
    assert "down_proj.weight_mask: keeps other numbers of weights" in capsys.readouterr().err


@pytest.mark.parametrize("whole", [False, True])
def test_rows_with_fewer_weights_are_filled_up(whole):
    W = torch.tensor([[0.0, 1, 0, 2, 0, 0, 3, 0], [-0.0, 0, 0, 0, 0, 0, 0, 4], [0.0, 0, 0, 0, 0, 0, 0, 0]])
    values, mask = matrices.pack("W", W, 8 if whole else 3, whole)
    assert values.shape == ((8,) if whole else (3, 3))
    assert torch.equal(layout.unpack(values, mask).view(torch.int32), W.view(torch.int32))
    with refused("W: "):
        matrices.pack("W", W, 4 if whole else 2, whole)


@pytest.mark.parametrize("installed", [True, False])
def test_a_gpu_multiplies_by_triton_where_it_is_installed(installed, monkeypatch):
    layout._triton.cache_clear()
    if not installed:
        monkeypatch.setitem(sys.modules, "sparsefw.kernels.packed", None)
    W, x = (torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (5, 2))
    W.masked_fill_(W < 0.5, 0)
    layer = PackedLinear(32, 5, bias=False)
    for name, tensor in zip(("weight", f"weight{layout.MASK}"), matrices.pack("W", W, 16, False), strict=True):
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    warned = nullcontext() if installed else pytest.warns(UserWarning, match=r"torch's slower.*kernels\.packed")
    with nullcontext() if torch.cuda.is_available() else pretended_gpu(), warned:
        layer, on_gpu = layer.to("cuda"), x.to("cuda")
        assert layout.kernels_for(on_gpu).__name__ == f"sparsefw.kernels.{'packed' if installed else 'cpu.packed'}"
        assert not layer(on_gpu[:0]).numel()
        y, unpacked = layer(on_gpu).cpu(), layout.unpack(layer.weight, layer.weight_mask).cpu()
    torch.testing.assert_close(y, x @ W.T)
    assert torch.equal(unpacked, W)
    layout._triton.cache_clear()


def test_names_with_numbers_are_written_once():
    every = [f"layers.{n}.{part}.weight" for n in range(3) for part in ("a", "b")]
    assert generalized({*every[:5]}, every) == ["layers.*.a.weight", "layers.0.b.weight", "layers.1.b.weight"]
