"""Run a command: signals are obeyed, an error is one line, and the exit status tells what became of it.

A command's module takes seconds to import. It is imported here, where signals are obeyed already.
"""

import importlib
import os
import signal
import sys

from sparsefw.signals import INTERRUPTED, OBEYED, obeyed

# The line of a process that ends without looking at what is finished.
LAST_WORDS = {"run": "interrupted; the same command goes on after the last finished part"}


def launch(name: str, argv: list[str] | None = None) -> int:
    """Run a command.

    Args:
        name: its module in `sparsefw.commands`.
        argv: its arguments. None: those of the process, which ends with the command.

    Returns:
        The exit status: 0; 1 (a run or a check failed), 2 (bad input), 70 (a mistake in sparsefw), 130 (interrupted).
    """
    if argv is None:
        _prepare_process()
    with obeyed(LAST_WORDS.get(name, "interrupted")) as interruption:
        try:
            status = importlib.import_module(f"sparsefw.commands.{name}").run(argv)
            if sys.stdout:
                # A full disk would show when there is nobody left to tell it.
                sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            # Imported where it is needed: until signals are obeyed, every millisecond counts.
            from sparsefw.failures import tell

            status = tell(error, interruption.came)
    if argv is None:
        _end_process(status)
    return status


def _prepare_process() -> None:
    """Have lines come out as they are printed, and spell out characters that the terminal does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _end_process(status: int) -> None:
    """Prepare the end of Python, which handles no signal and no error of a stream."""
    for number in OBEYED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            # Python would try once more, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if status == INTERRUPTED:
        # Other threads may be in native code, and Python would wait for them.
        os._exit(status)
