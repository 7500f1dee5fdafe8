"""Unchanged outputs pass all checks, whatever the flags. The source is found, or has to be named."""

import json
import re
import shutil

import pytest
import torch
from classes.tiny_model import byte_tokenizer
from helpers.families import save_model
from helpers.verifying import (
    DOWN,
    NORM,
    WANDA,
    Q,
    change_report,
    change_tensor,
    flip_bit,
    only_failure,
    prune,
    put,
    refused,
    save_gpt2,
    tensor_of,
    verdict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sparsefw import checkpoint, run
from sparsefw.checkpoint.source import CONFIG, SINGLE
from sparsefw.verify import main


@pytest.mark.slow
class TestPasses:
    @pytest.mark.parametrize("sparsity", ["0.6", "layer:0.6", "2:4"])
    @pytest.mark.parametrize("refit", ["4", "0"])
    def test_patterns(self, sparsity, refit, pruned, capsys):
        _, output = pruned("--sparsity", sparsity, "--refit", refit)
        status, printed, _ = verdict(capsys, output)
        assert status == 0
        assert printed.endswith("\nall checks passed\n")
        assert ("not checked: kept weights were refitted" in printed) == (refit == "4")
        assert "not checked: --keep-zeros was not given" in printed
        assert printed.count("not checked") == 1 + (refit == "4")

    @pytest.mark.parametrize(
        ("family", "dtype", "flags"),
        [
            ("llama", torch.bfloat16, ["--compare", "wanda", "--compare", "sparsegpt"]),
            ("llama", torch.float16, ["--method", "wanda", "--compare", "sparsefw"]),
            ("llama", torch.bfloat16, ["--method", "ria", "--sparsity", "3:8"]),
            ("llama", torch.float32, ["--method", "sparsegpt"]),
            ("llama", torch.bfloat16, ["--method", "sparsegpt", "--sparsity", "2:4"]),
            ("llama", torch.float32, ["--method", "magnitude"]),
            ("llama", torch.float32, ["--preset", "paper", "--sparsity", "layer:0.5"]),
            ("opt", torch.bfloat16, ["--refit", "0"]),
            ("qwen3_moe", torch.bfloat16, ["--refit", "0"]),
            ("mixtral", torch.float32, ["--sparsity", "2:4"]),
            ("gpt2", torch.float32, ["--refit", "0"]),
            ("gpt2", torch.bfloat16, ["--sparsity", "2:4"]),
        ],
    )
    def test_families_and_methods(self, family, dtype, flags, pruned, capsys):
        _, output = pruned(*flags, family=family, dtype=dtype)
        status, printed, _ = verdict(capsys, output)
        assert status == 0, printed

    @pytest.mark.parametrize(
        ("family", "flags", "pruned_layers", "other_tensors"),
        [
            # Other tensors: two norms in each of two blocks, the last norm, the embedding; and layers that are not
            # selected.
            ("llama", ["--ignore", "down_proj", "--refit", "0"], 12, 6 + 2),
            ("llama", ["--include", "mlp", "--ignore", "layers.0", "--keep-zeros"], 3, 6 + 7 + 4),
            ("llama", ["--ignore", r"re:.*\.[qkv]_proj", "--method", "sparsegpt", "--compare", "wanda"], 8, 6 + 6),
            ("gpt2", ["--include", "mlp.c_proj"], 2, None),
            ("qwen3_moe", ["--ignore", "experts"], 8, None),
            ("qwen3_moe", ["--ignore", "experts.down_proj[0]", "--refit", "0"], None, None),
        ],
    )
    def test_selected_layers(self, family, flags, pruned_layers, other_tensors, pruned, capsys):
        """Layers that are not selected are compared with the source, like all tensors that stay as they are."""
        _, output = pruned(*flags, family=family)
        status, printed, _ = verdict(capsys, output)
        assert status == 0, printed
        if pruned_layers:
            assert re.search(rf"^pattern .* {pruned_layers} layers +ok$", printed, re.MULTILINE)
        if other_tensors:
            assert re.search(rf"^others .* {other_tensors} tensors +ok$", printed, re.MULTILINE)

    def test_what_is_said(self, pruned, capsys):
        _, output = pruned("--sparsity", "2:4", "--refit", "0")
        _, printed, _ = verdict(capsys, output)
        # Two norms in each of two blocks, the last norm, the embedding.
        assert re.search(r"^others .* 6 tensors +ok$", printed, re.MULTILINE)
        assert re.search(r"^report .* 14 layers +ok$", printed, re.MULTILINE)
        assert re.search(r"^pattern .* 14 layers +ok$", printed, re.MULTILINE)
        assert re.search(r"^kept .* 14 layers +ok$", printed, re.MULTILINE)
        assert re.search(r"^model.layers.\*.mlp.down_proj.weight +2 +3072 +1536 +50.00 %$", printed, re.MULTILINE)
        assert re.search(r"^all +14 +15360 +7680 +50.00 %$", printed, re.MULTILINE)

    def test_embedded_model(self, tmp_path, capsys):
        flags = ["--nsamples", "2", "--steps", "2", "--eval-windows", "1", "--output", str(tmp_path / "out")]
        assert run.main(flags) == 0
        assert verdict(capsys, tmp_path / "out")[0] == 0
        assert verdict(capsys, tmp_path / "out", "--against", "default")[0] == 0

    def test_expert_without_tokens(self, tmp_path, capsys):
        source = save_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2, num_experts=24, num_local_experts=24)
        prune(source, tmp_path / "out", "--nsamples", "1", "--seqlen", "8", "--refit", "0")
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert verdict(capsys, tmp_path / "out")[0] == 0
        expert = next(name for name in report["kept_dense"] if "down_proj[" in name)
        number = re.search(r"\[(\d+)\]", expert)[1]
        stored = expert.replace(f"down_proj[{number}]", f"{number}.down_proj.weight")
        change_tensor(tmp_path / "out", stored, put((3, 2), flip_bit))
        assert only_failure(capsys, tmp_path / "out", "others").startswith(f"{expert}: 1 of 768 values differ")

    def test_weights_that_are_zero_in_the_source(self, tmp_path, capsys):
        """Such weights are zero whether kept or removed, so a row may have fewer nonzero weights than its budget."""
        source = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
        shard = next(path for path in source.glob("*.safetensors") if Q in load_file(path))
        tensors = load_file(shard)
        tensors[Q][:4, :28] = 0
        save_file(tensors, shard, metadata={"format": "pt"})
        prune(source, tmp_path / "out", "--refit", "0")
        status, printed, _ = verdict(capsys, tmp_path / "out")
        assert status == 0
        # In two blocks of 32 rows, four rows keep 4 weights, all others 13.
        assert re.search(rf"q_proj.weight +2 +2048 +{2048 - 4 * 4 - 60 * 13} ", printed)

    def test_tensors_of_another_dtype(self, tmp_path, capsys):
        """Tensors are written in the model's dtype, except routers, which transformers keeps in fp32."""
        config = AutoConfig.for_model(
            "deepseek_v3",
            **dict(vocab_size=258, hidden_size=32, intermediate_size=48, max_position_embeddings=64),
            **dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=2),
            **dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
            **dict(n_routed_experts=4, n_group=1, topk_group=1, moe_intermediate_size=24, first_k_dense_replace=0),
        )
        torch.manual_seed(0)
        source, output = tmp_path / "model", tmp_path / "out"
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        tensors = load_file(source / SINGLE)
        router = "model.layers.1.mlp.gate.weight"
        assert tensors[router].dtype == torch.float32
        tensors[router], tensors[NORM] = tensors[router].bfloat16(), tensors[NORM].float()
        save_file(tensors, source / SINGLE, metadata={"format": "pt"})
        prune(source, output, "--refit", "0")
        assert tensor_of(output, router).dtype == torch.float32
        assert tensor_of(output, NORM).dtype == torch.bfloat16
        status, printed, _ = verdict(capsys, output)
        assert status == 0, printed
        note = "note: the source: read and written as"
        assert f"{note} torch.bfloat16: 1 tensor of another dtype, {NORM} first\n" in printed
        assert f"{note} torch.float32: 1 tensor of another dtype, {router} first\n" in printed
        change_tensor(output, router, lambda tensor: tensor.half())
        failure = f"{router}: is torch.float16, in the source torch.bfloat16"
        assert verdict(capsys, output)[2]["shapes"] == [failure]

    def test_names_that_the_model_has_not(self, tmp_path, capsys):
        """GPT-2 on the Hub has the names of a model without its head, and so has the output."""
        source = save_gpt2(tmp_path / "model", torch.float32)
        tensors = {name.removeprefix("transformer."): t for name, t in load_file(source / SINGLE).items()}
        save_file(tensors, source / SINGLE, metadata={"format": "pt"})
        prune(source, tmp_path / "out", "--refit", "0")
        assert checkpoint.inspect(tmp_path / "out").tensors.keys() == tensors.keys()
        status, printed, _ = verdict(capsys, tmp_path / "out")
        assert status == 0, printed

    def test_output_of_a_run_as_source(self, copied, tmp_path, capsys):
        """The source has a report, too, which the new report replaces."""
        _, first = copied(*WANDA)
        prune(first, tmp_path / "again", "--method", "magnitude", "--sparsity", "0.7")
        assert verdict(capsys, tmp_path / "again")[0] == 0


class TestSource:
    @pytest.mark.parametrize("model", ["gone", "", "~nobody/here", "\0", "x" * 5000])
    def test_not_there(self, model, copied, capsys):
        source, output = copied(*WANDA)
        change_report(output, lambda report: report["arguments"].update(model=model))
        status, printed, _ = verdict(capsys, output)
        assert status == 0
        assert re.search(r"^not compared with the source: .*; name the source with --against$", printed, re.MULTILINE)
        assert printed.count("not checked: no source") == 4
        assert "not checked: --keep-zeros was not given" in printed
        assert printed.endswith("\nall checks that could be made passed\n")
        # With --against the source is compared.
        column = tensor_of(output, Q)[5].nonzero()[0].item()
        change_tensor(output, Q, put((5, column), flip_bit))
        assert verdict(capsys, output)[0] == 0
        assert only_failure(capsys, output, "kept", "--against", str(source)).startswith(Q)

    def test_that_is_no_checkpoint_any_more(self, copied, tmp_path, capsys):
        _, output = copied(*WANDA)
        (tmp_path / "empty").mkdir()
        change_report(output, lambda report: report["arguments"].update(model=str(tmp_path / "empty")))
        status, printed, _ = verdict(capsys, output)
        assert status == 0
        assert f"\nnot compared with the source: {tmp_path / 'empty'}: no config.json" in printed

    def test_another_model(self, pruned, tmp_path, capsys):
        _, output = pruned(*WANDA)
        other = save_model(tmp_path / "other", "llama", seed=1, num_hidden_layers=2)
        failures = verdict(capsys, output, "--against", str(other))[2]
        assert failures.keys() == {"kept", "others"}
        # There are 14 layers.
        assert len(failures["kept"]) == 11
        assert failures["kept"][-1] == "and 4 more"

    def test_deeper_model(self, pruned, tmp_path, capsys):
        _, output = pruned(*WANDA)
        other = save_model(tmp_path / "other", "llama")
        _, printed, failures = verdict(capsys, output, "--against", str(other))
        assert failures["model"] == ["model.layers.1: the last of the blocks, in the source it is model.layers.2"]
        assert printed.count("not checked: the source has other blocks") == 2

    def test_wider_model(self, pruned, tmp_path, capsys):
        _, output = pruned(*WANDA)
        other = save_model(tmp_path / "other", "llama", num_hidden_layers=2, hidden_size=64)
        failures = verdict(capsys, output, "--against", str(other))[2]
        assert failures.keys() == {"copied", "shapes", "kept", "others"}
        assert failures["kept"][0] == f"{Q}: not of this shape and dtype in the source"
        assert f"{NORM}: torch.float32 (32,), in the source torch.float32 (64,)" in failures["others"]

    @pytest.mark.parametrize(
        ("against", "message"),
        [("./nowhere", "no such folder"), ("out", "the output itself"), ("empty", "no config.json")],
    )
    def test_that_cannot_be_used(self, against, message, copied, tmp_path, capsys, monkeypatch):
        copied(*WANDA)
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        refused(capsys, f"{against}: {message}", "out", "--against", against)

    @pytest.mark.parametrize("name", [DOWN, NORM, "model.norm.weight"])
    def test_with_nan(self, name, copied, tmp_path, capsys):
        source, output = copied(*WANDA)
        bad = shutil.copytree(source, tmp_path / "bad")
        shard = next(path for path in bad.glob("*.safetensors") if name in load_file(path))
        tensors = load_file(shard)
        tensors[name][1] = torch.nan
        save_file(tensors, shard, metadata={"format": "pt"})
        refused(capsys, f"the source: {name}: holds ", output, "--against", bad)


class TestBadInput:
    def test_folders(self, pruned, tmp_path, capsys):
        source, output = pruned(*WANDA)
        refused(capsys, ".*nowhere: no such folder; give one that sparsefw.run wrote", tmp_path / "nowhere")
        refused(capsys, ".*report.json: not readable .*; give a folder that sparsefw.run wrote", source)
        shutil.copy(output / "report.json", tmp_path)
        refused(capsys, f"{tmp_path}: not a checkpoint; give a folder that sparsefw.run wrote", tmp_path)
        shutil.copy(output / CONFIG, tmp_path)
        refused(capsys, f"{tmp_path}: not a checkpoint; give a folder that sparsefw.run wrote", tmp_path)

    @pytest.mark.parametrize("flags", [[], ["a", "b"], ["a", "--again", "b"]])
    def test_flags_that_do_not_parse(self, flags, capsys):
        assert main(flags) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
