"""The recovery of an output that is there: what it measures and gains, what it leaves, and what it refuses."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import contents, make_hub_cache
from helpers.commands import interrupted_at, report_of, shards, tensors_of
from helpers.families import first_is_fast, save_model
from helpers.texts import calibration_windows
from helpers.verifying import DOWN, WANDA, change_tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from sparsefw import arithmetic, pack, recover, verify
from sparsefw.data.tokens import load_tokenizer
from sparsefw.driver import distill
from sparsefw.report.content import read_report

RATE = 0.04


@pytest.fixture(autouse=True)
def low_rate(monkeypatch):
    """Few steps, on models that are made of noise, gain by low rates only."""
    monkeypatch.setattr(distill, "RATE", RATE)


def recovered(output, folder, *flags):
    assert recover.main([str(output), str(folder), *map(str, flags)]) == 0
    return folder, read_report(folder / "report.json")


def change_report(output, **arguments):
    report = report_of(output)
    report["arguments"] |= arguments
    (output / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize(
    ("family", "dtype"),
    first_is_fast([("llama", torch.bfloat16), ("gpt2", torch.float32), ("mixtral", torch.float16)]),
)
def test_kept_weights_alone_change_and_predictions_come_closer(pruned, tmp_path, capsys, family, dtype):
    _, output = pruned(*WANDA, "--eval", "default", "--eval-windows", "2", family=family, dtype=dtype)
    folder, report = recovered(output, tmp_path / "recovered", "--recover", 640)
    before, after = tensors_of(output), tensors_of(folder)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        zero = before[name] == 0
        assert bool((tensor[zero] == 0).all())
        # Biases begin as zeros, too.
        assert torch.equal(tensor, before[name]) != (tensor.dim() > 1 and bool(zero.float().mean() > 0.3))
    (recovery,) = report.recoveries
    assert recovery.after < recovery.before
    printed = capsys.readouterr().out
    assert f"python -m sparsefw.evaluate {folder} --against {output} --eval default\n" in printed
    assert (recovery.steps, recovery.data.windows, recovery.data.seed) == (19, 20, 1)
    assert verify.main([str(folder), "--digest", printed.split()[-1]]) == 0
    # Perplexities are of the weights before.
    assert read_report(output / "report.json").evaluation
    assert report.evaluation == []
    card = (folder / "README.md").read_text()
    assert "\npython -m sparsefw.recover pruned recovered --dataset text.txt --recover 640 --seed 1\n" in card
    assert "\nThe recovery by device cpu (" in card
    assert "recovered on 20 windows of 32 tokens of " in (folder / "report.html").read_text()
    if family == "llama":
        again, _ = recovered(output, tmp_path / "again", "--recover", 640)
        assert {**contents(again), "README.md": b""} == {**contents(folder), "README.md": b""}
        assert pack.main([str(folder), str(tmp_path / "packed")]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_steps_are_those_of_the_definition(pruned, tmp_path, monkeypatch, dtype):
    """In half precision, that of a processor which computes in fp32: the loss is of the rounded weights."""
    monkeypatch.setattr(arithmetic, "computes_in_fp32", lambda dtype, device: True)
    source, output = pruned(*WANDA, dtype=dtype)
    folder, report = recovered(output, tmp_path / "recovered", "--recover", 64)
    text = output.parent / "text.txt"
    ids = calibration_windows(load_tokenizer(source), str(text), nsamples=6, seqlen=32, seed=1).ids[:2]
    models = [AutoModelForCausalLM.from_pretrained(x, dtype=torch.float64) for x in (source, output, folder)]
    dense, *both = (model(ids).logits.log_softmax(-1) for model in models)
    # Kullback and Leibler's divergence of both windows, the first of which is held out.
    before, after = ((dense.exp() * (dense - x)).sum(-1).mean(1) for x in both)
    (recovery,) = report.recoveries
    assert [before[0].item(), after[0].item()] == pytest.approx([recovery.before, recovery.after], rel=1e-4)
    if dtype == torch.bfloat16:
        return
    before[1].backward()
    start, moved = (model.get_parameter(DOWN) for model in models[1:])
    kept, gradient = start != 0, start.grad
    # Adam's first step is the rate over the square root of the number of blocks, against the sign of the gradient.
    rate = RATE / math.sqrt(2) * start[kept].square().mean().sqrt() / math.sqrt(start.shape[1])
    clear = kept & (gradient.abs() > 0.01 * gradient.abs().max())
    assert clear.sum() > 0.8 * kept.sum()
    assert torch.allclose((moved - start)[clear], -rate * gradient[clear].sign(), rtol=1e-2)


def test_windows_may_be_longer_than_those_of_the_run(output, tmp_path):
    folder, report = recovered(output, tmp_path / "recovered", "--seqlen", 64)
    # By default a recovery after 6 windows takes four times their tokens.
    assert report.recoveries[0].data.windows == 12
    assert "--recover 768 --seed 1 --seqlen 64\n" in (folder / "README.md").read_text()


def test_steps_give_the_same_bits_or_name_what_does_not(output, tmp_path, capsys, monkeypatch):
    forward, (warns, refuses) = LlamaMLP.forward, (1, 2)
    for varies in (False, True):
        modes = []

        def back(gradient, modes=modes, varies=varies):
            modes.append(torch.get_deterministic_debug_mode())
            if varies:
                torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

        def watched(mlp, x, back=back):
            if x.requires_grad:
                x.register_hook(back)
            return forward(mlp, x)

        # Weights of the last MLP would have moved in the step that is refused.
        monkeypatch.setattr(LlamaMLP, "forward", watched)
        recovered(output, tmp_path / str(varies), "--recover", 128)
        assert modes.count(refuses if varies else warns) == varies
        assert ("another run may give other bits: put_" in capsys.readouterr().out) == varies
    assert shards(tmp_path / "True") == shards(tmp_path / "False")


def test_each_recovery_has_other_windows(output, tmp_path):
    first, _ = recovered(output, tmp_path / "first", "--recover", 128)
    second, report = recovered(first, tmp_path / "second", "--recover", 640)
    assert [x.data.seed for x in report.recoveries] == [1, 2]
    flags = "--dataset text.txt --recover 640 --seed 2"
    assert f"python -m sparsefw.recover recovered-1 second {flags}\n" in (second / "README.md").read_text()


def test_what_was_pruned_is_found_in_the_hub_or_named(pruned, copied, tmp_path, hub, monkeypatch):
    source, _ = pruned(*WANDA)
    _, output = copied(*WANDA)
    make_hub_cache(source, hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change_report(output, model="org/name")
    for flags, model in (((), "org/name"), (("--model", source), str(source))):
        _, report = recovered(output, tmp_path / f"recovered{len(flags)}", "--recover", 128, *flags)
        assert report.recoveries[0].model == model


def test_weights_without_gradients_stay(output, tmp_path, monkeypatch):
    """Such as those that choose what a sparse attention looks at."""
    monkeypatch.setattr(LlamaMLP, "forward", lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x).detach()))
    folder, _ = recovered(output, tmp_path / "recovered", "--recover", 256)
    before, after = tensors_of(output), tensors_of(folder)
    assert torch.equal(*(x["model.layers.1.mlp.up_proj.weight"] for x in (before, after)))
    assert not torch.equal(before[DOWN], after[DOWN])


def test_what_cannot_be_recovered_is_refused(pruned, copied, tmp_path, capsys):
    source, output = pruned(*WANDA)
    _, old = copied(*WANDA)
    change_report(old, seqlen=None)
    same, retrained, damaged = (tmp_path / name for name in ("same", "retrained", "damaged"))
    for of, folder, name, value in (
        (output, same, DOWN, None),
        (source, retrained, "model.norm.weight", 1.5),
        (output, damaged, DOWN, math.nan),
    ):
        shutil.copytree(of, folder)
        if value:
            change_tensor(folder, name, lambda x, value=value: x.index_fill(0, torch.tensor(0), value))
    half = save_model(tmp_path / "half", "llama", torch.bfloat16, num_hidden_layers=2)
    assert pack.main([str(output), str(tmp_path / "packed")]) == 0
    another = "not the model that was pruned; give the dense model with --model"
    for pruned_folder, *flags, message in (
        (source, "no report.json in it"),
        (tmp_path / "packed", "python -m sparsefw.unpack makes it dense again"),
        (old, "arguments.seqlen: expected int"),
        (damaged, "the pruned model: its predictions are NaN or Inf"),
        (output, "--model", half, another),
        (output, "--model", retrained, another),
        (output, "--model", output, "is the output itself"),
        (output, "--model", tmp_path / "packed", "packed: is pruned, too; give the dense model with --model"),
        (output, "--model", same, "same: is pruned, too; give the dense model with --model"),
        (output, "--recover", 0, "--recover 0: there is nothing to do"),
        (output, "--host-memory", 0.1, "--host-memory 0.1: this run needs at least "),
    ):
        capsys.readouterr()
        assert recover.main([str(pruned_folder), str(tmp_path / "x"), "--restart", *map(str, flags)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    # The model that was pruned had these weights already, so it was as sparse.
    report = report_of(same)
    report["blocks"][0]["zeros"] = 1.0
    (same / "report.json").write_text(json.dumps(report))
    assert recover.main([str(same), str(tmp_path / "x"), "--model", str(output), "--restart"]) == 1
    assert "nothing is gained" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()
    for folder in (source, output):
        assert recover.main([str(output), str(folder)]) == 2
        assert ", which is read; choose another folder" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_before_the_steps(output, tmp_path, capsys, monkeypatch):
    x = tmp_path / "x"
    with interrupted_at(8):
        assert pack.main([str(output), str(x)]) == 130
    monkeypatch.setattr(distill, "_fit", None)
    size = sum(x.nbytes for x in tensors_of(output).values())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size - 1))
    for folder, message in (
        (x, "an unfinished run of other input is there"),
        (tmp_path / "new" / "y", "GB are still to be written, and the disk has 0.00 GB free"),
    ):
        assert recover.main([str(output), str(folder)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("n", [8, 24, 34])
def test_an_interrupted_one_goes_on(output, tmp_path, capsys, n):
    """While blocks are copied, between the steps and the end, and at the end."""
    expected, _ = recovered(output, tmp_path / "x", "--recover", 128)
    shutil.move(expected, tmp_path / "expected")
    with interrupted_at(n):
        assert recover.main([str(output), str(tmp_path / "x"), "--recover", "128"]) == 130
    assert "shards are finished: the same command goes on from there" in capsys.readouterr().err
    assert recover.main([str(output), str(tmp_path / "x"), "--seed", "7"]) == 2
    assert "an unfinished run of other input is there: --seed was 1, and is 7" in capsys.readouterr().err
    folder, _ = recovered(output, tmp_path / "x", "--recover", 128)
    assert contents(folder) == contents(tmp_path / "expected")


def test_no_step_goes_on_with_another_text(pruned, tmp_path, monkeypatch, capsys):
    """Nor with another dense model."""
    source, output = pruned(*WANDA)
    text, dense = tmp_path / "t.txt", shutil.copytree(source, tmp_path / "dense")
    flags = [f"{output}", f"{tmp_path}/x", f"--model={dense}", f"--dataset={text}", "--recover=640"]
    monkeypatch.setattr("sparsefw.driver.saves.Progress.is_due", True)
    text.write_text("One two three. " * 9999)
    with interrupted_at(26, lambda: [][0]):
        assert recover.main(flags)
    min(dense.glob("*.safetensors")).touch()
    assert recover.main(flags) == 2
    assert "the dense model's files was" in capsys.readouterr().err
    text.write_text("Four five six. " * 9999)
    recover.main([*flags, f"--model={source}"])
    assert "begin again: their number, hours" in capsys.readouterr().out


def test_the_model_writes_the_text(output, tmp_path):
    folder, _ = recovered(output, tmp_path / "recovered", "--dataset", "self", "--recover", 1280)
    assert len((folder / "calibration.jsonl").read_text().splitlines()) == 6
