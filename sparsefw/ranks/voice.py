"""One voice for all ranks: if a run fails, one line says why and on which rank, and all ranks end within seconds.

The ranks share a small store of keys. In it

- a rank that fails leaves its line, unless another one was first. The others end without a word;
- every rank leaves the number of its process, and a beat each second. So a rank that was killed, or has stopped, is
  found by the others, and named;
- a beat says how many transfers a rank has begun. If one keeps the others waiting for too long, it is named;
- a beat also says whether a rank is at work that may take hours, such as a download. The others wait for it here, not
  in a transfer, whose time is limited.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sparsefw.errors import tell

# Seconds between two beats, and without a beat after which a rank counts as stopped.
BEAT, SILENCE = 1.0, 60.0

# Seconds in which all ranks must have come.
COMING = 300.0

# Seconds that a rank may keep the others waiting. To read a block, or to solve a whole matrix on a CPU, takes minutes.
WAITING = 1800.0

# Seconds that a rank which has lost another one, or was interrupted, waits for a word of the others.
HEARING = 1.0

# Seconds in which the main thread must end by itself once the run has failed.
END = 5.0

# The exit status if a rank is lost that has left none.
LOST = 1

FAILURE = "failure"


@dataclass(frozen=True)
class Failure:
    """The end of a run.

    Attributes:
        told_by: the rank that tells it.
        status: the exit status of all ranks.
        line: what it tells.
    """

    told_by: int
    status: int
    line: str


class Voice:
    """A rank's part in the one voice.

    Args:
        store: the keys that the ranks share.
        number, count: of this rank, and of all of them.

    Attributes:
        store, number, count: see above.
        begun: number of transfers that this rank has begun.
        at_long_work: whether it is at work for which the others wait as long as it lives.
    """

    def __init__(self, store: Any, number: int, count: int) -> None:
        self.number, self.count, self.begun, self.at_long_work = number, count, 0, False
        self.store, self._machine = store, _machine()
        # The last beat of each other rank, and when it was seen first.
        self._seen: dict[int, tuple[Any, float]] = {}
        self._begun_last = 0, time.monotonic()
        # When each other rank was last seen at long work.
        self._worked: dict[int, float] = {}
        self._meetings = 0
        self._came: dict[int, tuple[str, int]] = {}
        self._started = time.monotonic()
        self._over = threading.Event()
        self._telling = threading.Lock()
        self.store.set(f"process {number}", json.dumps([self._machine, os.getpid()]))
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def leave(self, status: int, line: str) -> Failure:
        """Leave a failure; returns that of the rank that was first."""
        failure = self.store.compare_set(FAILURE, "", json.dumps([self.number, status, line]))
        return Failure(*json.loads(failure))

    def heard(self) -> Failure | None:
        """The failure that a rank has left."""
        return Failure(*json.loads(self.store.get(FAILURE))) if self.store.check([FAILURE]) else None

    def find(self, seconds: float = 0) -> Failure | None:
        """The failure that a rank has left, or that shows; within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            found = self.heard()
            if not found and (line := self._ended() or self._stopped() or self._late()):
                found = self.leave(LOST, line)
            if found or time.monotonic() > end:
                return found
            time.sleep(0.05)

    def tell(self, failure: Failure) -> None:
        """Print a failure, if this rank is the one that tells it. This process is about to end."""
        if self._telling.acquire(blocking=False) and failure.told_by == self.number:
            tell(failure.line)

    def last_word(self, status: int, line: str, *, comes_of_others: bool) -> int:
        """Tell the failure that ends this process, unless it is for another rank to do so.

        Args:
            status, line: exit status and line of what has happened here.
            comes_of_others: whether it may come of what has happened to another rank: a launcher interrupts all if one
                has ended.

        Returns:
            The exit status of all ranks.
        """
        failure = Failure(self.number, status, f"rank {self.number}: {line}")
        # Without the store, each rank speaks for itself.
        with suppress(RuntimeError, OSError):
            found = self.find(HEARING) if comes_of_others else None
            failure = found or self.leave(failure.status, failure.line)
        self.tell(failure)
        self._over.set()
        return failure.status

    @contextmanager
    def long_work(self) -> Iterator[None]:
        """Inside the `with` block, this rank is at long work."""
        self.at_long_work = True
        try:
            yield
        finally:
            self.at_long_work = False

    def meet(self) -> Failure | None:
        """Wait until all ranks have come here, however long; returns the failure if the run ends before."""
        self._meetings += 1
        key, pause = f"meeting {self._meetings}", 0.001
        self.store.add(key, 1)
        while self.store.add(key, 0) < self.count:
            if failure := self.heard():
                return failure
            time.sleep(pause)
            pause = min(2 * pause, BEAT)
        return None

    def close(self) -> None:
        """Take leave of the others."""
        if self._over.is_set():
            return
        self._over.set()
        # The store may go with rank 0, which waits for the others a while.
        with suppress(RuntimeError):
            self.store.set(f"done {self.number}", "")
            end = time.monotonic() + (0 if self.number else END)
            while time.monotonic() < end and not self.store.check([f"done {n}" for n in range(self.count)]):
                time.sleep(0.02)

    def _watch(self) -> None:
        """Give a beat each second, and end this process if the run has failed and the main thread does not end it."""
        beats = 0
        while not self._over.wait(BEAT):
            beats += 1
            try:
                self.store.set(f"beat {self.number}", json.dumps([beats, self.begun, self.at_long_work]))
                failure = self.find()
            except (RuntimeError, OSError) as error:
                failure = Failure(self.number, LOST, f"rank 0, or the machine that it is on, is gone ({error})")
            if failure and not self._over.wait(END):
                self._end(failure)

    def _end(self, failure: Failure) -> NoReturn:
        self.tell(failure)
        os._exit(failure.status)

    def _others(self, what: str) -> dict[int, Any]:
        """The values that other ranks have left under a name."""
        keys = {n: f"{what} {n}" for n in range(self.count) if n != self.number}
        return {n: json.loads(self.store.get(key) or "0") for n, key in keys.items() if self.store.check([key])}

    def _ended(self) -> str | None:
        """The line about a rank on this machine whose process is gone."""
        if len(self._came) < self.count - 1:
            self._came = self._others("process")
        for n, (machine, process) in self._came.items():
            if machine == self._machine and _is_gone(process) and not self.store.check([f"done {n}"]):
                return f"rank {n} (process {process}) has ended without a word: it was killed, perhaps for its memory"
        return None

    def _stopped(self) -> str | None:
        """The line about a rank that gives no beat any more, or has never come. If it is here, it is killed."""
        now, beats = time.monotonic(), self._others("beat")
        for n in set(range(self.count)) - {self.number, *self._came}:
            if now - self._started > COMING:
                return f"rank {n} has not come within {COMING:.0f} seconds"
        for n, beat in beats.items():
            if n not in self._came:
                # It has come since `_ended` has looked.
                continue
            before, since = self._seen.get(n, (None, now))
            self._seen[n] = beat, since if beat == before else now
            if now - self._seen[n][1] > SILENCE and not self.store.check([f"done {n}"]):
                machine, process = self._came[n]
                if machine == self._machine:
                    os.kill(process, signal.SIGKILL)
                return f"rank {n} (process {process}) has not moved for {SILENCE:.0f} seconds"
        return None

    def _late(self) -> str | None:
        """The line about a rank that keeps this one waiting."""
        now, (begun, since) = time.monotonic(), self._begun_last
        # A copy: two threads may look for a failure, and find a rank's first beat.
        beats = {n: beat for n, (beat, _) in self._seen.copy().items()}
        self._worked |= {n: now for n, (_, _, at_long_work) in beats.items() if at_long_work}
        if begun != self.begun:
            self._begun_last = self.begun, now
            return None
        behind = {
            n: other
            for n, (_, other, _) in beats.items()
            if other < begun and now - max(since, self._worked.get(n, since)) > WAITING
        }
        if behind:
            return f"rank {min(behind, key=behind.__getitem__)} has kept the others waiting for {WAITING:.0f} seconds"
        return None


def _machine() -> str:
    """A name of this machine, and of the container, within which processes have numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _is_gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"
