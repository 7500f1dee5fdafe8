"""The recovery of a pruned checkpoint: what it measures and gains, what it leaves as it was, and what it refuses."""

import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import contents, make_hub_cache
from helpers.commands import interrupt, interrupted_at, tensors_of
from helpers.families import first_is_fast, save_model
from helpers.pretended_gpu import late_copies, pretended_gpu
from helpers.verifying import DOWN, WANDA
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from sparsefw import arithmetic, pack, recover, verify
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import calibration_windows
from sparsefw.extras import recovery
from sparsefw.extras.recovery import RATE
from sparsefw.report.content import read_report
from sparsefw.solver.config import PruneConfig


def recovered(output, folder, *flags):
    assert recover.main([str(output), str(folder), *map(str, flags)]) == 0
    return folder, read_report(folder / "report.json")


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def divergence(dense, pruned, ids):
    """Kullback and Leibler's, mean over tokens."""
    log_p, log_q = (model(ids).logits.log_softmax(-1) for model in (dense, pruned))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


@pytest.mark.parametrize(
    ("family", "dtype"),
    first_is_fast(
        [
            ("llama", torch.bfloat16),
            ("llama", torch.float32),
            ("gpt2", torch.float32),
            ("mixtral", torch.float32),
            ("qwen3", torch.float16),
        ]
    ),
)
def test_kept_weights_alone_change_and_predictions_come_closer(pruned, tmp_path, capsys, family, dtype):
    _, output = pruned(*WANDA, "--eval", "default", "--eval-windows", "2", family=family, dtype=dtype)
    folder, report = recovered(output, tmp_path / "recovered", "--nsamples", 20)
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
    assert (recovery.steps, recovery.data.windows, recovery.data.seed) == (19, 20, 1)
    digest = capsys.readouterr().out.split()[-1]
    assert verify.main([str(folder), "--digest", digest]) == 0
    assert "all checks passed" in capsys.readouterr().out
    # Perplexities are of the weights before.
    assert read_report(output / "report.json").evaluation
    assert report.evaluation == []
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    words = "recovered on 20 windows of 32 tokens of ", "text.txt: divergence", "errors of layers are those before"
    assert all(word in text for word in words for text in (card, page))
    flags = "--dataset text.txt --nsamples 20 --seqlen 32 --seed 1"
    assert f"--output pruned\npython -m sparsefw.recover pruned recovered {flags}\n" in card
    again, _ = recovered(output, tmp_path / "again", "--nsamples", 20)
    assert {**contents(again), "README.md": b""} == {**contents(folder), "README.md": b""}
    if family == "llama":
        assert pack.main([str(folder), str(tmp_path / "packed")]) == 0


def test_a_gpu_gives_the_same(pruned, tmp_path, monkeypatch):
    _, output = pruned(*WANDA)
    monkeypatch.setattr(recovery, "PruneConfig", partial(PruneConfig, kernel="torch"))
    folder, _ = recovered(output, tmp_path / "cpu", "--nsamples", 20)
    pending = late_copies(monkeypatch)
    with pretended_gpu():
        on_gpu, _ = recovered(output, tmp_path / "gpu", "--nsamples", 20)
    assert not pending
    assert tensors_of(on_gpu).keys() == tensors_of(folder).keys()
    assert all(torch.equal(tensor, tensors_of(folder)[name]) for name, tensor in tensors_of(on_gpu).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_steps_are_those_of_the_definition(pruned, tmp_path, monkeypatch, dtype):
    """In half precision, that of a processor which computes in fp32: the loss is of the rounded weights."""
    monkeypatch.setattr(arithmetic, "computes_in_fp32", lambda dtype, device: True)
    source, output = pruned(*WANDA, dtype=dtype)
    folder, report = recovered(output, tmp_path / "recovered", "--nsamples", 2)
    text = output.parent / "text.txt"
    ids = calibration_windows(load_tokenizer(source), str(text), nsamples=2, seqlen=32, seed=1).ids
    dense, pruned_model, after = map(model_of, (source, output, folder))
    (recovery,) = report.recoveries
    for model, loss in ((pruned_model, recovery.before), (after, recovery.after)):
        assert divergence(dense, model, ids[1:]).item() == pytest.approx(loss, rel=1e-4)
    if dtype == torch.bfloat16:
        return
    divergence(dense, pruned_model, ids[:1]).backward()
    before, moved = (model.get_parameter(DOWN) for model in (pruned_model, after))
    kept, gradient = before != 0, before.grad
    # Adam's first step is the rate, against the sign of the gradient.
    rate = RATE * before[kept].square().mean().sqrt() / math.sqrt(before.shape[1])
    clear = kept & (gradient.abs() > 0.01 * gradient.abs().max())
    assert clear.sum() > 0.8 * kept.sum()
    steps = (moved - before)[clear]
    assert torch.allclose(steps, -rate * gradient[clear].sign(), rtol=1e-2)


class Watched(torch.autograd.Function):
    """The identity. On the way back it keeps torch's mode, and does what torch may refuse."""

    @staticmethod
    def forward(ctx, x, modes, refused):
        ctx.modes, ctx.refused = modes, refused
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.modes.append(torch.get_deterministic_debug_mode())
        if ctx.refused:
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return gradient, None, None


def test_steps_give_the_same_bits_or_name_what_does_not(pruned, tmp_path, capsys, monkeypatch):
    _, output = pruned(*WANDA)
    forward, warns, refuses = LlamaMLP.forward, 1, 2
    for refused in (False, True):
        modes = []
        with monkeypatch.context() as patched:
            # Weights of the last MLP would have moved by then.
            patched.setattr(LlamaMLP, "forward", lambda mlp, x, w=(modes, refused): forward(mlp, Watched.apply(x, *w)))
            recovered(output, tmp_path / str(refused), "--nsamples", 20)
        assert modes.count(refuses if refused else warns) == refused
        assert ("another run may give other bits: put_" in capsys.readouterr().out) == refused
    with monkeypatch.context() as patched:
        patched.setattr(LlamaMLP, "forward", lambda mlp, x: forward(mlp, x).view(3, 5, 7, 11))
        assert recover.main([str(output), str(tmp_path / "none"), "--nsamples", "20"]) != 0
    one, other = (tensors_of(tmp_path / name) for name in ("True", "False"))
    assert all(torch.equal(x, other[name]) for name, x in one.items())


def test_each_recovery_has_other_windows(pruned, tmp_path):
    _, output = pruned(*WANDA)
    first, _ = recovered(output, tmp_path / "first", "--nsamples", 20)
    second, report = recovered(first, tmp_path / "second", "--nsamples", 40)
    assert [x.data.seed for x in report.recoveries] == [1, 2]
    lines = [line for line in (second / "README.md").read_text().splitlines() if "sparsefw." in line]
    flags = [f"--dataset text.txt --nsamples {n} --seqlen 32 --seed {seed}" for n, seed in ((20, 1), (40, 2))]
    assert lines[-2] == f"python -m sparsefw.recover pruned recovered-1 {flags[0]}"
    assert lines[-1] == f"python -m sparsefw.recover recovered-1 second {flags[1]}"


def test_what_was_pruned_is_found_in_the_hub_or_named(pruned, copied, tmp_path, hub, monkeypatch):
    source, _ = pruned(*WANDA)
    _, output = copied(*WANDA)
    make_hub_cache(source, hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    report = json.loads((output / "report.json").read_text())
    report["arguments"]["model"] = "org/name"
    (output / "report.json").write_text(json.dumps(report))
    for flags, model in (((), "org/name"), (("--model", source), source.name)):
        folder, report = recovered(output, tmp_path / f"recovered{len(flags)}", "--nsamples", 20, *flags)
        assert report.recoveries[0].model == str(flags[1] if flags else model)
        named = f" --model {model}" if flags else ""
        assert f"sparsefw.recover pruned {folder.name}{named} --dataset" in (folder / "README.md").read_text()


def test_weights_without_gradients_stay(pruned, tmp_path, monkeypatch):
    """Such as those that choose what a sparse attention looks at."""
    _, output = pruned(*WANDA)
    monkeypatch.setattr(LlamaMLP, "forward", lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x).detach()))
    folder, _ = recovered(output, tmp_path / "recovered", "--nsamples", 20)
    before, after = tensors_of(output), tensors_of(folder)
    assert torch.equal(*(x["model.layers.1.mlp.up_proj.weight"] for x in (before, after)))
    assert not torch.equal(before[DOWN], after[DOWN])


def test_what_cannot_be_recovered_is_refused(pruned, copied, tmp_path, capsys):
    source, output = pruned(*WANDA)
    shutil.copytree(output, tmp_path / "same")
    other = save_model(tmp_path / "other", "llama", num_hidden_layers=3)
    half = save_model(tmp_path / "half", "llama", torch.bfloat16, num_hidden_layers=2)
    _, old = copied(*WANDA)
    report = json.loads((old / "report.json").read_text())
    del report["arguments"]["seqlen"]
    (old / "report.json").write_text(json.dumps(report))
    assert pack.main([str(output), str(tmp_path / "packed")]) == 0
    retrained, damaged = tmp_path / "retrained", tmp_path / "damaged"
    for folder, of, name, value in (
        (retrained, source, "model.norm.weight", 1.5),
        (damaged, output, DOWN, math.nan),
    ):
        shutil.copytree(of, folder)
        for shard in folder.glob("*.safetensors"):
            tensors = load_file(shard)
            if name in tensors:
                tensors[name].view(-1)[0] = value
            save_file(tensors, shard, {"format": "pt"})
    for pruned_folder, flags, message in (
        (source, (), "no report.json in it"),
        (tmp_path / "packed", (), "sparsefw unpack makes it dense again"),
        (output, ("--model", other), "not the model that was pruned; give the dense model with --model"),
        (output, ("--model", half), "not the model that was pruned; give the dense model with --model"),
        (output, ("--model", output), "is the output itself"),
        (old, (), "arguments.seqlen: missing; prune again with this version of sparsefw"),
        (output, ("--nsamples", 1), "--nsamples 1: give two windows or more"),
        (output, ("--host-memory", 0.1), "--host-memory 0.1: this run needs at least "),
        (output, ("--model", retrained), "not the model that was pruned; give the dense model with --model"),
        (damaged, (), "the pruned model: its predictions are NaN or Inf"),
        (
            output,
            ("--model", tmp_path / "same"),
            "both models predict the same, so nothing can be recovered; give the dense model with --model",
        ),
        (output, ("--dataset", tmp_path / "none.txt"), "none.txt"),
    ):
        capsys.readouterr()
        assert recover.main([str(pruned_folder), str(tmp_path / "x"), *map(str, flags)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()
    before = contents(source)
    assert recover.main([str(output), str(source), "--overwrite"]) == 2
    assert ", which is read; choose another folder" in capsys.readouterr().err
    assert contents(source) == before


def test_what_cannot_be_written_is_refused_before_the_steps(pruned, tmp_path, capsys, monkeypatch):
    _, output = pruned(*WANDA)
    x = tmp_path / "x"
    with monkeypatch.context() as patched:
        interrupted_at(patched, 8)
        assert pack.main([str(output), str(x)]) == 130
    monkeypatch.setattr(recovery, "_fit", None)
    size = sum(x.nbytes for x in tensors_of(output).values())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=size - 1))
    for folder, message in (
        (x, "has an unfinished run with other input; discard it with --restart"),
        (tmp_path / "new" / "y", "GB are still to be written, and the disk has 0.00 GB free"),
    ):
        assert recover.main([str(output), str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_an_interrupted_one_says_that_it_begins_anew(pruned, tmp_path, capsys, monkeypatch):
    _, output = pruned(*WANDA)
    monkeypatch.setattr(recovery, "_fit", lambda *args: interrupt())
    assert recover.main([str(output), str(tmp_path / "x")]) == 130
    assert "interrupted; a recovery makes its steps again" in capsys.readouterr().err


def test_another_one_that_was_interrupted_while_it_wrote_does_not_matter(pruned, tmp_path, monkeypatch, capsys):
    _, output = pruned(*WANDA)
    expected, _ = recovered(output, tmp_path / "expected", "--nsamples", 20)
    with monkeypatch.context() as patched:
        interrupted_at(patched, 8)
        assert recover.main([str(output), str(tmp_path / "x"), "--nsamples", "40"]) == 130
    assert "shards are finished; a recovery makes its steps again" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**3))
        patched.setattr(recovery, "_fit", None)
        assert recover.main([str(output), str(tmp_path / "x"), "--nsamples", "20"]) == 2
    assert "the disk has" in capsys.readouterr().err
    folder, _ = recovered(output, tmp_path / "x", "--nsamples", 20)
    assert all(torch.equal(x, tensors_of(expected)[name]) for name, x in tensors_of(folder).items())


def test_a_full_host_is_no_fault_of_the_model(pruned, tmp_path, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    _, output = pruned(*WANDA)
    monkeypatch.setattr(LlamaMLP, "forward", full)
    assert recover.main([str(output), str(tmp_path / "x")]) == 1
    assert "the host's memory is full" in capsys.readouterr().err


def test_several_processes_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert recover.main([str(tmp_path), str(tmp_path / "x")]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_the_model_writes_the_text(pruned, tmp_path):
    _, output = pruned(*WANDA)
    folder, report = recovered(output, tmp_path / "recovered", "--dataset", "self", "--seed", 7)
    assert report.recoveries[0].data.source.startswith("self (T=")
    assert len((folder / "calibration.jsonl").read_text().splitlines()) == 6
