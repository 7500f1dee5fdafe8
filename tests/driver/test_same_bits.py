"""Gradients of a reconstruction are the same bits in every run, or the report names what may give others."""

import os

import pytest
import torch
from helpers.commands import shards
from helpers.reconstructed import run
from transformers.models.llama.modeling_llama import LlamaMLP

from sparsefw.caller import settings_kept
from sparsefw.cli import launched
from sparsefw.driver.reconstruct import BlockFit

FLAGS = ["--method", "wanda", "--include", "layers.0", "--reconstruct", "1"]
# torch's modes: nothing is asked for; what has no deterministic algorithm is warned of; it is refused.
USUAL, WARNS, REFUSES = range(3)


def watched(x, forwards, backwards):
    """Keep torch's mode on the way forward and on the way back."""

    def keep(gradient):
        filled = torch.utils.deterministic.fill_uninitialized_memory
        backwards.append((torch.get_deterministic_debug_mode(), filled))

    forwards.append(torch.get_deterministic_debug_mode())
    if x.requires_grad:
        x.register_hook(keep)
    return x


def put_by_index(x):
    """The same numbers, in a way that torch refuses in its deterministic mode."""
    return x + torch.zeros(2, dtype=x.dtype).put_(torch.tensor([0]), torch.zeros(1, dtype=x.dtype))[0]


def with_mlp(patch, change):
    """Change what the MLP of every block puts out."""
    forward = LlamaMLP.forward
    patch.setattr(LlamaMLP, "forward", lambda self, x: change(forward(self, x)))


def test_gradients_are_made_in_the_deterministic_mode(llama, out, monkeypatch):
    forwards, backwards, losses, loss_of = [], [], [], BlockFit.loss_of
    with_mlp(monkeypatch, lambda x: watched(x, forwards, backwards))

    def spy(fit, *args):
        losses.append(torch.get_deterministic_debug_mode())
        return loss_of(fit, *args)

    monkeypatch.setattr(BlockFit, "loss_of", spy)
    report, _ = run(llama, out, *FLAGS)
    assert report.blocks[0].reconstruction.varies == ""
    # The steps take the same algorithms as what is held out.
    assert set(losses) == {REFUSES}
    assert backwards
    assert set(backwards) == {(REFUSES, False)}
    assert torch.utils.deterministic.fill_uninitialized_memory
    # Calibration is not restricted, and the mode ends with the gradients.
    assert set(forwards) == {USUAL, REFUSES}
    assert torch.get_deterministic_debug_mode() == USUAL


def test_operations_without_a_deterministic_algorithm_are_named(llama, tmp_path, monkeypatch, capsys, recwarn):
    plain, _ = run(llama, tmp_path / "plain", *FLAGS)
    forwards, backwards = [], []
    with_mlp(monkeypatch, lambda x: put_by_index(watched(x, forwards, backwards)))
    refused, _ = run(llama, tmp_path / "refused", *FLAGS)
    told, expected = refused.blocks[0].reconstruction, plain.blocks[0].reconstruction
    assert (told.varies, expected.varies) == ("put_", "")
    assert (told.before, told.after, told.steps) == (expected.before, expected.after, expected.steps)
    assert told.after < told.before
    assert shards(tmp_path / "refused") == shards(tmp_path / "plain")
    assert "another run may give other bits: put_" in capsys.readouterr().out
    assert not [warning for warning in recwarn if "deterministic" in str(warning.message)]
    # It is tried once. Afterwards all else is still made by deterministic algorithms, where there are some.
    assert forwards.count(REFUSES) == 1
    assert set(backwards) == {(WARNS, False)}
    assert torch.get_deterministic_debug_mode() == USUAL


SAME_BITS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_NVLS_ENABLE": "0"}
ASKED = SAME_BITS | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def command():
    with launched([]):
        pass


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, ASKED),
        ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ASKED | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, SAME_BITS | {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
    ids=str,
)
def test_commands_and_calls_set_what_the_caller_has_not_set(before, after, monkeypatch):
    for enter in (command, settings_kept()(lambda: None)):
        monkeypatch.setattr(os, "environ", dict(before))
        enter()
        assert os.environ == after
