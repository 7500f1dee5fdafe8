"""Activations give back what was put in, wherever they lie."""

import pytest
import torch

from sparsefw.model.activations import Activations, FiledActivations, PinnedActivations, activations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = [pytest.param("host", marks=pytest.mark.gpu)]


def filled(place, tmp_path, dtype=torch.bfloat16):
    room = activations(place, DEVICE, tmp_path)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 5, 3, generator=generator).to(DEVICE, dtype) for n in (2, 2, 1)]
    for batch in batches:
        room.append(batch)
    return room, batches


def same(room, batches):
    assert len(room) == len(batches)
    for found, batch in zip(room, batches, strict=True):
        assert found.device.type == DEVICE.type
        assert found.dtype == batch.dtype
        assert torch.equal(found, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("place", ["gpu", "file", *GPU])
def test_what_is_put_in_comes_out(place, dtype, tmp_path):
    room, batches = filled(place, tmp_path, dtype)
    same(room, batches)
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        for j in order:
            assert torch.equal(room[j], batches[j])


@pytest.mark.parametrize("place", ["gpu", "file", *GPU])
def test_what_is_replaced_is_replaced_at_once(place, tmp_path):
    """Also where the old one was already on its way."""
    room, batches = filled(place, tmp_path)
    for _ in range(3):
        for j in range(len(room)):
            assert torch.equal(room[j], batches[j])
            for later in range(j, len(room)):
                batches[later] = batches[later] + 1
                room[later] = batches[later]
    same(room, batches)


@pytest.mark.parametrize("place", ["gpu", "file", *GPU])
def test_forks_change_apart(place, tmp_path):
    room, batches = filled(place, tmp_path)
    fork = room.fork()
    room[1] = batches[1] + 1
    fork[2] = batches[2] - 1
    same(room, [batches[0], batches[1] + 1, batches[2]])
    same(fork, [batches[0], batches[1], batches[2] - 1])


def test_file_leaves_nothing_behind(tmp_path):
    room, _ = filled("file", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndexError):
        room[3]


def test_places():
    kinds = {"gpu": Activations, "host": PinnedActivations if DEVICE.type == "cuda" else Activations}
    for place, kind in kinds.items():
        assert type(activations(place, DEVICE)) is kind
    assert type(activations("file", DEVICE)) is FiledActivations
