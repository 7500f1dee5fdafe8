"""One run at a time in an output folder, in the folders above it and in those inside it.

The run into NAME holds the lock `.NAME.partial/lock` beside it. A process that ends in any way lets go of it. The ranks
of a run hold it together, so that no other run begins while one of them is still there.
"""

import fcntl
import os
import re
from pathlib import Path

from sparsefw.errors import InputError

LOCK = "lock"

_PARTIAL = re.compile(r"\..+\.partial")


def partial_of(output: Path) -> Path:
    """The folder of an unfinished run into `output`."""
    return output.with_name(f".{output.name}.partial")


def acquire(path: Path) -> int | None:
    """Take a lock; returns the descriptor that holds it, None if another process does."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    # The process that held the lock may have removed the folder meanwhile, and another process made it anew.
    if is_sole_holder(lock) and path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
        return lock
    os.close(lock)
    return None


def share(lock: int) -> None:
    """Let the other ranks of the run hold a lock, too."""
    fcntl.flock(lock, fcntl.LOCK_SH)


def acquire_shared(path: Path) -> int | None:
    """Hold a lock that a rank has shared; returns the descriptor that holds it, None if it is not there."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    # Another run may hold it for a moment, to see whether this one lives.
    share(lock)
    return lock


def is_sole_holder(lock: int) -> bool:
    """Whether no other process holds a lock; then it is held from now on."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_apart(output: Path) -> None:
    """Refuse an output above or inside one that a live run writes. Call it with the output's own lock held.

    Two runs that start at the same time may both be refused, but never both go on.

    Args:
        output: the output folder, links resolved.

    Raises:
        InputError: there is such a run, or the output lies in the folder of an unfinished one.
    """
    for parent in output.parents:
        if _PARTIAL.fullmatch(parent.name) and (parent / LOCK).exists():
            raise InputError(f"{output}: lies in {parent}, the folder of an unfinished run; choose another --output")
        if parent.name and _is_held(partial_of(parent) / LOCK):
            raise InputError(f"{output}: a run is writing {parent}, in which it lies; choose another --output")
    for folder, folders, _ in os.walk(output):
        for name in folders:
            if _PARTIAL.fullmatch(name) and _is_held(Path(folder, name, LOCK)):
                raise InputError(f"{output}: a run is writing into it ({folder}); choose another --output")


def _is_held(path: Path) -> bool:
    try:
        # Opening a pipe would block for ever.
        lock = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except OSError:
        return False
    held = not is_sole_holder(lock)
    os.close(lock)
    return held
