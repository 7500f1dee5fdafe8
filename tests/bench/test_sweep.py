"""The sweep: classes that are made in other ways than tests/helpers/families.py has them, and that mistakes show."""

import shutil
from types import SimpleNamespace

import pytest
from classes import examine
from classes.examine import NOT_RUN, REFUSED, WORKS, WRONG
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
