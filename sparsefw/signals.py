"""SIGINT, SIGTERM and SIGHUP end a command at any time, also inside imports and native code.

Python runs a signal's handler between two steps of the main thread. Native code may keep that thread for minutes, and a
module that is half imported may turn the handler's exception into anything. So there are three ways to end:

1. The first signal raises KeyboardInterrupt in the main thread, and whatever is open is closed.
2. A second thread ends the process if the main thread does not come that far in time.
3. A second signal ends it at once. The system does that itself, whatever Python is busy with.

Nothing is lost by the other two ways: what a run has finished is safe on the disk, and what it has not does no harm.
"""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from sparsefw.errors import tell

if TYPE_CHECKING:
    from sparsefw.ranks.voice import Voice

# Exit status of a command that was interrupted.
INTERRUPTED = 130

OBEYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Seconds after the first signal in which the main thread must be back from native code, and in which all must be over.
# A block that is being written may take the longer one.
RETURN, END = 3.0, 20.0

# Sent to the second thread in place of a signal's number.
OVER = 0

# The file of the frames in which Python imports a module.
IMPORT = "<frozen importlib._bootstrap>"


class Interruption:
    """The signals that one command was sent.

    Args:
        last_words: the line that is printed where the process ends without further ado.

    Attributes:
        came: whether a signal has reached the main thread.
        voice: prints that line on one of several ranks.
    """

    def __init__(self, last_words: str) -> None:
        self.came = False
        self.voice: Voice | None = None
        self._last_words = last_words
        self._ending = threading.Lock()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler: leave what the main thread is doing."""
        if self.came or _is_importing(frame):
            self.end_process()
        self.came = True
        raise KeyboardInterrupt

    def watch(self, descriptor: int) -> None:
        """End the process if the main thread does not do so after a signal; `descriptor` gives their numbers."""
        if _next(descriptor, None) == OVER:
            return
        number = _next(descriptor, RETURN)
        if number is None and self.came:
            number = _next(descriptor, END - RETURN)
        if number != OVER:
            self.end_process()

    def end_process(self) -> NoReturn:
        """End the process now, from any thread."""
        if not self._ending.acquire(blocking=False):
            # Another thread is at it.
            time.sleep(60)
        if self.voice:
            os._exit(self.voice.last_word(INTERRUPTED, self._last_words, comes_of_others=True))
        tell(self._last_words)
        os._exit(INTERRUPTED)


@contextmanager
def obeyed(last_words: str) -> Iterator[Interruption]:
    """Obey signals inside the `with` block. A signal that the process was told to ignore stays ignored.

    Args:
        last_words: see `Interruption`.
    """
    interruption = Interruption(last_words)
    if threading.current_thread() is not threading.main_thread():
        # Signals belong to the main thread.
        yield interruption
        return
    _let_forks_begin_anew()
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    watch = threading.Thread(target=interruption.watch, args=(reads,), name="signals", daemon=True)
    watch.start()
    hook = sys.unraisablehook
    previous = {n: signal.getsignal(n) for n in OBEYED if signal.getsignal(n) is not signal.SIG_IGN}
    wakeup = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        sys.unraisablehook = lambda lost: _end_if_lost(lost, interruption, hook)
        for number in previous:
            signal.signal(number, interruption.handle)
            _default_from_the_second(number)
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)
        sys.unraisablehook = hook
        os.write(writes, bytes([OVER]))
        watch.join()
        os.close(reads)
        os.close(writes)


@cache
def _let_forks_begin_anew() -> None:
    """Have a fork obey signals by itself: what ends a library's worker would look like a signal to this process."""
    os.register_at_fork(after_in_child=_begin_anew)


def _begin_anew() -> None:
    obeyed_here = [n for n in OBEYED if isinstance(getattr(signal.getsignal(n), "__self__", None), Interruption)]
    for number in obeyed_here:
        signal.signal(number, signal.SIG_DFL)
    if obeyed_here:
        # The pipe is that of the process which forked.
        signal.set_wakeup_fd(-1)


def _next(descriptor: int, seconds: float | None) -> int | None:
    """The number of the next signal, or OVER; None: there was none for so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while select.select([descriptor], [], [], None if end is None else max(0, end - time.monotonic()))[0]:
        # Other signals that Python handles come this way, too.
        if (number := os.read(descriptor, 1)[0]) in (OVER, *OBEYED):
            return number
    return None


def _is_importing(frame: FrameType | None) -> bool:
    """Whether the code of a frame runs because a module is imported."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORT:
            return True
        frame = frame.f_back
    return False


def _end_if_lost(lost: "sys.UnraisableHookArgs", interruption: Interruption, hook: Any) -> None:
    """End the process if Python has dropped a signal's exception, as it drops all that come out of finalizers."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        interruption.end_process()
    hook(lost)


def _default_from_the_second(number: int) -> None:
    """Let the first signal of this number come to Python, and the system's default action follow the second one."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "sysv_signal"):
        # Another C library than glibc: the second thread sees the signal, unless native code keeps Python's lock.
        return
    for function in (library.signal, library.sysv_signal):
        function.argtypes, function.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    # The handler of System V is forgotten when it is called.
    library.sysv_signal(number, library.signal(number, None))
