"""Activations give back what was put in, from every place."""

import errno
import os

import pytest
import torch

from sparsefw.errors import InputError
from sparsefw.model.activations import DeviceActivations, FiledActivations, PinnedActivations, make_activations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = [pytest.param("host", marks=pytest.mark.gpu)]


def filled(place, tmp_path, dtype=torch.bfloat16):
    activations = make_activations(place, DEVICE, tmp_path)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 5, 3, generator=generator).to(DEVICE, dtype) for n in (2, 2, 1)]
    for batch in batches:
        activations.append(batch)
    return activations, batches


def same(activations, batches):
    assert len(activations) == len(batches)
    for hidden, batch in zip(activations, batches, strict=True):
        assert hidden.device.type == DEVICE.type
        assert hidden.dtype == batch.dtype
        assert torch.equal(hidden, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("place", ["gpu", "file", *GPU])
def test_what_is_put_in_comes_out(place, dtype, tmp_path):
    activations, batches = filled(place, tmp_path, dtype)
    same(activations, batches)
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        for j in order:
            assert torch.equal(activations[j], batches[j])


@pytest.mark.parametrize("place", ["gpu", "file", *GPU])
def test_what_is_replaced_is_replaced_at_once(place, tmp_path):
    """The old micro-batch may already be on its way to the device."""
    activations, batches = filled(place, tmp_path)
    for _ in range(3):
        for j in range(len(activations)):
            assert torch.equal(activations[j], batches[j])
            for later in range(j, len(activations)):
                batches[later] = batches[later] + 1
                activations[later] = batches[later]
    same(activations, batches)


@pytest.mark.parametrize("place", ["gpu", "file", *GPU])
def test_forks_change_apart(place, tmp_path):
    activations, batches = filled(place, tmp_path)
    fork = activations.fork()
    activations[1] = batches[1] + 1
    fork[2] = batches[2] - 1
    same(activations, [batches[0], batches[1] + 1, batches[2]])
    same(fork, [batches[0], batches[1], batches[2] - 1])


def test_file_leaves_nothing_behind(tmp_path):
    activations, _ = filled("file", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndexError):
        activations[3]


def test_places():
    kinds = {"gpu": DeviceActivations, "host": PinnedActivations if DEVICE.type == "cuda" else DeviceActivations}
    for place, kind in kinds.items():
        assert type(make_activations(place, DEVICE)) is kind
    assert type(make_activations("file", DEVICE)) is FiledActivations


@pytest.mark.parametrize("end", ["close", "drop"])
def test_thread_and_file_end_with_the_activations(end, tmp_path):
    activations, _ = filled("file", tmp_path)
    worker, file = activations._worker, activations._file
    (thread,) = worker._threads
    assert thread.is_alive()
    if end == "close":
        activations.close()
    del activations
    thread.join(10)
    assert not thread.is_alive()
    assert file.closed


@pytest.mark.parametrize("place", ["gpu", "file", *GPU])
def test_forks_close_apart(place, tmp_path):
    activations, batches = filled(place, tmp_path)
    fork = activations.fork()
    activations.close()
    same(fork, batches)
    fork.close()


def test_a_micro_batch_of_another_dtype_is_refused():
    """It would be written over the next one."""
    activations = make_activations("file", torch.device("cpu"))
    for _ in range(2):
        activations.append(torch.ones(2, 3, 4, dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"bfloat16 come out of a block as torch\.float32"):
        activations[0] = torch.ones(2, 3, 4)
    assert activations[1].eq(1).all()
    activations.close()


def test_micro_batches_together_are_copies_in_one_piece_of_memory():
    activations, batches = DeviceActivations(together=3), [torch.rand(n, 5, 3) for n in (2, 2, 1)]
    for batch in batches:
        activations.append(batch)
    same(activations, batches)
    (storage,) = {hidden.untyped_storage().data_ptr() for hidden in activations}
    assert storage not in {batch.untyped_storage().data_ptr() for batch in batches}
    activations.close()
    assert len(activations) == 0


def test_a_full_disk_is_told_where_what_it_does_not_hold_is_read(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    activations = FiledActivations(DEVICE, tmp_path)
    try:
        activations.append(torch.ones(2, 3, 4))
        with pytest.raises(OSError, match="No space left on device"):
            activations[0]
    finally:
        activations.close()
