"""What ranks send each other, and how processes become ranks."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import refused
from helpers.ranks import on_ranks

from sparsefw import ranks as module
from sparsefw.errors import InputError
from sparsefw.ranks import DONE, LostRankError, Ranks, joined_with

COUNT = 3


def matrix(number):
    X = torch.randn(37, 37, generator=torch.Generator().manual_seed(number))
    return X @ X.T


def transfers(ranks):
    """One of each transfer; returns what came of it."""
    total, at, copied = (torch.arange(5.0) + 10 * ranks.number for _ in range(3))
    for handle in [ranks.all_reduce(total), ranks.reduce(1, at), ranks.broadcast(2, copied)]:
        handle.wait()
    G, owned = matrix(ranks.number), matrix(ranks.number)
    ranks.reduce_triangle(G)
    ranks.reduce_triangle(owned, 1)
    return SimpleNamespace(
        total=total.tolist(), at=at.tolist(), copied=copied.tolist(), G=G.tril(), owned=owned.tril(),
        gathered=ranks.gather(f"rank {ranks.number}"), object=ranks.broadcast_object(ranks.number),
        of_first=ranks.on_first(lambda: ranks.number), waited=ranks.waited,
    )  # fmt: skip


def test_transfers():
    results = on_ranks(COUNT, transfers)
    for result in results:
        assert result.total == [30 + 3 * n for n in range(5)]
        assert result.copied == [20 + n for n in range(5)]
        assert result.gathered == ["rank 0", "rank 1", "rank 2"]
        assert (result.object, result.of_first) == (0, 0)
        assert result.waited > 0
        # The same bits everywhere, and in every run.
        assert torch.equal(result.G, results[0].G)
    assert results[1].at == [30 + 3 * n for n in range(5)]
    expected = sum(matrix(n).double() for n in range(COUNT)).tril().float()
    torch.testing.assert_close(results[0].G, expected)
    torch.testing.assert_close(results[1].owned, expected)
    assert torch.equal(on_ranks(COUNT, transfers)[0].G, results[0].G)


def test_nothing_is_no_transfer():
    """A rank may have no rows of a layer, and a transport may drop what is empty."""
    ranks = Ranks(0, 2)
    assert ranks.reduce(1, torch.empty(0, 3)) is ranks.broadcast(1, torch.empty(0, 3)) is DONE


def lose(ranks):
    """End on rank 1; what the other one is told."""
    if ranks.number == 1:
        dist.destroy_process_group()
        return None
    with pytest.raises(LostRankError, match="the connection to another rank broke"):
        ranks.barrier()
    dist.destroy_process_group()


def test_a_lost_rank_is_named_as_the_cause():
    on_ranks(2, lose)
    # An error of this rank's own GPU is not another rank's doing.
    with pytest.raises(torch.AcceleratorError), Ranks().waiting():
        raise torch.AcceleratorError("CUDA error: illegal")


def in_turn(ranks, folder):
    def do():
        there = (folder / "made").exists()
        (folder / "made").touch()
        return there

    return ranks.local_first(do)


def test_one_rank_of_a_machine_goes_first(tmp_path):
    assert on_ranks(2, in_turn, tmp_path) == [False, True]


def choose_gpu(ranks, shown):
    """The number of the GPU that a rank takes, in a list; it is empty without one. Or the line that refuses it.

    Args:
        shown: the GPUs that each rank sees, by their names.
    """
    os.environ.update({"LOCAL_RANK": str(ranks.number), "LOCAL_WORLD_SIZE": str(ranks.count)})
    seen, chosen = shown[ranks.number], []
    module.torch = SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: bool(seen),
            device_count=lambda: len(seen),
            set_device=chosen.append,
            current_device=lambda: chosen[-1],
            get_device_properties=lambda number: SimpleNamespace(uuid=seen[number]),
        ),
        OutOfMemoryError=torch.OutOfMemoryError,
        AcceleratorError=torch.AcceleratorError,
    )
    try:
        with joined_with(print):
            return chosen
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([("A", "B"), ("A", "B")], [[0], [1]]),
        ([("A",), ("B",)], [[0], [0]]),
        ([(), ()], [[], []]),
        ([("A",), ("A",)], "rank 1 of 2 has no GPU of its own"),
        ([("A", "B"), ("B", "A")], "rank 1 of 2 has no GPU of its own"),
        ([(), ("A",)], "rank 0 of 2 has no GPU of its own"),
    ],
    ids=["all", "one for each rank", "none", "one for both", "in another order", "none for one"],
)
def test_every_rank_has_a_gpu_of_its_own(shown, expected):
    results = on_ranks(2, choose_gpu, shown)
    assert results == expected or all(result.startswith(expected) for result in results)


def test_ranks_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        refused(r"^the other ranks cannot be reached: .*; start with torchrun$"),
        joined_with(print),
    ):
        pass
