"""The sweep examines classes that tests/helpers/families.py lacks, and shows mistakes."""

import pytest
from classes import examine
from classes.examine import WORKS
from classes.tiny_model import cases

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
    # How masks are improved does not depend on the class.
    monkeypatch.setattr(examine, "FLAGS", [*examine.FLAGS, "--steps", "1", "--refit", "1", "--rounds", "0"])
    row = examine.examine(CASES[model_type], tmp_path)
    assert (row["outcome"], row["reason"]) == (WORKS, "")
    assert 0.5 < row["fraction"] <= 1
    assert row["layers"]
    assert row["perplexity"]["plain"] == pytest.approx(row["perplexity"]["dense"], rel=1e-3)
