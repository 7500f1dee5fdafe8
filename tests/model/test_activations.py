"""Activations give back what was put in, from every place."""

import errno
import os

import pytest
import torch
from helpers.kernel_inputs import DEVICE

from sparsefw.model.activations import Activations, Store

PLACES = ["gpu", "file", pytest.param("host", marks=pytest.mark.gpu)]


def filled(place, folder):
    """Micro-batches of several shapes, dtypes and orders in memory, and slices of larger tensors."""
    activations, drawn = Activations(Store(DEVICE, place, folder)), torch.randn(2, 5, 9, device=DEVICE)
    batches = [drawn[..., :3], drawn.bfloat16(), drawn.mT, drawn[0, 0, 0], drawn[:, :0], drawn[:, :1].expand(2, 5, 9)]
    for batch in batches:
        activations.append(batch)
    return activations, [batch.clone() for batch in batches]


def same(activations, batches):
    assert len(activations) == len(batches)
    for x, batch in zip(activations, batches, strict=True):
        assert (x.device.type, x.dtype) == (DEVICE, batch.dtype)
        assert torch.equal(x, batch)
        assert x.untyped_storage().nbytes() == x.nbytes


@pytest.mark.parametrize("place", PLACES)
def test_what_is_put_in_comes_out(place, tmp_path):
    activations, batches = filled(place, tmp_path)
    same(activations, batches)
    assert activations[2].stride() == batches[2].stride()
    for j in (2, 0, 1, 1, 0):
        assert torch.equal(activations[j], batches[j])
    # Files have no name, however a run ends.
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("place", PLACES)
def test_what_is_replaced_is_replaced_at_once(place, tmp_path):
    """The old micro-batch may already be on its way to the device, and the new one may have another form."""
    activations, batches = filled(place, tmp_path)
    for n in range(3):
        for j in range(len(activations)):
            assert torch.equal(activations[j], batches[j])
            for later in range(j, len(activations)):
                batches[later] = torch.randn(n, later, device=DEVICE)
                activations[later] = batches[later]
    same(activations, batches)


@pytest.mark.parametrize("place", PLACES)
def test_forks_change_by_themselves(place, tmp_path):
    activations, batches = filled(place, tmp_path)
    fork = activations.fork()
    activations[1] = batches[1] + 1
    fork[2] = batches[2] - 1
    same(activations, [batches[0], batches[1] + 1, *batches[2:]])
    activations.clear()
    same(fork, [*batches[:2], batches[2] - 1, *batches[3:]])


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path, monkeypatch):
    """A mapped file would end the process when it is written to."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'"):
        Store(DEVICE, "file", tmp_path).put(torch.ones(2))
