"""One voice for all ranks: whoever fails first is named, by one rank, and all end."""

import json
import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from sparsefw.failures import tell
from sparsefw.ranks import LostRankError, Ranks
from sparsefw.ranks import voice as voices
from sparsefw.ranks.voice import Failure, Voice

COUNT = 3


@pytest.fixture
def store():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(voices, "BEAT", 0.05)
    monkeypatch.setattr(voices, "HEARING", 0.5)
    monkeypatch.setattr(voices, "END", 0.3)


class Processes:
    """Processes with a voice; each prints into a file of its own, and ends with the status that `do` returns."""

    def __init__(self, store, folder):
        self.store, self.folder, self.processes = store, folder, []

    def start(self, *dos):
        fork = multiprocessing.get_context("fork")
        for number, do in enumerate(dos):
            process = fork.Process(target=self._be, args=(number, len(dos), do))
            process.start()
            self.processes.append(process)
        return self

    def _be(self, number, count, do):
        os.dup2(os.open(self.folder / f"errors {number}", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = os.fdopen(2, "w")
        store = dist.TCPStore("localhost", self.store.port, is_master=False)
        voice = Voice(store, number, count)
        store.set(f"here {number}", "")
        store.wait([f"here {n}" for n in range(count)])
        os._exit(do(voice) or 0)

    def ends(self, seconds=10):
        """The exit statuses, and all that was printed."""
        for process in self.processes:
            process.join(seconds)
        lines = [path.read_text() for path in sorted(self.folder.glob("errors *"))]
        return [process.exitcode for process in self.processes], "".join(lines)


@pytest.fixture
def ranks(store, tmp_path):
    ranks = Processes(store, tmp_path)
    yield ranks
    for process in ranks.processes:
        process.kill()


def wait(voice):
    """Be busy without another look at the others."""
    time.sleep(30)


def lose(voice):
    """Wait for a rank that is gone."""
    time.sleep(0.3)
    return tell(LostRankError("the connection to another rank broke (closed)"), False, voice)


def be_killed(voice):
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_rank_that_fails_tells(ranks):
    def fail(voice):
        return tell(ValueError("a\nb"), False, voice)

    statuses, lines = ranks.start(lose, lose, fail).ends()
    assert statuses == [70, 70, 70]
    assert lines.startswith("sparsefw: rank 2: unforeseen ValueError: a b; this is a mistake in sparsefw")
    assert lines.count("\n") == 1


def test_one_line_if_all_fail(ranks):
    def fail(voice):
        return tell(MemoryError(), False, voice)

    statuses, lines = ranks.start(fail, fail, fail).ends()
    assert statuses == [1, 1, 1]
    assert lines.count("\n") == 1
    assert "the host's memory is full" in lines


def test_a_killed_rank_is_named(ranks):
    statuses, lines = ranks.start(lose, be_killed, lose).ends()
    process = ranks.processes[1].pid
    assert statuses == [1, -signal.SIGKILL, 1]
    assert (
        lines
        == f"sparsefw: rank 1 (process {process}) has ended without a word: it was killed, perhaps for its memory\n"
    )


def test_what_a_launcher_does_when_a_rank_is_killed_is_no_interruption(ranks):
    def be_interrupted(voice):
        time.sleep(0.3)
        return tell(KeyboardInterrupt(), True, voice)

    statuses, lines = ranks.start(be_killed, be_interrupted, be_interrupted).ends()
    assert statuses == [-signal.SIGKILL, 1, 1]
    assert lines.startswith("sparsefw: rank 0 (process ")


def test_an_interruption_of_all_is_told_once(ranks):
    def be_interrupted(voice):
        return tell(KeyboardInterrupt(), True, voice)

    statuses, lines = ranks.start(be_interrupted, be_interrupted).ends()
    assert statuses == [130, 130]
    assert lines in [f"sparsefw: rank {n}: interrupted\n" for n in range(2)]


def test_ranks_that_are_busy_are_ended(ranks):
    statuses, lines = ranks.start(wait, be_killed).ends()
    assert statuses == [1, -signal.SIGKILL]
    assert "rank 1 (process" in lines


def test_a_rank_that_has_stopped_is_killed(ranks, monkeypatch):
    monkeypatch.setattr(voices, "SILENCE", 0.5)

    def stop(voice):
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGSTOP)

    statuses, lines = ranks.start(wait, stop).ends()
    assert statuses == [1, -signal.SIGKILL]
    assert lines == f"sparsefw: rank 1 (process {ranks.processes[1].pid}) has not moved for 0 seconds\n"


def be_ahead(voice):
    voice.begun = 2
    wait(voice)


def test_a_rank_that_keeps_others_waiting_is_named(ranks, monkeypatch):
    monkeypatch.setattr(voices, "WAITING", 0.5)

    statuses, lines = ranks.start(be_ahead, wait, be_ahead).ends()
    assert statuses == [1, 1, 1]
    assert lines == "sparsefw: rank 1 has kept the others waiting for 0 seconds\n"


def first_here(voice, do, seconds=50.0):
    """`Ranks.first_here` on the ranks of one machine, whose transfers take so many seconds at most."""
    store = dist.PrefixStore("group", voice.store.clone())
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=store, rank=voice.number, world_size=voice.count, timeout=timeout)
    ranks = Ranks(voice.number, voice.count, voice.count, voice.number, voice)
    try:
        ranks.first_here(do)
        assert ranks.one_does(lambda: do() or "done") == "done"
    except (LostRankError, ValueError) as error:
        return tell(error, False, voice)
    voice.close()
    return 0


def test_ranks_wait_for_long_work_as_long_as_it_takes(ranks, monkeypatch):
    """Longer than a rank may keep the others waiting, and than a transfer may take."""
    monkeypatch.setattr(voices, "WAITING", 0.5)

    def be(voice):
        return first_here(voice, lambda: None if voice.number else time.sleep(3), seconds=2)

    assert ranks.start(be, be, be).ends(20) == ([0, 0, 0], "")


def test_a_rank_that_fails_at_long_work_is_heard_at_once(ranks, monkeypatch):
    monkeypatch.setattr(voices, "END", 60)

    def fail():
        raise ValueError("no such model")

    statuses, lines = ranks.start(*[lambda voice: first_here(voice, fail)] * COUNT).ends()
    assert statuses == [70, 70, 70]
    assert lines.startswith("sparsefw: rank 0: unforeseen ValueError: no such model")
    assert lines.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, "has ended without a word: it was killed, perhaps for its memory"),
        (signal.SIGSTOP, "has not moved for 1 seconds"),
    ],
    ids=["killed", "stopped"],
)
def test_a_rank_that_ends_at_long_work_is_named(ranks, monkeypatch, number, said):
    monkeypatch.setattr(voices, "SILENCE", 1.0)

    def end():
        time.sleep(0.3)
        os.kill(os.getpid(), number)

    statuses, lines = ranks.start(*[lambda voice: first_here(voice, end)] * COUNT).ends()
    assert statuses == [-signal.SIGKILL, 1, 1]
    assert lines == f"sparsefw: rank 0 (process {ranks.processes[0].pid}) {said}\n"


def test_a_rank_that_keeps_others_waiting_beside_long_work_is_named(ranks, monkeypatch):
    monkeypatch.setattr(voices, "WAITING", 0.5)

    def work(voice):
        with voice.long_work():
            wait(voice)

    statuses, lines = ranks.start(work, wait, be_ahead).ends()
    assert statuses == [1, 1, 1]
    assert lines == "sparsefw: rank 1 has kept the others waiting for 0 seconds\n"


def test_a_rank_is_not_late_as_soon_as_its_long_work_ends(store, monkeypatch):
    """It begins its next transfer a moment later, and its beat tells that later still."""
    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(voices, "BEAT", 60)
    monkeypatch.setattr(voices, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    store.set("process 0", json.dumps(["elsewhere", 1]))
    voice = Voice(store, 1, 2)
    voice.begun = 2
    for beat, at_long_work in enumerate([True, True, True, False]):
        sleep(1000)
        store.set("beat 0", json.dumps([beat, 1, at_long_work]))
        assert voice.find() is None
    sleep(1000)
    store.set("beat 0", json.dumps([4, 1, False]))
    assert voice.find() == Failure(1, 1, "rank 0 has kept the others waiting for 1800 seconds")
    voice.close()


def test_a_rank_that_never_comes_is_named(store, monkeypatch):
    monkeypatch.setattr(voices, "COMING", 0.2)
    monkeypatch.setattr(voices, "END", 60)
    voice = Voice(store, 0, 2)
    assert voice.find(5) == Failure(0, 1, "rank 1 has not come within 0 seconds")
    monkeypatch.setattr(voices, "END", 0)
    voice.close()


def test_a_rank_that_has_finished_is_not_missed(ranks):
    def finish(voice):
        voice.close()

    def go_on(voice):
        time.sleep(0.5)
        assert voice.find() is None
        voice.close()

    assert ranks.start(go_on, finish).ends() == ([0, 0], "")


def test_a_rank_ends_though_nobody_reads_it(ranks):
    def lose_stderr(voice):
        os.close(2)
        wait(voice)

    assert ranks.start(lose_stderr, be_killed).ends()[0] == [1, -signal.SIGKILL]


def test_the_first_rank_leaves_last(ranks, monkeypatch):
    """The store may be in its process."""
    monkeypatch.setattr(voices, "END", 5)

    def leave(voice):
        time.sleep(0.3 * voice.number)
        voice.close()
        voice.store.set(f"left {voice.number}", "")
        assert voice.number or voice.store.check(["done 1", "done 2"])

    assert ranks.start(leave, leave, leave).ends() == ([0, 0, 0], "")


def test_without_the_store_a_rank_ends(ranks):
    def lose_store(voice):
        class Gone:
            def __getattr__(self, name):
                raise dist.DistNetworkError("no more")

        voice.store = Gone()
        wait(voice)

    statuses, lines = ranks.start(lose_store).ends()
    assert statuses == [1]
    assert lines == "sparsefw: rank 0, or the machine that it is on, is gone (no more)\n"


def test_a_failure_is_kept(store):
    voice = Voice(store, 0, 1)
    assert voice.leave(2, "first") == Failure(0, 2, "first")
    assert voice.leave(1, "second") == Failure(0, 2, "first") == voice.heard()
    assert json.loads(store.get("failure")) == [0, 2, "first"]
    voice.close()
