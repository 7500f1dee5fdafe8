"""Checkpoints on disk, outputs of runs and settings of torch that several test files start from.

Fixtures import what they need, so that the process that hands tests to workers does not import torch.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    """Make runs quick: one round of reconstruction, no wait for the disk, a dtype that no timing chooses.

    A model's shape is found once.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        # A test that prunes a model has imported it.
        if "transformers" in sys.modules:
            patch.setattr("sparsefw.driver.reconstruct.MAX_ROUNDS", 1)
            patch.setattr("sparsefw.arithmetic.slowdown", lambda dtype: 1.0)
            from transformers.models.llama.modeling_llama import LlamaMLP

            from sparsefw.checkpoint.source import fingerprint
            from sparsefw.estimate.profile import shape_of

            known = {}

            def shape_once(checkpoint, in_fp32):
                # Some tests change this class.
                key = fingerprint(checkpoint), in_fp32, LlamaMLP.forward
                return known.get(key) or known.setdefault(key, shape_of(checkpoint, in_fp32))

            patch.setattr("sparsefw.driver.run.shape_of", shape_once)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    from helpers.checkpoints import TENSORS
    from safetensors.torch import save_file

    path = tmp_path / "source"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file(TENSORS, path / "model.safetensors")
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same tensors in two shards."""
    from helpers.checkpoints import TENSORS, write_index
    from safetensors.torch import save_file

    path = tmp_path / "shards"
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({k: TENSORS[k] for k in "ab"}, path / "one.safetensors")
    save_file({k: TENSORS[k] for k in "cn"}, path / "two.safetensors")
    write_index(path, a="one.safetensors", b="one.safetensors", c="two.safetensors", n="two.safetensors")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a run writes its output."""
    return tmp_path / "out"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama with one block."""
    from helpers.families import save_model

    return save_model(tmp_path / "model", "llama", num_hidden_layers=1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the Hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def pruned(tmp_path_factory):
    """pruned(*flags, family, dtype) -> source and output of a small run.

    A run is made once in a session, with its report, and shared: nobody may change its folders. Tests that only look at
    an output take this one. `copied` is for tests that change it.
    """
    from helpers.verifying import outputs

    return outputs(tmp_path_factory)


@pytest.fixture
def output(pruned):
    """The output of a small run of Wanda, which nobody may change."""
    return pruned("--method", "wanda")[1]


@pytest.fixture
def copied(pruned, tmp_path):
    """copied(*flags, family, dtype) -> source and a copy of the output of `pruned`, which the test may change."""

    def copy(*flags, **model):
        source, output = pruned(*flags, **model)
        return source, shutil.copytree(output, tmp_path / "out")

    return copy


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """The text that small runs calibrate on."""
    from helpers.commands import TEXT

    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def set_threads():
    """Sets the number of torch's threads for one test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
