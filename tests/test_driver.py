"""The block loop: which inputs a block is calibrated on, and what is measured on the way."""

import functools
import json

import pytest
import torch
from families import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsefw import data
from sparsefw.run import main

TEXT = "".join(f"{n}: a rose is a rose is a rose, {n % 7} times.\n" for n in range(300))


@pytest.fixture
def pruned(tmp_path):
    """A model pruned by magnitude; its dense and pruned forms, the report and the calibration windows."""
    source = save_model(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--nsamples", "40", "--seqlen", "32", "--method", "magnitude", "--kernel", "torch", "--precision", "ieee"]
    places = ["--model", str(source), "--dataset", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    assert main([*places, *flags]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = data.calibration_windows(tokenizer, str(tmp_path / "text.txt"), nsamples=40, seqlen=32, seed=0)
    assert windows.hash == report["data"]["hash"]
    dense, sparse = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    return dense, sparse, report, windows.ids


def test_blocks_are_calibrated_on_what_the_pruned_blocks_before_them_give(pruned):
    """The error of every layer against its definition, ||W X - (M * W) X||^2, with hooks in the whole model."""
    dense, sparse, report, ids = pruned
    errors = {row["name"]: row["error"] for row in report["layers"]}
    assert len(errors) == 3 * 7
    for i in range(3):
        # Blocks before i pruned, block i dense: its inputs are those of the calibration.
        block = sparse.model.layers[i]
        after = {name: p.clone() for name, p in block.named_parameters()}
        block.load_state_dict(dense.model.layers[i].state_dict())
        truth = {}

        def hook(module, x, name, after=after, truth=truth):
            removed = (module.weight - after[f"{name}.weight"]).double()
            truth[name] = (x[0].double() @ removed.T).square().sum().item()

        linears = [(name, m) for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
        handles = [m.register_forward_pre_hook(functools.partial(hook, name=name)) for name, m in linears]
        with torch.no_grad():
            sparse(ids)
        for handle in handles:
            handle.remove()
        block.load_state_dict(after)
        for name, error in truth.items():
            assert errors[f"model.layers.{i}.{name}.weight"] == pytest.approx(error, rel=1e-3)


def test_seconds_and_memory_are_reported(pruned):
    _, _, report, _ = pruned
    assert {"embed", "read", "calibrate", "solve", "forward", "write"} <= set(report["seconds"])
    assert report["seconds"]["solve"] >= sum(row["seconds"] for row in report["layers"])
    assert report["peak_memory"]["host_bytes"] > 2**26
