"""The block loop: the inputs that a block is calibrated on, and the errors and times that are measured."""

import functools
import re
from collections import Counter
from itertools import count

import pytest
import torch
from helpers.commands import make_place, report_of, run
from helpers.families import save_model
from helpers.texts import calibration_windows
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import modeling_llama

from sparsefw.driver import prune as driver
from sparsefw.model.activations import BATCH_TOKENS
from sparsefw.model.hidden_states import HiddenStates
from sparsefw.report.content import read_report

FEW_STEPS = ["--steps", "9", "--reconstruct", "0", "--recover", "0", "--damp", "0.1"]


def prune(folder, *flags, family="llama", **changes):
    """Prune a small model on a few windows, in a folder; returns the exit status, and the report if there is one."""
    if not (folder / "model").exists():
        make_place(folder, family, **changes)
    windows = ["--nsamples", "40", "--precision", "ieee"]
    status = run(folder / "model", folder / "text.txt", folder / "out", *windows, *flags)
    return status, None if status else report_of(folder / "out")


def dense_and_pruned(folder):
    """The model before and after, and the calibration windows."""
    ids = calibration_windows(
        AutoTokenizer.from_pretrained(folder / "model"), str(folder / "text.txt"), nsamples=40, seqlen=32, seed=0
    ).ids
    return *(AutoModelForCausalLM.from_pretrained(folder / name) for name in ("model", "out")), ids


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A model pruned by magnitude; its dense and pruned forms, the report and the calibration windows."""
    folder = tmp_path_factory.mktemp("pruned")
    _, report = prune(folder, "--method", "magnitude")
    dense, sparse, ids = dense_and_pruned(folder)
    return dense, sparse, report, ids


@torch.no_grad()
def seen_by(model, ids):
    """The inputs of all modules with weights inside the blocks, by name, as matrices in double; and hidden states."""
    seen = {}

    def keep(module, x, name):
        seen[name] = x[0].reshape(-1, x[0].shape[-1]).double()

    handles = [
        module.register_forward_pre_hook(functools.partial(keep, name=name))
        for name, module in model.named_modules()
        if ".layers." in name and hasattr(module, "weight")
    ]
    hidden = model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return seen, hidden


def test_blocks_are_calibrated_on_what_the_pruned_blocks_before_them_give(pruned):
    """The error of every layer is that of its definition, ||W X - (M * W) X||^2, with hooks in the whole model."""
    dense, sparse, report, ids = pruned
    errors = {row["name"]: row["error"] for row in report["layers"]}
    assert len(errors) == 3 * 7
    for i in range(3):
        # With the blocks before i pruned and block i dense, its inputs are those of the calibration.
        block = sparse.model.layers[i]
        after = {name: x.clone() for name, x in block.state_dict().items()}
        block.load_state_dict(dense.model.layers[i].state_dict())
        seen, _ = seen_by(sparse, ids)
        block.load_state_dict(after)
        for name, W in dense.model.layers[i].state_dict().items():
            if W.dim() == 2:
                layer = f"model.layers.{i}.{name}"
                outputs = seen[layer.removesuffix(".weight")] @ (W - after[name]).double().T
                assert errors[layer] == pytest.approx(outputs.square().sum().item(), rel=1e-3)


def test_layers_approximate_what_the_dense_model_puts_out(tmp_path):
    """Less is lost in every block than where a layer approximates its own output."""
    lost = []
    for target in ("dense", "layer"):
        _, report = prune(tmp_path, *FEW_STEPS, "--target", target, "--overwrite")
        assert {row["target"] for row in report["layers"]} == {target}
        dense, sparse, ids = dense_and_pruned(tmp_path)
        (_, expected), (_, hidden) = seen_by(dense, ids), seen_by(sparse, ids)
        lost.append([(a - b).square().sum() for a, b in zip(expected[1:], hidden[1:], strict=True)])
    assert all(a < b for a, b in zip(*lost, strict=True))


def test_experts_that_no_token_reaches_are_no_model(tmp_path, out, capsys):
    """Which experts are reached is known only when their block has run."""
    (text := tmp_path / "text.txt").write_text("all tokens of so few words reach few experts. " * 9)
    folder = save_model(tmp_path / "model", "mixtral", num_hidden_layers=1, num_local_experts=32, num_experts_per_tok=1)
    few = ["--nsamples", "2", "--seqlen", "4", "--method", "wanda"]
    assert run(folder, text, tmp_path / "all", *few) == 0
    kept_dense = report_of(tmp_path / "all")["kept_dense"]
    idle = next(name for name in kept_dense if "[" in name)
    assert run(folder, text, out, *few, "--include", "re:" + re.escape(idle)) == 2
    assert "nothing was pruned: no calibration token reaches the selected experts" in capsys.readouterr().err
    assert not out.exists()


def test_windows_run_no_more_than_they_must_around_the_blocks_that_are_pruned(tmp_path, monkeypatch):
    """Before the first such block all hidden states are dense; after the last one nothing is calibrated."""
    flags = ["--include", "layers.1", "--compare", "magnitude", "--eval", str(tmp_path / "text.txt"), *FEW_STEPS]
    ran, advance = Counter(), HiddenStates.advance
    monkeypatch.setattr(HiddenStates, "advance", lambda self, i, *block: (ran.update([i]), advance(self, i, *block)))
    _, once = prune(tmp_path, *flags, "--eval-windows", "2")
    # Two kinds of windows; then those of the evaluation in three models.
    assert (ran[0], ran[2]) == (2, 3)
    monkeypatch.setattr(driver, "pass_block", driver.prune_block)
    _, each = prune(tmp_path, *flags, "--eval-windows", "2", "--overwrite")
    assert each["evaluation"] == once["evaluation"]
    assert [layer["error"] for layer in each["layers"]] == [layer["error"] for layer in once["layers"]]
    assert each["kept_dense"] == once["kept_dense"]


def test_a_stage_is_measured_with_weights_as_they_are_written(tmp_path, monkeypatch):
    """The checkpoint is in bf16, and computed in fp32. Each stage but the first follows one with other weights."""
    measure, measured = driver.measure_stage, []

    def checked(run, i, *given):
        weights = [x for name, x in run.model.blocks[i].named_parameters() if x.dim() == 2]
        measured.append(all(x.dtype == torch.float32 and torch.equal(x, x.bfloat16().float()) for x in weights))
        return measure(run, i, *given)

    monkeypatch.setattr(driver, "measure_stage", checked)
    monkeypatch.setattr("sparsefw.arithmetic.computes_in_fp32", lambda *_: True)
    assert prune(tmp_path, *FEW_STEPS, "--method", "sparsefw", dtype=torch.bfloat16)[0] == 0
    assert measured == [True] * 3 * 4


def test_what_a_compared_method_left_dense_is_not_called_dense(tmp_path):
    flags = ["--nsamples", "2", "--seqlen", "8", "--sparsity", "0.8", "--method", "wanda", "--compare", "magnitude"]
    _, report = prune(tmp_path, *flags, family="mixtral", num_local_experts=32, num_experts_per_tok=1)
    wanda, magnitude = ({x["name"] for x in report["layers"] if x["method"] == m} for m in ("wanda", "magnitude"))
    # Other tokens come to the experts of the later blocks.
    assert wanda - magnitude
    assert magnitude - wanda <= set(report["kept_dense"])
    assert wanda.isdisjoint(report["kept_dense"])


def test_next_block_is_read_and_the_last_one_written_beside_the_work(pruned):
    _, _, report, _ = pruned
    spans = report["timeline"]

    def of(lane, block, *phases):
        found = [s for s in spans if s["lane"] == lane and s["block"] == block and (s["phase"] in phases or not phases)]
        return min(s["start"] for s in found), max(s["end"] for s in found)

    for i in range(2):
        assert of("read", i + 1)[0] < of("main", i, "calibrate", "solve")[1]
        assert of("write", i)[0] < of("main", i + 1, "calibrate", "solve")[1]
    for i, block in enumerate(report["blocks"]):
        spent = sum(s["end"] - s["start"] for s in spans if s["lane"] == "main" and s["block"] == i)
        assert sum(block["seconds"].values()) == pytest.approx(spent)


def test_a_full_gpu_takes_half_the_windows_at_a_time(tmp_path, out, text, monkeypatch, capsys):
    """From the last finished block on, and so does a run that goes on with what is finished."""
    source = save_model(tmp_path / "model", "llama")
    flags = ["--eval", str(text), "--eval-windows", "3", "--nsamples", "9", "--method", "wanda"]
    for device in BATCH_TOKENS:
        monkeypatch.setitem(BATCH_TOKENS, device, 4 * 32)
    assert run(source, text, tmp_path / "whole", *flags) == 0
    prune, raised, batches = driver.prune_block, [(2, KeyboardInterrupt), (1, torch.OutOfMemoryError)], []

    def full(run, i, *args):
        batches.append((i, run.placement.batch))
        # Its layers are written in place.
        pruned = prune(run, i, *args)
        if raised and raised[-1][0] == i:
            raise raised.pop()[1]
        return pruned

    monkeypatch.setattr(driver, "prune_block", full)
    assert run(source, text, out, *flags) == 130
    assert "out of memory on the GPU: continuing with 2 windows at a time\n" in capsys.readouterr().out
    assert batches == [(0, 4), (1, 4), (1, 2), (2, 2)]
    assert run(source, text, out, *flags) == 0
    assert batches[4:] == [(2, 2)]
    whole, report = (read_report(tmp_path / name / "report.json") for name in ("whole", "out"))
    assert report.memory.batch_windows == 2
    assert [(x.name, x.kept) for x in report.layers] == [(x.name, x.kept) for x in whole.layers]
    assert report.evaluation[0].perplexity == pytest.approx(whole.evaluation[0].perplexity, rel=1e-3)


@pytest.mark.parametrize("method", ["sparsefw", "wanda"])
def test_a_layer_that_only_real_data_reaches_is_refused(method, tmp_path, monkeypatch, capsys):
    """Without weights, nothing but zeros comes to it."""
    forward = modeling_llama.LlamaMLP.forward

    def branching(self, x):
        return forward(self, x) if x.abs().max() > 0 else self.down_proj(self.gate_proj(x))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", branching)
    few_steps = FEW_STEPS if method == "sparsefw" else []
    assert prune(tmp_path, "--nsamples", "2", "--method", method, *few_steps, num_hidden_layers=1) == (2, None)
    assert "model.layers.0.mlp.up_proj.weight: unsupported model" in capsys.readouterr().err


def test_a_kind_of_block_that_does_not_run_in_parts_is_named_once(tmp_path, monkeypatch, capsys):
    """Every call rounds in another way, as algorithms that add up in any order do."""
    forward, calls = modeling_llama.LlamaMLP.forward, count()
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x) * (1 + next(calls) / 1e6))
    _, report = prune(tmp_path, *FEW_STEPS, "--nsamples", "2")
    said = "every stage of this block and of similar ones begins at its start: its parts give other bits than the whole"
    lines = [line for line in capsys.readouterr().out.splitlines() if said in line]
    assert [line.partition(":")[0] for line in lines] == ["model.layers.0"]
    assert {block["way"] for block in report["blocks"]} == {"stage by stage, from the start"}
