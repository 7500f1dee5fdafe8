"""The verdict on outputs: unchanged ones pass, whatever the flags; every change is found, and its place is named."""

import re
import shutil

import pytest
import torch
from helpers.families import first_is_fast, save_model
from helpers.stacks import drawn
from helpers.verifying import (
    DOWN,
    NORM,
    WANDA,
    Q,
    change_report,
    change_tensor,
    flip_bit,
    only_failure,
    put,
    refused,
    sum_again,
    tensor_of,
    verdict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsefw import pack, prune
from sparsefw.checkpoint.files import SUMS, file_digest
from sparsefw.checkpoint.source import INDEX
from sparsefw.driver.in_memory import save
from sparsefw.verify import main

QUICK = dict(kernel="torch", method="wanda", sparsity="0.5")
EXPERT, ROUTER = "model.layers.1.mlp.experts", "model.layers.0.mlp.gate.weight"
C_PROJ = "transformer.h.1.attn.c_proj.weight"


def row(printed, check):
    """The number of things that a check has looked at."""
    return int(re.search(rf"^{check} .* (\d+)  ok$", printed, re.MULTILINE)[1])


class TestPasses:
    @pytest.mark.parametrize(
        ("family", "dtype", "flags"),
        first_is_fast(
            [
                ("llama", torch.float32, ["--sparsity", "layer:0.6", "--refit", "0"]),
                ("llama", torch.bfloat16, ["--compare", "wanda", "--compare", "sparsegpt"]),
                ("opt", torch.bfloat16, ["--refit", "0"]),
                ("mixtral", torch.float32, ["--sparsity", "2:4"]),
                ("gpt2", torch.bfloat16, ["--sparsity", "2:4", "--refit", "0"]),
            ]
        ),
    )
    def test_families_and_methods(self, family, dtype, flags, pruned, capsys):
        _, output = pruned(*flags, family=family, dtype=dtype)
        status, printed, _ = verdict(capsys, output)
        assert status == 0, printed
        assert printed.endswith("\nall checks passed\n")
        refitted = "--refit" not in flags
        assert bool(re.search("^kept ", printed, re.MULTILINE)) != refitted

    @pytest.mark.parametrize(
        ("family", "flags", "layers", "others"),
        first_is_fast(
            [
                # Two norms in each of two blocks, the last norm, the embedding; and layers that are not selected.
                ("llama", ["--include", "mlp", "--ignore", "layers.0", "--keep-zeros"], 3, 6 + 7 + 4),
                ("llama", ["--ignore", "down_proj", "--refit", "0"], 12, 6 + 2),
                ("qwen3_moe", ["--ignore", "experts.down_proj[0]", "--refit", "0"], 8 + 2 * 7, None),
            ]
        ),
    )
    def test_selected_layers(self, family, flags, layers, others, pruned, capsys):
        """Layers that are not selected are compared with the source, like all tensors that stay as they are."""
        _, output = pruned(*flags, family=family)
        status, printed, _ = verdict(capsys, output)
        assert status == 0, printed
        assert row(printed, "pattern") == row(printed, "report") == layers
        assert others in (None, row(printed, "others"))

    def test_names_that_the_model_has_not(self, pruned, tmp_path, capsys):
        """GPT-2 on the Hub has the names of a model without its head, and so has the output."""
        for name, folder in zip(("source", "out"), pruned(*WANDA, family="gpt2"), strict=True):
            shutil.copytree(folder, tmp_path / name)
            for path in (tmp_path / name).glob("*.safetensors"):
                save_file({k.removeprefix("transformer."): t for k, t in load_file(path).items()}, path)
            index = tmp_path / name / INDEX
            index.write_text(index.read_text().replace('"transformer.', '"'))
        status, printed, _ = verdict(capsys, tmp_path / "out", "--against", str(tmp_path / "source"))
        assert status == 0, printed


class TestSums:
    def test_any_changed_byte(self, copied, capsys):
        """The first, a middle and the last byte of every file but the card, which is for users to edit."""
        _, output = copied(*WANDA)
        contents = {path: path.read_bytes() for path in output.iterdir() if path.name not in (SUMS, "README.md")}
        report = {path: content for path, content in contents.items() if path.name == "report.json"}
        for place in (0.0, 0.5, 1.0):
            # A report that is no JSON any more ends in one line.
            for changed in (report, {path: x for path, x in contents.items() if path not in report}):
                for path, content in changed.items():
                    at = int(place * (len(content) - 1))
                    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
                main([str(output)])
                out, err = capsys.readouterr()
                for path, content in changed.items():
                    assert f"  {path.name}: not what the run wrote" in out or f"{path}: " in err
                    path.write_bytes(content)
        assert verdict(capsys, output, summed=False)[0] == 0

    def test_refitted_weights(self, copied, capsys):
        """All other checks pass. Somebody who writes SHA256SUMS anew is found out by its digest alone."""
        _, output = copied("--keep-zeros")
        digest = file_digest(output / SUMS)
        change_tensor(output, Q, lambda tensor: -tensor)
        assert verdict(capsys, output, summed=False)[2].keys() == {"sums"}
        sum_again(output)
        assert verdict(capsys, output)[0] == 0
        assert "not the one given with --digest" in only_failure(capsys, output, "sums", "--digest", digest)

    @pytest.mark.parametrize("name", [".env", "a/b/c"])
    def test_added_files(self, name, copied, capsys):
        _, output = copied(*WANDA)
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("{}")
        assert verdict(capsys, output, summed=False)[2] == {"sums": [f"{name}: not in SHA256SUMS"]}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda sums: None, "missing"),
            (lambda sums: sums.replace("  ", " "), "is not a digest"),
            (lambda sums: f"{sums}{'0' * 64}  ../x\n", "x: missing, or not a file"),
            (lambda sums: f"{sums}{'0' * 64}  /etc/passwd\n", "/etc/passwd: a link to /etc/passwd, outside of the"),
        ],
    )
    def test_damaged_sums(self, change, message, copied, capsys):
        _, output = copied(*WANDA)
        text = change((output / SUMS).read_text())
        (output / SUMS).unlink()
        if text is not None:
            (output / SUMS).write_text(text)
        assert message in verdict(capsys, output, summed=False)[2]["sums"][0]


def in_row_5(kept, value):
    """A change of the first weight of a row that was kept, or that was removed."""

    def change(W):
        return put((5, ((W[5] != 0) == kept).nonzero()[0].item()), value)(W)

    return change


def turned(change):
    """The same change of a layer that is stored the other way round."""
    return lambda W: change(W.T).T.contiguous()


TOO_MANY = r"1 of \d+ budgets keep more than 13 of 32 weights$"
TOO_FEW = "1 of 32 budgets lose more than 19 of 32 weights$"
CHANGES = {
    "one too many": (WANDA, {}, Q, in_row_5(False, 0.5), "pattern", TOO_MANY),
    "one bit": (WANDA, {}, Q, in_row_5(True, flip_bit), "kept", "1 of 1024 values differ$"),
    "norm": (WANDA, {}, NORM, put(3, flip_bit), "others", "1 of 32 values differ$"),
    # The gate has the first 24 rows.
    "of an expert": (
        WANDA, {"family": "qwen3_moe"}, f"{EXPERT}.3.up_proj.weight", put(slice(4, 7), 0.5), "pattern",
        "3 of 48 budgets keep more than 13 of 32 weights$",
    ),
    "of a group": (
        (*WANDA, "--sparsity", "2:4"), {}, Q, in_row_5(False, 0.5), "pattern",
        "1 of 256 budgets keep more than 2 of 4 weights$",
    ),
    "of a matrix": (
        ("--sparsity", "layer:0.6", "--refit", "0"), {}, Q, in_row_5(False, 0.5), "pattern",
        "1 of 1 budgets keep more than 410 of 1024 weights$",
    ),
    "turned": (WANDA, {"family": "gpt2"}, C_PROJ, turned(in_row_5(False, 0.5)), "pattern", TOO_MANY),
    "one too few": (WANDA, {"dtype": torch.bfloat16}, Q, in_row_5(True, 0.0), "kept", TOO_FEW),
    "zero with a sign": (
        WANDA, {}, Q, in_row_5(False, -0.0), "kept", "1 of 1024 values differ$",
    ),
    "router": (WANDA, {"family": "qwen3_moe"}, ROUTER, put((1, 1), flip_bit), "others", r"1 of \d+ values differ$"),
}  # fmt: skip


@pytest.mark.parametrize("change", first_is_fast(CHANGES, 3))
def test_a_change_is_found_and_its_tensor_is_named(change, copied, capsys):
    flags, model, name, do, check, message = CHANGES[change]
    _, output = copied(*flags, **model)
    change_tensor(output, name, do)
    (failure,) = verdict(capsys, output)[2][check]
    assert re.search(f": {message}", failure), failure
    assert failure.startswith(f"{EXPERT}.gate_up_proj[3]: " if name.startswith(EXPERT) else f"{name}: ")


class TestKept:
    @pytest.mark.parametrize(("passes", "failing"), first_is_fast([(2, set()), (0, {"kept"})]))
    def test_kept_weights_may_change_where_blocks_were_reconstructed(self, passes, failing, copied, capsys):
        _, output = copied(*WANDA, "--reconstruct", str(passes))
        change_tensor(output, DOWN, lambda W: W * 2)
        assert verdict(capsys, output)[2].keys() == failing
        change_tensor(output, NORM, lambda x: x * 2)
        assert "others" in verdict(capsys, output)[2]

    def test_zeros_that_are_revived(self, copied, tmp_path, capsys):
        """Only this check finds them: the pattern allows them, and refitted weights may have any value."""
        source, output = copied("--keep-zeros")
        zeros = shutil.copytree(source, tmp_path / "zeros")
        shard = next(path for path in zeros.glob("*.safetensors") if Q in load_file(path))
        tensors = load_file(shard)
        column = tensor_of(output, Q)[2].nonzero()[0].item()
        tensors[Q][2, column] = 0
        save_file(tensors, shard, metadata={"format": "pt"})
        failure = only_failure(capsys, output, "zeros", "--against", str(zeros))
        assert failure == f"{Q}: 1 zeros of the source are not zero here"
        assert verdict(capsys, output)[0] == 0


class TestOthers:
    @pytest.mark.parametrize(
        ("family", "ignored", "stored", "name"),
        first_is_fast(
            [
                ("llama", "down_proj", DOWN, DOWN),
                ("qwen3_moe", "experts.down_proj[1]", f"{EXPERT}.1.down_proj.weight", f"{EXPERT}.down_proj[1]"),
            ]
        ),
    )
    def test_layers_that_were_not_selected(self, family, ignored, stored, name, copied, capsys):
        _, output = copied(*WANDA, "--ignore", ignored, family=family)
        change_report(output, lambda report: report["kept_dense"].remove(name))
        assert only_failure(capsys, output, "report") == f"{name}: neither pruned nor kept dense by the report"
        change_report(output, lambda report: report["kept_dense"].append(name))
        change_tensor(output, stored, put((3, 2), flip_bit))
        assert only_failure(capsys, output, "others").startswith(f"{name}: 1 of ")

    @pytest.mark.parametrize("change", [{"name": "model.layers.7.x.weight"}, {"shape": [48, 64]}])
    def test_a_layer_that_the_model_has_not(self, change, copied, capsys):
        _, output = copied(*WANDA)
        change_report(output, lambda report: report["layers"][0].update(change))
        failures = verdict(capsys, output)[2]["report"]
        assert any(failure.startswith(f"{change.get('name', Q)}: ") for failure in failures)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: None, "this tensor is missing from the checkpoint (1 in all)"),
        (lambda tensor: tensor * torch.nan, "holds 32 NaN and 0 Inf among 32 values; finite ones are needed"),
    ],
)
def test_tensors(change, message, copied, capsys):
    _, output = copied(*WANDA)
    change_tensor(output, NORM, change)
    assert verdict(capsys, output)[2]["model"] == [f"{NORM}: {message}"]


class TestSource:
    @pytest.mark.parametrize("model", ["gone", "\0"])
    def test_that_is_not_there(self, model, copied, capsys):
        source, output = copied(*WANDA)
        change_report(output, lambda report: report["arguments"].update(model=model))
        column = tensor_of(output, Q)[5].nonzero()[0].item()
        change_tensor(output, Q, put((5, column), flip_bit))
        status, printed, _ = verdict(capsys, output)
        assert status == 0
        assert re.search(r"^not compared with the source: .*; give the source with --against$", printed, re.MULTILINE)
        assert printed.endswith("\nall checks that could be made passed\n")
        # With --against the source is compared.
        assert only_failure(capsys, output, "kept", "--against", str(source)).startswith(Q)

    def test_another_model(self, pruned, tmp_path, capsys):
        _, output = pruned(*WANDA)
        other = save_model(tmp_path / "other", "llama", num_hidden_layers=2, hidden_size=64)
        assert verdict(capsys, output, "--against", str(other))[2].keys() >= {"kept", "others"}

    @pytest.mark.parametrize(
        ("against", "message"),
        [
            ("./nowhere", r"\./nowhere: no such folder"),
            ("out", "out: is the output itself"),
            ("empty", "empty: no config.json"),
        ],
    )
    def test_that_cannot_be_used(self, against, message, copied, tmp_path, capsys, monkeypatch):
        copied(*WANDA)
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path)
        refused(capsys, message, "out", "--against", against)


def test_a_packed_matrix_that_is_damaged_is_a_failed_check(copied, tmp_path, capsys):
    _, output = copied(*WANDA)
    assert pack.main([str(output), str(tmp_path / "packed")]) == 0
    for shard in (tmp_path / "packed").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-50] + b"\xff" * 50)
    assert main([str(tmp_path / "packed")]) == 1
    assert "failed: sums, model" in capsys.readouterr().out


def test_bad_input(pruned, tmp_path, capsys):
    source, output = pruned(*WANDA)
    refused(capsys, ".*nowhere: no such folder; give one that sparsefw run wrote", tmp_path / "nowhere")
    refused(capsys, ".*: no report.json in it; give a folder that sparsefw.run wrote", source)
    refused(capsys, "--digest A+: expected 64 digits", output, f"--digest={'A' * 64}")
    copy = shutil.copytree(output, tmp_path / "copy")
    change_report(copy, lambda report: report["layers"][0].update(kept="1"))
    refused(capsys, r".*report\.json: .*layers\[0\]\.kept", copy)
    change_report(copy, lambda report: report.update(layers=[]))
    refused(capsys, r".*report\.json: has no layers of the method in its arguments, wanda", copy)


@pytest.fixture(scope="module", params=first_is_fast(["bert", "whisper", "mixtral", "diffusion"]))
def stack(request, tmp_path_factory):
    """Source and output of a model in memory that was pruned on batches."""
    folder, (model, batches) = tmp_path_factory.mktemp(request.param), drawn(request.param, 2)
    (folder / "source").mkdir()
    save(model, folder / "source")
    prune(model, folder / "out", calibration=batches, **QUICK)
    return folder / "source", folder / "out"


def test_models_in_memory_on_batches(stack, capsys):
    """Whatever they read, and whoever made their class. A source has to be named."""
    source, output = stack
    status, printed, _ = verdict(capsys, output, summed=False)
    assert status == 0, printed
    assert "\nnot compared with the source: the model was in memory; give its checkpoint" in printed
    against = ("--against", str(source))
    status, printed, _ = verdict(capsys, output, *against, summed=False)
    assert status == 0, printed
    assert printed.endswith("\nall checks passed\n")
    assert row(printed, "kept") == row(printed, "pattern") > 0


@pytest.mark.parametrize("dtype", first_is_fast([torch.float32, "auto"]))
def test_a_model_in_memory_on_text(dtype, tmp_path, capsys):
    """What it was loaded from need not be what was pruned, or may have another dtype."""
    source = save_model(tmp_path / "source", "llama", torch.bfloat16, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    prune(model, tmp_path / "out", dataset=torch.ones(2, 16, dtype=torch.int64), **QUICK)
    _, printed, failures = verdict(capsys, tmp_path / "out", summed=False)
    assert not failures
    assert "\nnot compared with the source: the model was in memory; give its checkpoint" in printed
    _, printed, failures = verdict(capsys, tmp_path / "out", "--against", str(source), summed=False)
    assert not failures
    line = "the model in memory had dtype torch.float32, and the source has torch.bfloat16"
    assert (f"\nnot compared with the source: {line}\n" in printed) == (dtype != "auto")
