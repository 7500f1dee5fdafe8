"""Checks of outputs that were changed after they were written: every change is found, and its place is named."""

import json
import re

import pytest
import torch
from helpers.families import save_model
from helpers.verifying import (
    DOWN,
    EMBEDDING,
    NORM,
    WANDA,
    Q,
    change_report,
    change_tensor,
    flip_bit,
    only_failure,
    prune,
    put,
    save_gpt2,
    tensor_of,
    verdict,
)
from safetensors.torch import load_file, save_file

from sparsefw.checkpoint.source import CONFIG, INDEX, SINGLE

pytestmark = pytest.mark.slow


class TestPattern:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--method", "wanda"], "row 5 has 14 non-zero weights, 13 may be kept"),
            (["--sparsity", "0.6", "--refit", "4"], "row 5 has 14 non-zero weights, 13 may be kept"),
            (["--method", "wanda", "--sparsity", "2:4"], r"row 5, columns (\d+) to \d+ has 3 non-zero weights, 2 may"),
            (["--sparsity", "layer:0.6", "--refit", "0"], "the matrix has 411 non-zero weights, 410 may be kept"),
            (["--method", "sparsegpt"], "the matrix has 411 non-zero weights, 410 may be kept"),
        ],
    )
    def test_one_weight_too_many(self, flags, message, copied, capsys):
        """The extra weight is the source's own, so that nothing else is wrong."""
        source, output = copied(*flags)
        column = (tensor_of(output, Q)[5] == 0).nonzero()[-1].item()
        change_tensor(output, Q, put((5, column), tensor_of(source, Q)[5, column]))
        match = re.match(rf"{Q}: {message}", only_failure(capsys, output, "pattern"))
        assert match
        if match.groups():
            assert int(match[1]) == column // 4 * 4

    def test_layer_stored_the_other_way_round(self, copied, capsys):
        _, output = copied(*WANDA, family="gpt2")
        name = "transformer.h.1.attn.c_proj.weight"
        column = (tensor_of(output, name)[:, 7] == 0).nonzero()[0].item()
        change_tensor(output, name, put((column, 7), 0.5))
        assert verdict(capsys, output)[2]["pattern"] == [f"{name}: row 7 has 14 non-zero weights, 13 may be kept"]

    def test_report_that_has_it_the_other_way_round(self, copied, capsys):
        _, output = copied(*WANDA, family="gpt2")
        change_report(output, lambda report: [row.update(transposed=False) for row in report["layers"]])
        failures = verdict(capsys, output)[2]
        # Square layers have this shape both ways, but their rows keep other numbers of weights.
        assert len(failures["report"]) == 6
        assert {failure.partition(":")[0] for failure in failures["pattern"]} == {
            f"transformer.h.{i}.attn.c_proj.weight" for i in range(2)
        }

    def test_expert(self, copied, capsys):
        _, output = copied(*WANDA, family="qwen3_moe")
        change_tensor(output, "model.layers.1.mlp.experts.3.up_proj.weight", put(slice(4, 7), 0.5))
        # The gate has the first 24 rows.
        message = "row 28 has 32 non-zero weights, 13 may be kept, and 2 more like it"
        assert verdict(capsys, output)[2]["pattern"] == [f"model.layers.1.mlp.experts.gate_up_proj[3]: {message}"]

    def test_report_that_claims_more(self, copied, capsys):
        _, output = copied(*WANDA)
        change_report(output, lambda report: report["layers"][0].update(kept=32 * 14))
        message = "keeps 448 of 1024 by the report, which the pattern does not"
        assert only_failure(capsys, output, "pattern") == f"{Q}: {message}"


class TestKept:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("flags", [["--sparsity", "0.6", "--refit", "0"], ["--method", "magnitude"]])
    def test_one_bit_of_a_kept_weight(self, dtype, flags, copied, capsys):
        source, output = copied(*flags, dtype=dtype)
        column = tensor_of(output, Q)[5].nonzero()[0].item()
        change_tensor(output, Q, put((5, column), flip_bit))
        values = f"{tensor_of(output, Q)[5, column].item()}, in the source {tensor_of(source, Q)[5, column].item()}"
        message = f"1 of 1024 values differ, first at [5, {column}]: {values}"
        assert only_failure(capsys, output, "kept") == f"{Q}: {message}"

    def test_one_weight_too_few(self, copied, capsys):
        _, output = copied(*WANDA)
        column = tensor_of(output, Q)[5].nonzero()[0].item()
        change_tensor(output, Q, put((5, column), 0.0))
        assert only_failure(capsys, output, "kept") == f"{Q}: row 5 has 20 weights removed, 19 are to be"

    def test_one_weight_too_few_of_a_layer_stored_the_other_way_round(self, copied, capsys):
        _, output = copied(*WANDA, family="gpt2")
        name = "transformer.h.1.mlp.c_fc.weight"
        column = tensor_of(output, name)[:, 40].nonzero()[0].item()
        change_tensor(output, name, put((column, 40), 0.0))
        assert only_failure(capsys, output, "kept") == f"{name}: row 40 has 20 weights removed, 19 are to be"

    def test_removed_weights_are_zeros_without_a_sign(self, copied, capsys):
        _, output = copied(*WANDA)
        column = (tensor_of(output, Q)[5] == 0).nonzero()[0].item()
        change_tensor(output, Q, put((5, column), -0.0))
        assert f"first at [5, {column}]: -0.0, in the source" in only_failure(capsys, output, "kept")

    def test_another_dtype_than_the_source(self, copied, capsys):
        """All tensors have the other dtype, and only the first failures are listed."""
        _, output = copied(*WANDA, dtype=torch.bfloat16)
        for name in json.loads((output / INDEX).read_text())["weight_map"]:
            change_tensor(output, name, lambda tensor: tensor.float())
        failures = verdict(capsys, output)[2]
        assert {check: len(printed) for check, printed in failures.items()} == {"shapes": 11, "kept": 11, "others": 6}
        assert failures["shapes"][-1] == "and 10 more"
        assert failures["kept"][-1] == "and 4 more"
        assert failures["kept"][0] == f"{Q}: not of this shape and dtype in the source"
        assert f"{NORM}: torch.float32 (32,), in the source torch.bfloat16 (32,)" in failures["others"]


@pytest.fixture(params=["llama", "gpt2"])
def zeros_kept(request, tmp_path):
    """A run with --keep-zeros: its source, its output, the name of a layer whose first four rows are mostly zero, and
    whether that layer is stored (in, out)."""
    source, output, transposed = tmp_path / "model", tmp_path / "out", request.param == "gpt2"
    if transposed:
        save_gpt2(source, torch.float32)
    else:
        save_model(source, "llama", num_hidden_layers=2)
    name = "transformer.h.1.mlp.c_fc.weight" if transposed else Q
    shard = next(path for path in source.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    (tensors[name].T if transposed else tensors[name])[:4, :28] = 0
    save_file(tensors, shard, metadata={"format": "pt"})
    prune(source, output, "--keep-zeros")
    return source, output, name, transposed


class TestZeros:
    def test_that_are_kept(self, zeros_kept, capsys):
        _, output, _, transposed = zeros_kept
        status, printed, _ = verdict(capsys, output)
        assert status == 0, printed
        assert re.search(rf"^zeros .* {8 if transposed else 14} layers +ok$", printed, re.MULTILINE)

    def test_that_are_revived(self, zeros_kept, capsys):
        """Only this check finds them: the pattern allows them, and refitted weights may have any value."""
        source, output, name, transposed = zeros_kept
        for column in (3, 9):
            change_tensor(output, name, put((column, 2) if transposed else (2, column), 0.5))
        failure = only_failure(capsys, output, "zeros")
        assert failure.startswith(f"{name}: 2 of {tensor_of(output, name).numel()} values are not zero any more, ")
        assert failure.endswith("first at [2, 3]: 0.5, in the source 0.0")
        # Without the flag a refit may revive them, and without a source nobody can tell.
        change_report(output, lambda report: report["arguments"].update(keep_zeros=False))
        assert verdict(capsys, output)[0] == 0
        change_report(output, lambda report: report["arguments"].update(keep_zeros=True, model="gone"))
        assert re.search(r"^zeros .* not checked: no source$", verdict(capsys, output)[1], re.MULTILINE)
        assert only_failure(capsys, output, "zeros", "--against", str(source)).startswith(name)

    def test_of_a_source_of_another_shape(self, copied, tmp_path, capsys):
        _, output = copied("--keep-zeros")
        other = save_model(tmp_path / "other", "llama", num_hidden_layers=2, hidden_size=64)
        failures = verdict(capsys, output, "--against", str(other))[2]["zeros"]
        assert failures[0] == f"{Q}: not of this shape and dtype in the source"


class TestSelection:
    IGNORED = (*WANDA, "--ignore", "down_proj")

    def test_ignored_layer_that_was_changed(self, copied, capsys):
        _, output = copied(*self.IGNORED)
        change_tensor(output, DOWN, put((3, 5), flip_bit))
        failure = only_failure(capsys, output, "others")
        assert failure.startswith(f"{DOWN}: 1 of {tensor_of(output, DOWN).numel()} values differ, first at [3, 5]: ")

    def test_ignored_layer_that_was_pruned(self, copied, capsys):
        _, output = copied(*self.IGNORED)
        change_tensor(output, DOWN, put((slice(None), slice(0, 30)), 0.0))
        assert only_failure(capsys, output, "others").startswith(f"{DOWN}: 960 of 1536 values differ")

    def test_ignored_expert_that_was_changed(self, copied, capsys):
        _, output = copied(*WANDA, "--ignore", "experts.down_proj[1]", family="qwen3_moe")
        change_tensor(output, "model.layers.1.mlp.experts.1.down_proj.weight", put((3, 2), flip_bit))
        message = "model.layers.1.mlp.experts.down_proj[1]: 1 of 768 values differ"
        assert only_failure(capsys, output, "others").startswith(message)

    def test_report_that_hides_an_ignored_layer(self, copied, capsys):
        _, output = copied(*self.IGNORED)
        change_report(output, lambda report: report["kept_dense"].remove(DOWN))
        assert only_failure(capsys, output, "report") == f"{DOWN}: neither pruned nor kept dense by the report"

    def test_report_that_claims_an_ignored_layer(self, copied, capsys):
        """The report says that the layer was pruned, which it was not."""
        _, output = copied(*self.IGNORED)
        row = {"name": DOWN, "shape": [32, 48], "kept": 32 * 20}
        change_report(output, lambda report: report["layers"].append(report["layers"][0] | row))
        message = "row 0 has 48 non-zero weights, 20 may be kept, and 31 more like it"
        assert only_failure(capsys, output, "pattern") == f"{DOWN}: {message}"

    def test_report_that_hides_a_pruned_layer(self, copied, capsys):
        """The report lists the layer as kept dense, but its weights are not the source's."""
        _, output = copied(*self.IGNORED)

        def hide(report: dict) -> None:
            report["layers"] = [layer for layer in report["layers"] if layer["name"] != Q]
            report["kept_dense"].append(Q)

        change_report(output, hide)
        assert only_failure(capsys, output, "others").startswith(f"{Q}: 608 of 1024 values differ")


class TestOthers:
    @pytest.mark.parametrize(
        ("family", "dtype", "name", "at"),
        [
            ("llama", torch.bfloat16, NORM, [3]),
            ("llama", torch.float32, "model.norm.weight", [0]),
            ("llama", torch.float32, EMBEDDING, [257, 31]),
            ("opt", torch.float32, "model.decoder.layers.0.self_attn.k_proj.bias", [2]),
            ("opt", torch.float32, "model.decoder.embed_positions.weight", [4, 1]),
            ("qwen3_moe", torch.float32, "model.layers.0.mlp.gate.weight", [1, 1]),
            ("qwen3_moe", torch.float32, "lm_head.weight", [0, 0]),
            ("gpt2", torch.float32, "transformer.h.0.attn.c_attn.bias", [95]),
        ],
    )
    def test_one_bit(self, family, dtype, name, at, copied, capsys):
        _, output = copied(*WANDA, family=family, dtype=dtype)
        change_tensor(output, name, put(tuple(at), flip_bit))
        failure = only_failure(capsys, output, "others")
        assert failure.startswith(f"{name}: 1 of {tensor_of(output, name).numel()} values differ, first at {at}: ")

    def test_sign_of_a_zero(self, copied, capsys):
        _, output = copied(*WANDA, family="opt")
        name = "model.decoder.layers.0.fc1.bias"
        assert tensor_of(output, name)[7] == 0
        change_tensor(output, name, put(7, -0.0))
        assert only_failure(capsys, output, "others").endswith("first at [7]: -0.0, in the source 0.0")


class TestFiles:
    @pytest.mark.parametrize("key", ["total_size", "total_parameters"])
    def test_index_that_lies_about_a_size(self, key, copied, capsys):
        _, output = copied(*WANDA)
        index = json.loads((output / INDEX).read_text())
        index["metadata"][key] += 1
        (output / INDEX).write_text(json.dumps(index))
        value = index["metadata"][key]
        assert only_failure(capsys, output, "files") == f"{INDEX}: {key} is {value}, the shards hold {value - 1}"

    @pytest.mark.parametrize("metadata", [None, [], {}])
    def test_index_without_sizes(self, metadata, copied, capsys):
        _, output = copied(*WANDA)
        index = json.loads((output / INDEX).read_text()) | {"metadata": metadata}
        (output / INDEX).write_text(json.dumps(index))
        assert [failure.partition(" is ")[0] for failure in verdict(capsys, output)[2]["files"]] == [
            f"{INDEX}: total_size",
            f"{INDEX}: total_parameters",
        ]

    def test_truncated_shard(self, copied, capsys):
        _, output = copied(*WANDA)
        shard = output / "model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        assert only_failure(capsys, output, "files").startswith(f"{shard}: not a whole safetensors file")

    def test_shard_without_a_tensor_of_the_index(self, copied, capsys):
        _, output = copied(*WANDA)
        index = (output / INDEX).read_text()
        change_tensor(output, NORM, lambda tensor: None)
        (output / INDEX).write_text(index)
        assert f"tensor {NORM}, which {INDEX} says is here, is missing" in only_failure(capsys, output, "files")

    @pytest.mark.parametrize("name", ["model-00004-of-00004.safetensors", SINGLE])
    def test_weights_beside_the_shards(self, name, copied, capsys):
        _, output = copied(*WANDA)
        save_file({"x": torch.ones(1)}, output / name)
        assert verdict(capsys, output)[2]["files"][0].startswith(f"{name}: not ")

    def test_missing_tensor(self, copied, capsys):
        _, output = copied(*WANDA)
        change_tensor(output, NORM, lambda tensor: None)
        message = "this tensor is missing from the checkpoint (1 in all)"
        assert only_failure(capsys, output, "model").endswith(f"{NORM}: {message}")

    def test_tensor_too_many(self, copied, capsys):
        _, output = copied(*WANDA)
        index = json.loads((output / INDEX).read_text())
        save_file({"one.more": torch.ones(2)}, output / "more.safetensors")
        index["weight_map"]["one.more"] = "more.safetensors"
        index["metadata"]["total_size"] += 8
        index["metadata"]["total_parameters"] += 2
        (output / INDEX).write_text(json.dumps(index))
        assert only_failure(capsys, output, "shapes") == "one.more: not in the source"

    def test_other_shape(self, copied, capsys):
        _, output = copied(*WANDA)
        change_tensor(output, NORM, lambda tensor: tensor[:31].clone())
        failures = verdict(capsys, output)[2]
        assert failures.keys() == {"shapes", "model"}
        assert failures["shapes"] == [f"{NORM}: has shape (31,), in the source (32,)"]
        assert failures["model"][0].endswith(f"{NORM}: the checkpoint has shape (31,), the config asks for (32,)")

    def test_other_dtype(self, copied, capsys):
        """The tensor holds ones, so that its values in the model are the same."""
        _, output = copied(*WANDA)
        change_tensor(output, NORM, lambda tensor: tensor.half())
        message = "is torch.float16, in the source torch.float32"
        assert only_failure(capsys, output, "shapes") == f"{NORM}: {message}"

    @pytest.mark.parametrize(("name", "value"), [(DOWN, torch.nan), (NORM, torch.inf), (EMBEDDING, -torch.inf)])
    def test_not_finite(self, name, value, copied, capsys):
        _, output = copied(*WANDA)
        change_tensor(output, name, put((1,) * tensor_of(output, name).dim(), value))
        _, printed, failures = verdict(capsys, output)
        holds = "1 NaN and 0 Inf" if value != value else "0 NaN and 1 Inf"
        assert failures["finite"][0].startswith(f"{name}: holds {holds} among ")
        assert failures["model"][0].startswith(f"{name}: holds {holds} among ")
        assert failures.keys() == {"finite", "model"}
        if name != EMBEDDING:
            # The other block is checked all the same.
            assert re.search(r"^pattern .* 7 layers +ok$", printed, re.MULTILINE)

    def test_all_that_are_not_finite(self, copied, capsys):
        _, output = copied(*WANDA)
        for name in (Q, DOWN, NORM):
            change_tensor(output, name, put(0, torch.nan))
        named = [failure.partition(":")[0] for failure in verdict(capsys, output)[2]["finite"]]
        assert sorted(named) == sorted([Q, DOWN, NORM])

    def test_changed_config(self, copied, capsys):
        _, output = copied(*WANDA)
        config = json.loads((output / CONFIG).read_text()) | {"rms_norm_eps": 1e-3}
        (output / CONFIG).write_text(json.dumps(config))
        assert only_failure(capsys, output, "copied") == f"{CONFIG}: not the source's"

    def test_config_of_a_shallower_model(self, copied, capsys):
        _, output = copied(*WANDA)
        config = json.loads((output / CONFIG).read_text()) | {"num_hidden_layers": 1}
        (output / CONFIG).write_text(json.dumps(config))
        failures = verdict(capsys, output)[2]
        assert failures["copied"] == [f"{CONFIG}: not the source's"]
        assert failures["model"] == ["model.layers.0: the last of the blocks, in the source it is model.layers.1"]
        assert f"{DOWN}: in none of the model's blocks" in failures["report"]

    def test_missing_tokenizer(self, copied, capsys):
        _, output = copied(*WANDA)
        (output / "tokenizer.json").unlink()
        assert only_failure(capsys, output, "copied") == "tokenizer.json: missing"
