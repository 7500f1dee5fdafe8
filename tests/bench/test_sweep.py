"""The sweep examines classes that tests/helpers/families.py lacks, and shows mistakes."""

import shutil

import pytest
from classes import examine
from classes.examine import WORKS, WRONG
from classes.tiny_model import cases
from safetensors.torch import load_file, save_file

import sparsefw.pack
import sparsefw.run

CASES = {case.model_type: case for case in cases()}

# Each is here for a property that no model of tests/model has.
KINDS = [
    "jamba",  # state spaces, attention and experts
    "lfm2",  # convolutions
    "bert",  # a class that sees later tokens
    "minimax",  # buffers in its blocks that look like matrices
    "sarvam_moe",  # one tensor of the checkpoint for queries, keys and values
    "llama4_text",  # experts in one product
]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_class_works(model_type, tmp_path, monkeypatch):
    # How masks are improved does not depend on the class, and state spaces loop over tokens.
    monkeypatch.setattr(examine, "SEQLEN", 8)
    monkeypatch.setattr(examine, "FLAGS", [*examine.FLAGS, "--steps", "1", "--refit", "1", "--rounds", "0"])
    row = examine.examine(CASES[model_type], tmp_path)
    assert (row["outcome"], row["reason"]) == (WORKS, "")
    assert 0.5 < row["fraction"] <= 1
    assert row["perplexity"]["plain"] == pytest.approx(row["perplexity"]["dense"], rel=1e-3)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The folder of a class that works."""
    folder = tmp_path_factory.mktemp("right")
    assert examine.examine(CASES["stablelm"], folder)["outcome"] == WORKS
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "change", "reason"),
    [
        ("q_proj.weight", lambda weight: weight + 1e-9 * (weight == 0), "verify: "),
        ("q_proj.weight", lambda weight: weight * 1.5, "pruned perplexity"),
        ("layernorm", lambda weight: weight + 1e-7, "not reported as pruned"),
        ("q_proj.weight", None, "missing_keys"),
    ],
)
def test_mistakes_of_a_run_are_found(layer, change, reason, right, monkeypatch, tmp_path):
    """Tensors of a right output are changed."""

    def main(arguments):
        shutil.copytree(right / examine.OUTPUT, tmp_path / examine.OUTPUT)
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


@pytest.mark.slow
def test_a_mistake_of_packing_is_found(monkeypatch, tmp_path):
    pack = sparsefw.pack.main

    def main(arguments):
        status = pack(arguments)
        for path in (tmp_path / examine.PACKED).glob("*.safetensors"):
            tensors = {name: 2 * x if x.is_floating_point() else x for name, x in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})
        return status

    monkeypatch.setattr(sparsefw.pack, "main", main)
    row = examine.examine(CASES["stablelm"], tmp_path)
    assert row["outcome"] == WRONG
    assert row["reason"].startswith("packed perplexity")
