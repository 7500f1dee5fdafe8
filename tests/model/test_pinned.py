"""Pinned host memory that weights go through on their way to a GPU, counted on a pretended one."""

import pytest
import random_checkpoint
import torch
from helpers.pretended_gpu import pretended_gpu

from sparsefw.checkpoint.source import inspect
from sparsefw.memory import pinned_bytes
from sparsefw.model.streamed import StreamedModel

SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 1024}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = random_checkpoint.generate(tmp_path_factory.mktemp("random") / "model", "llama", **SIZES)
    return inspect(folder)


def pinned(source, prefix):
    """Bytes for the tensors whose names begin so."""
    return sum(pinned_bytes(info.nbytes) for name, info in source.tensors.items() if name.startswith(prefix))


def test_embeddings_and_blocks_one_after_another_leave_nothing(source):
    with pretended_gpu() as gpu, StreamedModel(source, torch.device("cuda")) as model:
        with model.outside_loaded():
            assert gpu.host_held == 0
        assert gpu.host_peak == pinned(source, "") - pinned(source, "model.layers.")
        for i in range(2):
            model.open(i, prefetch=False)
            assert gpu.host_held == 0
            model.close(i)


def test_a_block_whose_read_has_failed_is_read_again(source, monkeypatch):
    with StreamedModel(source, torch.device("cpu")) as model:
        read, failures = model._timed_read, [OSError("the disk was busy")]

        def read_or_fail(i):
            if i and failures:
                raise failures.pop()
            return read(i)

        monkeypatch.setattr(model, "_timed_read", read_or_fail)
        model.open(0)
        with pytest.raises(OSError, match="the disk was busy"):
            model.open(1)
        model.open(1)


def test_blocks_are_read_and_written_through_the_same_memory(source):
    of_block = pinned(source, "model.layers.0.")
    with pretended_gpu() as gpu, StreamedModel(source, torch.device("cuda")) as model:
        for i in range(4):
            model.open(i)
            if model._next:
                model._next[1].result()
            assert gpu.host_held == of_block * (2 if i else 1)
            written = model.block_tensors(i)
            assert gpu.host_held == 2 * of_block
            assert all(x.device.type == "cpu" for x in written.values())
            del written
            model.close(i)
