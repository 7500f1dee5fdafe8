"""The host memory that texts take."""

from collections.abc import Sequence

# Calibration windows are drawn from the first `nsamples * seqlen` times this many tokens of a dataset.
TOKENS_READ = 4
# Bytes of a token: int32 as it is read, and int64 in a window.
BYTES_READ, BYTES_IN_WINDOW = 4, 8
# Most bytes that reading takes beside the tokens, as measured: those of a piece while it is tokenized.
PIECE_BYTES = 64 * 2**20
# Tokens that are always read, so that a limit that is too low is refused by the needs of the whole run.
ALWAYS_READ = 2**20


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
