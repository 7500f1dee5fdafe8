"""What ranks tell each other."""

import os
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import on_ranks

from sparsefw.errors import InputError
from sparsefw.ranks import ALONE, LostRankError, Ranks, joining
from sparsefw.ranks.group import DONE, PANELS
from sparsefw.ranks.voice import Voice

COUNT = 3


def matrix(number, d=37):
    X = torch.randn(d, d, generator=torch.Generator().manual_seed(number))
    return X @ X.T


def transfers(ranks):
    """One of each transfer; returns what came of it."""
    total, at, spread = (torch.arange(5.0) + 10 * ranks.number for _ in range(3))
    handles = [ranks.sum(total), ranks.sum_at(1, at), ranks.spread(2, spread)]
    for handle in handles:
        handle.wait()
    G, owned = matrix(ranks.number), matrix(ranks.number)
    ranks.sum_triangle(G)
    ranks.sum_triangle(owned, 1)
    return dict(
        total=total, at=at, spread=spread, G=G.tril(), owned=owned.tril(), sent=ranks.sent,
        gathered=ranks.gather(f"rank {ranks.number}"), told=ranks.tell(ranks.number), waited=ranks.waited,
    )  # fmt: skip


def test_transfers():
    results = on_ranks(COUNT, transfers)
    for result in results:
        assert result["total"].tolist() == [30 + 3 * n for n in range(5)]
        assert result["spread"].tolist() == [20 + n for n in range(5)]
        assert result["gathered"] == ["rank 0", "rank 1", "rank 2"]
        assert result["told"] == 0
        assert result["waited"] > 0
        # The same bits everywhere, and in every run.
        assert torch.equal(result["G"], results[0]["G"])
    assert results[1]["at"].tolist() == [30 + 3 * n for n in range(5)]
    expected = sum(matrix(n).double() for n in range(COUNT)).tril().float()
    torch.testing.assert_close(results[0]["G"], expected)
    torch.testing.assert_close(results[1]["owned"], expected)
    again = on_ranks(COUNT, transfers)
    assert torch.equal(again[0]["G"], results[0]["G"])


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (RuntimeError("Connection closed by peer\nmore"), LostRankError, "broke (Connection closed by peer)"),
        (
            dist.DistBackendError("NCCL error in: a.cpp:1, unhandled system error\nLast error:\nno /dev/shm"),
            LostRankError,
            "broke (NCCL error in: a.cpp:1, unhandled system error; no /dev/shm)",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, "CUDA out of memory"),
        (torch.AcceleratorError("CUDA error: illegal"), torch.AcceleratorError, "CUDA error: illegal"),
    ],
)
def test_errors_of_transfers(error, raised, said):
    """What this rank's own GPU says is not another rank's doing."""
    with pytest.raises(raised) as caught, Ranks().waiting():
        raise error
    assert said in str(caught.value)


def test_bytes_that_are_sent():
    results = on_ranks(COUNT, transfers)
    height = -(-37 // PANELS)
    panels = [4 * (min(37, start + height) - start) * min(37, start + height) for start in range(0, 37, height)]
    assert results[0]["sent"]["sum"] == 2 * 2 * 20 // 3 + sum(2 * 2 * size // 3 for size in panels)
    assert results[0]["sent"]["sum_at"] == 2 * 20 // 3 + sum(2 * size // 3 for size in panels)
    assert [result["sent"]["spread"] for result in results] == [0, 0, 20]


def test_nothing_is_no_transfer():
    """A rank may have no rows of a layer, and a transport may drop what is empty."""
    ranks = Ranks(0, 2)
    for handle in (ranks.sum_at(1, torch.empty(0, 3)), ranks.spread(1, torch.empty(0, 3))):
        assert handle is DONE
    assert not any(ranks.sent.values())


def test_alone_nothing_is_sent():
    x, G = torch.arange(3.0), matrix(0)
    before = G.clone()
    for handle in (ALONE.sum(x), ALONE.sum_at(0, x), ALONE.spread(0, x)):
        handle.wait()
    ALONE.sum_triangle(G)
    ALONE.agree({"a": 1})
    assert x.tolist() == [0, 1, 2]
    assert torch.equal(G, before)
    assert not ALONE.sent
    assert ALONE.gather("a") == ["a"]
    assert ALONE.tell("a") == "a"
    assert ALONE.first
    assert ALONE.alone
    assert ALONE.share(7) == slice(0, 7)


def disagree(ranks, name, values):
    try:
        ranks.agree({"same": 1, name: values[ranks.number]})
    except InputError as error:
        return str(error)
    return None


def test_ranks_that_disagree_are_named():
    line = "rank 2: --steps is 5, and that of rank 0 is 4; start all ranks with the same command"
    assert on_ranks(COUNT, disagree, "--steps", [4, 4, 5]) == [line] * COUNT
    assert on_ranks(2, disagree, "--steps", [4, 4]) == [None, None]


def in_turn(ranks, folder):
    def do():
        there = (folder / "made").exists()
        (folder / "made").touch()
        return there

    return ranks.first_here(do)


def test_one_rank_of_a_machine_goes_first(tmp_path):
    assert on_ranks(2, in_turn, tmp_path) == [False, True]


@pytest.mark.parametrize("number", range(4))
def test_share_of_a_rank(number):
    assert Ranks(number, 4).share(10) == slice(*[(0, 2), (2, 5), (5, 7), (7, 10)][number])


def choose_gpu(ranks, shown):
    """The number of the GPU that a rank takes, in a list; it is empty without one. Or the line that refuses it.

    Args:
        shown: the GPUs that each rank sees, by their names.
    """
    os.environ.update({"LOCAL_RANK": str(ranks.number), "LOCAL_WORLD_SIZE": str(ranks.count)})
    seen, chosen = shown[ranks.number], []
    joining._open.append(Voice(dist.distributed_c10d._get_default_store(), ranks.number, ranks.count))
    joining.torch = SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: bool(seen),
            device_count=lambda: len(seen),
            set_device=chosen.append,
            current_device=lambda: chosen[-1],
            get_device_properties=lambda number: SimpleNamespace(uuid=seen[number]),
        )
    )
    try:
        with joining.joined():
            return chosen
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([("A", "B"), ("A", "B")], [[0], [1]]),
        ([("A",), ("B",)], [[0], [0]]),
        ([(), ()], [[], []]),
        ([("A",), ("A",)], "ranks 0 and 1 have the same GPU: start one rank for each"),
        ([("A", "B"), ("B", "A")], "ranks 0 and 1 have the same GPU: start one rank for each"),
        ([(), ("A",)], "rank 0 sees no GPU, and another rank does"),
        ([("A",), ()], "rank 1 sees no GPU, and another rank does"),
    ],
    ids=["all", "one for each rank", "none", "one for both", "in another order", "none for the first", "none for one"],
)
def test_every_rank_has_a_gpu_of_its_own(shown, expected):
    results = on_ranks(2, choose_gpu, shown)
    if isinstance(expected, str):
        assert all(result.startswith(expected) for result in results)
    else:
        assert results == expected


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=r"^3 ranks on this machine, and 2 GPUs \(CUDA_VISIBLE_DEVICES\): each needs"):
        joining._number_of_gpu(3, 2)


def test_a_group_that_waits_for_a_key_does_not_keep_the_voice_silent(monkeypatch):
    """A connection to the keys that ranks share is held by whoever waits for one, as NCCL does for the others' ids."""
    server = dist.TCPStore("localhost", 0, None, True, timedelta(seconds=5), wait_for_workers=False)
    voice = SimpleNamespace(store=dist.PrefixStore("voice", server), number=0, count=2, close=lambda: None)
    given = {}
    monkeypatch.setattr(joining, "_open", [voice])
    monkeypatch.setattr(joining, "is_rank", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: given.update(kwargs))
    with joining.joined(on_gpus=False):
        waiting = threading.Thread(target=given["store"].get, args=("id of rank 0",))
        waiting.start()
        time.sleep(0.5)
        start = time.monotonic()
        voice.store.set("beat", "1")
        silent = time.monotonic() - start
        dist.PrefixStore("group", voice.store.clone()).set("id of rank 0", "")
        waiting.join()
    assert silent < 1
