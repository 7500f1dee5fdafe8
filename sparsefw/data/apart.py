"""Work in a child process with limits of memory and time, for code that no signal stops.

Signals are handled between two instructions of Python. A library may run for hours without one, and take all memory.
The child is a fork, so that it costs milliseconds and no import. It does not touch the GPU, and ends with its parent.
"""

import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import resource
import signal
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
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
    """Limits of a child for one request.

    Attributes:
        seconds: time on the clock.
        nbytes: memory beside what the parent had when it was forked.
        answer: bytes of the answer, as JSON. The parent takes some times as many for it.
        remedy: what the user may do where the memory is too little; empty, or after a semicolon.
    """

    seconds: float
    nbytes: int
    answer: int = 2**20
    remedy: str = ""

    def too_little(self, or_else: str = "") -> str:
        """The line for a child that needs more memory, or has ended in another way that looks the same."""
        return f"it needs more than {self.nbytes / 2**30:.1f} GiB of memory{or_else}{self.remedy}"


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
        arguments = (prepare, limits, its, self._connection, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        with warnings.catch_warnings():
            # Python warns that threads of the parent may hold locks. The child waits for none of torch's or CUDA's.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        its.close()
        self._limits = limits
        self._received()

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
            self._connection.send_bytes(json.dumps([*astuple(limits), request]).encode())
        self._received()
        return json.loads(self._message())

    @property
    def ended(self) -> bool:
        """Whether the child is no more."""
        return self._process.exitcode is not None

    def close(self) -> None:
        """End the child, whatever it does."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _received(self) -> None:
        """Wait until a request is done.

        Raises:
            ChildError: it failed, or needed more.
        """
        if error := json.loads(self._message()):
            raise ChildError(error)

    def _message(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            if self._process.exitcode == -signal.SIGALRM:
                raise ChildError(f"it takes more than {self._limits.seconds:.3g} s") from error
            raise ChildError(self._limits.too_little(", or crashes")) from error
        except BaseException:
            # Nobody waits for it any more.
            self.close()
            raise


def _serve(
    prepare: Callable[[], Answer], limits: Limits, connection: Connection, parents: Connection, parent: int
) -> None:
    """Answer requests until the parent closes its end, or has ended."""
    # With a copy of the parent's end, this process would never see that it was closed.
    parents.close()
    _set_apart(parent)
    base, most = writable(), host_limit()

    def attempt(work: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
        """The error and the result of some work; one of them is empty."""
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        limit_host(min(most, base + limits.nbytes))
        try:
            return "", work(*arguments)
        except MemoryError:
            return limits.too_little(), None
        except BaseException as caught:
            # Panics of libraries in Rust are not of class Exception.
            return first_line(caught), None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    error, answer = attempt(prepare)
    connection.send_bytes(json.dumps(error).encode())
    while answer:
        try:
            *numbers, request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        limits = Limits(*numbers)
        error, text = attempt(_encoded, answer, request)
        if text and len(text) > limits.answer:
            error = f"it makes more than {limits.answer / 2**20:.1f} MiB of it"
        connection.send_bytes(json.dumps(error).encode())
        if not error:
            connection.send_bytes(text)


def _encoded(answer: Answer, request: Any) -> bytes:
    return json.dumps(answer(request)).encode()


def _set_apart(parent: int) -> None:
    """Keep what is done in this process from its parent, and from the user's terminal."""
    end_with_parent(parent)
    # Collecting garbage writes to what it looks at, and so makes copies of the parent's memory.
    gc.freeze()
    # The parent's handlers would not run while a library does. It ends the child itself, also after Ctrl-C.
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
