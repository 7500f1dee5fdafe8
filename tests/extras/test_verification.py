"""The verdict on outputs: unchanged ones pass, whatever the flags; every damage is found, and its place is named."""

import json
import re
import shutil

import pytest
import torch
from helpers.commands import report_of, tensors_of
from helpers.families import first_is_fast, save_model
from helpers.stacks import drawn
from helpers.verifying import DOWN, NORM, WANDA, Q, change_tensor, flip_bit, only_failure, passed, put, verdict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsefw import pack, prune
from sparsefw.checkpoint.files import SUMS, file_digest
from sparsefw.checkpoint.source import INDEX
from sparsefw.driver.in_memory import save
from sparsefw.verify import main

QUICK = dict(kernel="torch", method="wanda", sparsity="0.5")
EXPERTS = "model.layers.1.mlp.experts"
IN_MEMORY = "\nnot compared with the source: the model was in memory; give its checkpoint"


def row(printed, check):
    """The number of things that a check has looked at."""
    return int(re.search(rf"^{check} .* (\d+)  ok$", printed, re.MULTILINE)[1])


@pytest.mark.parametrize(
    ("family", "dtype", "flags", "layers", "others"),
    first_is_fast(
        [
            # Two norms in each of two blocks, the last norm, the embedding; and layers that are not selected.
            ("llama", torch.float32, ["--include", "mlp", "--ignore", "layers.0", "--keep-zeros"], 3, 6 + 7 + 4),
            ("llama", torch.float32, ["--sparsity", "layer:0.6", "--refit", "0"], 14, 6),
            ("llama", torch.bfloat16, ["--compare", "wanda", "--compare", "sparsegpt"], 14, 6),
            ("qwen3_moe", torch.float32, ["--ignore", "experts.down_proj[0]", "--refit", "0"], 8 + 2 * 7, None),
            ("gpt2", torch.bfloat16, ["--sparsity", "2:4", "--refit", "0"], 8, None),
        ]
    ),
)
def test_outputs_pass(family, dtype, flags, layers, others, pruned, capsys):
    """Layers that are not selected are compared with the source, like all tensors that stay as they are."""
    _, output = pruned(*flags, family=family, dtype=dtype)
    printed = passed(capsys, output)
    assert printed.endswith("\nall checks passed\n")
    assert row(printed, "pattern") == row(printed, "report") == layers
    assert others in (None, row(printed, "others"))
    assert bool(re.search("^kept ", printed, re.MULTILINE)) == ("--refit" in flags)


def test_names_that_the_model_has_not(pruned, tmp_path, capsys):
    """GPT-2 on the Hub has the names of a model without its head, and so has the output."""
    for name, folder in zip(("source", "out"), pruned(*WANDA, family="gpt2"), strict=True):
        shutil.copytree(folder, tmp_path / name)
        for path in (tmp_path / name).glob("*.safetensors"):
            save_file({k.removeprefix("transformer."): t for k, t in load_file(path).items()}, path)
        index = tmp_path / name / INDEX
        index.write_text(index.read_text().replace('"transformer.', '"'))
    passed(capsys, tmp_path / "out", "--against", str(tmp_path / "source"))


# Damages of an output


def tensor(name, change):
    return lambda output: change_tensor(output, name, change)


def in_row_5(kept, value):
    """A change of the first weight of a row that was kept, or that was removed."""

    def change(W):
        return put((5, ((W[5] != 0) == kept).nonzero()[0].item()), value)(W)

    return change


def report(change):
    """A damage of report.json by change(content)."""

    def damage(output):
        content = report_of(output)
        change(content)
        (output / "report.json").write_text(json.dumps(content))

    return damage


def a_file(name, change=lambda text: "{}"):
    """A damage of a file, or a new one; a change to None deletes it."""

    def damage(output):
        path = output / name
        text = change(path.read_text() if path.exists() else "")
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        if text is not None:
            path.write_text(text)

    return damage


KEEP_ZEROS, MIXTURE = ("--keep-zeros",), {"family": "qwen3_moe"}
LESS_DENSE = (*WANDA, "--ignore", "down_proj")
TOO_MANY = r"1 of \d+ budgets keep more than 13 of 32 weights$"
# Flags of the run, its model, the damage, the check that fails, and its only failure.
DAMAGES = {
    "one too many": (WANDA, {}, tensor(Q, in_row_5(False, 0.5)), "pattern", f"{Q}: {TOO_MANY}"),
    "kept bit": (WANDA, {}, tensor(Q, in_row_5(True, flip_bit)), "kept", f"{Q}: 1 of 1024 values differ$"),
    "norm": (WANDA, {}, tensor(NORM, put(3, flip_bit)), "others", f"{NORM}: 1 of 32 values differ$"),
    "missing": (WANDA, {}, tensor(NORM, lambda x: None), "model", f"{NORM}: this tensor is missing from the ch"),
    "NaN": (WANDA, {}, tensor(NORM, lambda x: x * torch.nan), "model", f"{NORM}: holds 32 NaN and 0 Inf among 32"),
    "shape": (WANDA, {}, report(lambda r: r["layers"][0].update(shape=[48, 64])), "report", f"{Q}: has the shape"),
    "unknown": (
        WANDA, {}, report(lambda r: r["layers"][0].update(name="x.weight")), "report",
        "x.weight: no such matrix in the model$",
    ),
    "added": (WANDA, {}, a_file("a/.env"), "sums", "a/.env: not in SHA256SUMS$"),
    "no sums": (WANDA, {}, a_file(SUMS, lambda sums: None), "sums", ".*SHA256SUMS: missing"),
    "no digests": (WANDA, {}, a_file(SUMS, lambda sums: sums.replace("  ", " ")), "sums", ".* is not a digest"),
    "elsewhere": (
        WANDA, {}, a_file(SUMS, lambda sums: f"{sums}{'0' * 64}  /etc/passwd\n"), "sums",
        "/etc/passwd: a link to /etc/passwd, outside of the",
    ),
    "not selected": (LESS_DENSE, {}, tensor(DOWN, put((3, 2), flip_bit)), "others", f"{DOWN}: 1 of "),
    "undeclared": (LESS_DENSE, {}, report(lambda r: r["kept_dense"].remove(DOWN)), "report", f"{DOWN}: neither pr"),
    "of an expert": (
        # The gate has the first 24 rows.
        WANDA, MIXTURE, tensor(f"{EXPERTS}.3.up_proj.weight", put(slice(4, 7), 0.5)), "pattern",
        rf"{re.escape(EXPERTS)}.gate_up_proj\[3\]: 3 of 48 budgets keep more than 13 of 32 weights$",
    ),
    "of a group": (
        (*WANDA, "--sparsity", "2:4"), {}, tensor(Q, in_row_5(False, 0.5)), "pattern",
        f"{Q}: 1 of 256 budgets keep more than 2 of 4 weights$",
    ),
    "of a matrix": (
        ("--sparsity", "layer:0.6", "--refit", "0"), {}, tensor(Q, in_row_5(False, 0.5)), "pattern",
        f"{Q}: 1 of 1 budgets keep more than 410 of 1024 weights$",
    ),
    "stored the other way round": (
        WANDA, {"family": "gpt2"},
        tensor("transformer.h.1.attn.c_proj.weight", lambda W: in_row_5(False, 0.5)(W.T).T.contiguous()), "pattern",
        f"transformer.h.1.attn.c_proj.weight: {TOO_MANY}",
    ),
    "one too few": (
        WANDA, {"dtype": torch.bfloat16}, tensor(Q, in_row_5(True, 0.0)), "kept",
        f"{Q}: 1 of 32 budgets lose more than 19 of 32 weights$",
    ),
    "zero with a sign": (WANDA, {}, tensor(Q, in_row_5(False, -0.0)), "kept", f"{Q}: 1 of 1024 values differ$"),
}  # fmt: skip


@pytest.mark.parametrize("name", first_is_fast(DAMAGES, 13))
def test_a_damage_is_found_and_its_place_is_named(name, copied, capsys):
    flags, model, damage, check, message = DAMAGES[name]
    _, output = copied(*flags, **model)
    damage(output)
    # SHA256SUMS is written anew for the other checks, as somebody who changes an output may do.
    failures = verdict(capsys, output, summed=check != "sums")[1]
    assert any(re.match(message, failure) for failure in failures[check]), failures


def test_any_changed_byte_is_found(copied, capsys):
    """The last byte of every file but the card, which is for users to edit."""
    _, output = copied(*WANDA)
    contents = {path: path.read_bytes() for path in output.iterdir() if path.name not in (SUMS, "README.md")}
    for path, content in contents.items():
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        main([str(output)])
        out, err = capsys.readouterr()
        # A report that is no JSON any more ends in one line.
        assert f"  {path.name}: not what the run wrote" in out or f"{path}: " in err
        path.write_bytes(content)
    digest = file_digest(output / SUMS)
    passed(capsys, output, "--digest", digest, summed=False)
    # Somebody who writes SHA256SUMS anew is found out by its digest alone.
    a_file(INDEX, lambda text: f"{text} ")(output)
    assert "not the one given with --digest" in only_failure(capsys, output, "sums", "--digest", digest)


@pytest.mark.parametrize(("passes", "failing"), first_is_fast([(2, set()), (0, {"kept"})]))
def test_kept_weights_may_change_where_blocks_were_reconstructed(passes, failing, copied, capsys):
    _, output = copied(*WANDA, "--reconstruct", str(passes))
    change_tensor(output, DOWN, lambda W: W * 2)
    assert verdict(capsys, output)[1].keys() == failing


def test_zeros_that_are_revived(copied, tmp_path, capsys):
    """Only this check finds them: the pattern allows them, and refitted weights may have any value."""
    source, output = copied(*KEEP_ZEROS)
    zeros = shutil.copytree(source, tmp_path / "zeros")
    column = tensors_of(output)[Q][2].nonzero()[0].item()
    change_tensor(zeros, Q, put((2, column), 0.0))
    failure = only_failure(capsys, output, "zeros", "--against", str(zeros))
    assert failure == f"{Q}: 1 zeros of the source are not zero here"


def test_a_packed_matrix_that_is_damaged_is_a_failed_check(copied, tmp_path, capsys):
    _, output = copied(*WANDA)
    assert pack.main([str(output), str(tmp_path / "packed")]) == 0
    for shard in (tmp_path / "packed").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-50] + b"\xff" * 50)
    assert main([str(tmp_path / "packed")]) == 1
    assert "failed: sums, model" in capsys.readouterr().out


# The source

IDS = torch.ones(2, 16, dtype=torch.int64)


def test_a_source_that_is_not_there_and_another_model(copied, tmp_path, capsys):
    source, output = copied(*WANDA)
    report(lambda r: r["arguments"].update(model="gone"))(output)
    tensor(Q, in_row_5(True, flip_bit))(output)
    printed = passed(capsys, output)
    assert re.search(r"^not compared with the source: .*; give the source with --against$", printed, re.MULTILINE)
    assert printed.endswith("\nall checks that could be made passed\n")
    assert only_failure(capsys, output, "kept", "--against", str(source)).startswith(Q)
    other = save_model(tmp_path / "other", "llama", num_hidden_layers=2, hidden_size=64)
    assert verdict(capsys, output, "--against", str(other))[1].keys() >= {"kept", "others"}


def test_bad_input_is_one_line(copied, capsys):
    source, output = copied(*WANDA)
    for message, *arguments in (
        ("no report.json in it; give a folder that sparsefw wrote", source),
        ("--digest A+: expected 64 digits", output, f"--digest={'A' * 64}"),
        ("out: is the output itself", output, "--against", output),
        (r"report\.json: has no layers of the method in its arguments, wanda", output),
    ):
        if "no layers" in message:
            report(lambda r: r.update(layers=[]))(output)
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, error = capsys.readouterr()
        assert not out
        assert re.fullmatch(f"sparsefw: .*{message}.*\n", error), error


@pytest.mark.parametrize("name", first_is_fast(["bert", "diffusion"]))
def test_models_in_memory_on_batches(name, tmp_path, capsys):
    """Whatever they read, and whoever made their class. A source has to be named."""
    (source, output), (model, batches) = (tmp_path / "source", tmp_path / "out"), drawn(name, 2)
    source.mkdir()
    save(model, source)
    prune(model, output, calibration=batches, **QUICK)
    assert IN_MEMORY in passed(capsys, output, summed=False)
    printed = passed(capsys, output, "--against", str(source), summed=False)
    assert printed.endswith("\nall checks passed\n")
    assert row(printed, "kept") == row(printed, "pattern") > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_memory_on_text(dtype, tmp_path, out, capsys):
    """What it was loaded from may have another dtype, or a tensor that the model does not use."""
    source = save_model(tmp_path / "source", "llama", torch.bfloat16, num_hidden_layers=2)
    unused = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    tensors = tensors_of(source) | unused
    (source / INDEX).unlink()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    prune(AutoModelForCausalLM.from_pretrained(source, dtype=dtype), out, dataset=IDS, **QUICK)
    printed = passed(capsys, out, "--against", str(source), summed=False)
    line = "the model in memory had dtype torch.float32, and the source has torch.bfloat16\n"
    assert (line in printed) == (dtype == torch.float32)
