"""Tensors that are read are the file's, and files that change under the run are noticed."""

import pytest
import torch
from helpers.checkpoints import TENSORS, refused
from safetensors.torch import save_file

from sparsefw.checkpoint.reader import read_shard, read_tensors
from sparsefw.checkpoint.source import SINGLE, inspect


def test_tensors_are_the_files(shards):
    found = read_tensors(inspect(shards).tensors)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_empty_and_scalar_tensors(folder):
    odd = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "w": torch.ones(2, 2)}
    save_file(odd, folder / SINGLE)
    found = read_tensors(inspect(folder).tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in odd.items())


def test_memory_is_aligned_as_torchs_own(folder):
    """Whatever the length of the header: products may round differently with another alignment."""
    for length in range(1, 9):
        save_file({"x" * length: torch.ones(3), "w": torch.ones(64, 64, dtype=torch.bfloat16)}, folder / SINGLE)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in read_tensors(inspect(folder).tensors).values())
        assert all(tensor.data_ptr() % 64 == 0 for tensor in read_shard(folder / SINGLE).values())


@pytest.mark.parametrize("how", ["shorter", "gone", "other", "large header", "list", "no offsets"])
def test_file_that_changed_since(folder, how):
    tensors, path = inspect(folder).tensors, folder / SINGLE
    if how == "shorter":
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "gone":
        path.unlink()
    elif how == "large header":
        path.write_bytes(b"\xff" * 5000)
    elif how == "list":
        path.write_bytes((8).to_bytes(8, "little") + b'["a", 1]')
    elif how == "no offsets":
        path.write_bytes((16).to_bytes(8, "little") + b'{"a": [], "b":0}')
    else:
        save_file({"a": torch.ones(2)}, path)
    with refused(r"model.safetensors: (ends before|cannot be read any more|tensor \w is not what it was)"):
        read_tensors(tensors)
