"""The sweep: classes that are made in other ways than tests/helpers/families.py has them, and that mistakes show."""

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import sweep
from classes import examine, process
from classes.examine import NOT_RUN, REFUSED, TRACEBACK, WORKS, WRONG
from classes.tiny_model import build, cases
from safetensors.torch import load_file, save_file

import sparsefw.run

CASES = {case.model_type: case for case in cases()}

# Each is here for a property that no model of tests/model has.
KINDS = {
    "jamba": "state spaces, attention and experts",
    "lfm2": "convolutions",
    "bert": "a class that sees the tokens behind",
    "minimax": "buffers in its blocks that look like matrices",
    "sarvam_moe": "one tensor of the checkpoint for queries, keys and values",
    "llama4_text": "experts in one product",
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_class_works(model_type, tmp_path, monkeypatch):
    # What is particular about a class is not how its masks are improved.
    monkeypatch.setattr(examine, "FLAGS", [*examine.FLAGS, "--steps", "1", "--refit", "1", "--rounds", "0"])
    row = examine.examine(CASES[model_type], tmp_path)
    assert (row["outcome"], row["reason"]) == (WORKS, "")
    assert 0.5 < row["fraction"] <= 1
    assert row["layers"]
    assert row["perplexity"]["plain"] == pytest.approx(row["perplexity"]["dense"], rel=1e-3)


@pytest.mark.slow
def test_class_that_is_refused(tmp_path):
    """Its blocks are given other arguments for a longer window."""
    row = examine.examine(CASES["reformer"], tmp_path)
    assert row["outcome"] == REFUSED
    assert row["reason"] == "unsupported model: a block runs differently from one micro-batch to the next"


def test_class_that_transformers_does_not_run(tmp_path):
    # Its decoder attends to an image, and there is none.
    row = examine.examine(CASES["pix2struct"], tmp_path)
    assert row["outcome"] == NOT_RUN
    assert row["reason"].startswith("forward: ValueError")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output of a class that works."""
    folder = tmp_path_factory.mktemp("stablelm")
    assert examine.examine(CASES["stablelm"], folder)["outcome"] == WORKS
    return folder / examine.OUTPUT


class TestMistakes:
    """What a run of the product does wrong becomes the row's outcome."""

    def test_refusal(self, monkeypatch, tmp_path):
        monkeypatch.setattr(examine, "FLAGS", [*examine.FLAGS, "--ignore", "no_such_layer"])
        row = examine.examine(CASES["stablelm"], tmp_path)
        assert row["outcome"] == REFUSED
        assert "no_such_layer" in row["reason"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("layer", "change", "reason"),
        [
            ("q_proj.weight", lambda weight: weight + 1e-9 * (weight == 0), "verify: "),
            ("q_proj.weight", lambda weight: weight * 1.5, "pruned perplexity"),
            ("layernorm", lambda weight: weight + 1e-7, "not reported as pruned"),
            ("q_proj.weight", None, "missing_keys"),
        ],
        ids=["zeros that are none", "kept weights", "other weights", "missing weights"],
    )
    def test_weights(self, layer, change, reason, output, monkeypatch, tmp_path):
        """Tensors of the output are changed after the run."""

        def main(arguments):
            shutil.copytree(output, tmp_path / examine.OUTPUT)
            for path in (tmp_path / examine.OUTPUT).glob("*.safetensors"):
                tensors = load_file(path)
                for name in [name for name in tensors if layer in name]:
                    weight = tensors.pop(name)
                    tensors |= {name: change(weight)} if change else {}
                save_file(tensors, path, metadata={"format": "pt"})
            return 0

        monkeypatch.setattr(sparsefw.run, "main", main)
        row = examine.examine(CASES["stablelm"], tmp_path)
        assert row["outcome"] == WRONG
        assert reason in row["reason"]


def test_a_router_that_is_pruned_is_wrong():
    """Though the report says so."""
    original, pruned = (build(CASES["qwen2_moe"]) for _ in range(2))
    name = "model.layers.1.mlp.gate.weight"
    weight = pruned.get_parameter(name)
    weight.data[:, ::2] = 0
    layer = SimpleNamespace(name=name, kept=int((weight != 0).sum()))
    report = SimpleNamespace(method="sparsefw", layers_of=lambda method: [layer])
    with pytest.raises(examine.Ended, match=f"{name}: a router is not dense") as ended:
        examine._compare_weights(report, original, pruned)
    assert ended.value.args[0] == WRONG


class TestProcesses:
    """A class that crashes, hangs or takes too much memory is one row, and no more."""

    @pytest.mark.parametrize(
        ("function", "reason"),
        [
            (lambda case, folder: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
            (lambda case, folder: time.sleep(600), "took more than 1 s"),
            (lambda case, folder: {"n": len(bytearray(2**30))}, "MemoryError"),
        ],
        ids=["crash", "time", "memory"],
    )
    def test_reason(self, function, reason, monkeypatch):
        monkeypatch.setattr(process, "SECONDS", 1 if "took" in reason else 60)
        monkeypatch.setattr(process, "MEMORY", 0.5)
        row = process.examine_in_process(CASES["llama"], function)
        assert (row["model_type"], row["outcome"]) == ("llama", TRACEBACK)
        assert reason in row["reason"]


class TestCommand:
    def test_results_are_kept(self, monkeypatch, tmp_path):
        """Two classes at a time; the exit status tells whether one is refused."""
        ends = {"llama": WORKS, "qwen2": REFUSED}
        rows = {name: CASES[name].row | {"outcome": end, "reason": "", "seconds": 1} for name, end in ends.items()}
        monkeypatch.setattr(sweep, "examine_in_process", lambda case: rows[case.model_type])
        path = tmp_path / "sweep.json"
        assert sweep.main(["llama", "--json", str(path)]) == 0
        assert sweep.main(["llama", "qwen2", "--jobs", "2", "--json", str(path)]) == 1
        assert json.loads(path.read_text())["rows"] == {CASES[name].key: row for name, row in rows.items()}
