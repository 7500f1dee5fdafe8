"""Run a command: signals are obeyed, an error is one line, and the exit status tells what became of it.

A command's module takes seconds to import. It is imported here, where signals are obeyed already.
"""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING

from sparsefw.signals import INTERRUPTED, obeyed

if TYPE_CHECKING:
    from sparsefw.ranks.voice import Voice

# The line of a process that ends without looking at what is finished.
LAST_WORDS = {
    "run": "interrupted; the same command goes on after the last finished part",
    "evaluate": "interrupted; with --output, the same command goes on from what was saved",
}


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
        voice = None
        try:
            _check_current_folder()
            interruption.voice = voice = _voice_of_ranks()
            status = importlib.import_module(f"sparsefw.commands.{name}").run(argv)
        except (Exception, KeyboardInterrupt) as error:
            # Imported where it is needed: until signals are obeyed, every millisecond counts.
            from sparsefw.failures import tell

            status = tell(error, interruption.came, voice)
        else:
            if voice:
                voice.close()
    if argv is None:
        _end_process(status, others=voice is not None)
    return status


def _voice_of_ranks() -> "Voice | None":
    """The voice of all ranks, if this process is one of several: one of them prints what all have to say."""
    # Seconds go by until it is imported.
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        return None
    from sparsefw.ranks import connect

    voice = connect()
    if voice.number:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return voice


def _prepare_process() -> None:
    """Open what is closed of the standard streams, print by lines, and have SIGINT leave no traceback of Python."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Before and after `obeyed`.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A file that is opened later would get the number of a closed stream, and what libraries print would go into it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A full disk shows while it can be told. Characters that the terminal does not have are spelled out.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")


def _check_current_folder() -> None:
    """Refuse to run in a folder that is gone: libraries abort there."""
    try:
        os.getcwd()
    except OSError as error:
        from sparsefw.errors import InputError

        raise InputError("the current folder has been deleted; go to another one") from error


def _end_process(status: int, others: bool) -> None:
    """Prepare the end of Python, which handles no error of a stream; `others`: there are other ranks."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # Python would try once more, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if status == INTERRUPTED or (status and others):
        # Other threads may be in native code, or wait for a rank that is gone, and Python would wait for them.
        os._exit(status)
