"""The sweep examines classes that tests/helpers/families.py lacks, and shows mistakes."""

import shutil
from functools import partial

import pytest
from classes import examine
from classes.examine import WORKS, WRONG
from classes.tiny_model import cases
from safetensors.torch import load_file, save_file

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
    ("command", "layer", "change", "reason"),
    [
        ("run", "q_proj.weight", lambda weight: weight + 1e-9 * (weight == 0), "verify: "),
        ("run", "q_proj.weight", lambda weight: weight * 1.5, "pruned perplexity"),
        ("run", "layernorm", lambda weight: weight + 1e-7, "not reported as pruned"),
        ("run", "q_proj.weight", None, "missing_keys"),
        ("pack", "layernorm", lambda weight: weight * 2, "packed perplexity"),
    ],
)
def test_mistakes_are_found(command, layer, change, reason, right, monkeypatch, tmp_path):
    """Tensors of a right output, or of its packed copy, are changed."""

    def main(name, folder, _):
        shutil.copytree(right / folder, tmp_path / folder)
        for path in (tmp_path / folder).glob("*.safetensors") if name == command else ():
            tensors = load_file(path)
            for found in [found for found in tensors if layer in found]:
                weight = tensors.pop(found)
                tensors |= {found: change(weight)} if change else {}
            save_file(tensors, path, metadata={"format": "pt"})
        return 0

    for name, folder in (("run", examine.OUTPUT), ("pack", examine.PACKED)):
        monkeypatch.setattr(f"sparsefw.{name}.main", partial(main, name, folder))
    row = examine.examine(CASES["stablelm"], tmp_path)
    assert row["outcome"] == WRONG
    assert reason in row["reason"]
