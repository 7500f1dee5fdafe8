"""Work in a child process with limits of memory and time, for code that no signal stops.

Signals are handled between two instructions of Python. A library may run for hours without one, and take all memory.
The child is a fork, so that it costs milliseconds and no import. It does not touch the GPU.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from sparsefw.errors import first_line
from sparsefw.process import end_with_parent, host_limit, limit_host, writable

# Answers a request; both are JSON.
Answer = Callable[[Any], Any]


class ChildError(Exception):
    """The child failed, or needed more than its limits; the message is one line."""


@dataclass(frozen=True)
class Limits:
    """What a child may take for one request.

    Attributes:
        seconds: time on the clock.
        nbytes: memory beside what the parent had when it was forked.
    """

    seconds: float
    nbytes: int


class Child:
    """A child process that answers requests, one after another."""

    def __init__(self, prepare: Callable[[], Answer], limits: Limits) -> None:
        """Start the child.

        Args:
            prepare: called in the child; returns what answers requests.
            limits: for `prepare`.

        Raises:
            ChildError: `prepare` fails, or needs more.
        """
        context = multiprocessing.get_context("fork")
        self._connection, its = context.Pipe()
        self._process = context.Process(target=_serve, args=(prepare, limits, its, self._connection), daemon=True)
        with warnings.catch_warnings():
            # Python warns that threads of the parent may hold locks. The child waits for none of torch's or CUDA's.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        its.close()
        self._limits = limits
        self._receive()

    def ask(self, request: Any, limits: Limits) -> Any:
        """The answer to a request.

        Args:
            request: what JSON can hold.
            limits: for this request.

        Raises:
            ChildError: it fails, or needs more; after the latter, no further request is answered.
        """
        self._limits = limits
        # A child that is dead is found out below.
        with contextlib.suppress(BrokenPipeError):
            self._connection.send_bytes(json.dumps([limits.seconds, limits.nbytes, request]).encode())
        return self._receive()

    @property
    def ended(self) -> bool:
        """Whether the child is no more."""
        return self._process.exitcode is not None

    def close(self) -> None:
        """End the child, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Any:
        try:
            error, answer = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._process.join()
            if self._process.exitcode == -signal.SIGALRM:
                error = f"it takes more than {self._limits.seconds:.3g} s"
            else:
                error = f"it needs more than {self._limits.nbytes / 2**30:.1f} GiB of memory, or crashes"
        except BaseException:
            # Nobody waits for it any more.
            self.close()
            raise
        if error:
            raise ChildError(error)
        return answer


def _serve(prepare: Callable[[], Answer], limits: Limits, connection: Connection, parents: Connection) -> None:
    """Answer requests until the parent closes its end."""
    # With a copy of the parent's end, this process would never see that it was closed.
    parents.close()
    # The parent's handlers would not run while a library does. It ends the child itself, also after Ctrl-C.
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()
    # Libraries say what ends them in many lines.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    base, most = writable(), host_limit()
    answer: Answer | None = None
    request = None
    while True:
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        limit_host(min(most, base + limits.nbytes))
        try:
            result = None
            if answer is None:
                answer = prepare()
            else:
                result = answer(request)
            reply = json.dumps(["", result])
        except MemoryError:
            reply = json.dumps([f"it needs more than {limits.nbytes / 2**30:.1f} GiB of memory", None])
        except BaseException as caught:
            # Panics of libraries in Rust are not of class Exception.
            reply = json.dumps([first_line(caught), None])
        connection.send_bytes(reply.encode())
        signal.setitimer(signal.ITIMER_REAL, 0)
        if answer is None:
            return
        try:
            seconds, nbytes, request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        limits = Limits(seconds, nbytes)
