"""The host memory that texts take."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sparsefw.errors import InputError
from sparsefw.process import host_limited

# Calibration windows are drawn from the first `nsamples * seqlen` times this many tokens of a dataset.
TOKENS_READ = 4
# Bytes of a token: int32 as it is read, and int64 in a window.
BYTES_READ, BYTES_IN_WINDOW = 4, 8
# Most bytes that reading takes beside the tokens, as measured: those of a piece while it is tokenized.
PIECE_BYTES = 64 * 2**20
# Tokens that are always read, so that a limit that is too low is refused by the needs of the whole run.
ALWAYS_READ = 2**20
# Bytes that reading may take beside its room, before nothing is left to it: stacks of threads and the code of libraries
# count as taken, and hardly are.
SLACK = 2**28


def reading_bytes(windows: int, evaluation: Sequence[int], seqlen: int) -> int:
    """Bytes at the peak while texts are read, beside the windows.

    Args:
        windows: number of calibration windows.
        evaluation: number of windows of each evaluation text.
        seqlen: tokens in a window.
    """
    return PIECE_BYTES + BYTES_READ * seqlen * max(TOKENS_READ * windows, *evaluation, 0)


def window_bytes(windows: int, evaluation: Sequence[int], seqlen: int) -> int:
    """Bytes of all windows, which are held during the run; arguments as of `reading_bytes`."""
    return BYTES_IN_WINDOW * seqlen * (windows + sum(evaluation))


def most_tokens(room: int) -> int:
    """The number of tokens of a text that can be read and cut into windows in `room` bytes."""
    return max(ALWAYS_READ, (room - PIECE_BYTES) // (BYTES_READ + BYTES_IN_WINDOW))


@contextmanager
def limited(source: str, room: int | None) -> Iterator[None]:
    """Inside the `with` block, reading a text takes no more memory than there is, whichever library reads.

    What is read is bounded before, where it can be. This is for the rest: a small record of JSON may make millions of
    objects, and libraries read as they like.

    Args:
        source: name of the text, for the message.
        room: bytes; None: any number.

    Raises:
        InputError: more was needed.
    """
    if room is None:
        yield
        return
    allowed = max(room, 0) + SLACK
    try:
        with host_limited(allowed):
            yield
    except MemoryError as error:
        raise InputError(
            f"{source}: one of its records takes more than {allowed / 2**30:.1f} GiB of memory; "
            "give more (--host-memory), or write smaller ones"
        ) from error
