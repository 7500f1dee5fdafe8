"""Errors out of a model's own code, told in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.parts import PartIsOver


class StopForward(Exception):
    """Ends the model's forward early."""


class ForwardFailed(InputError):
    """A model's own code raised an exception, which is the cause of this one."""


# What a model's forward is given, in words, and what to do where it fails on that.
TEXT, BATCHES = "text alone", "these batches"
ADVICE = {
    TEXT: "see whether transformers runs this model on tokens without other input",
    BATCHES: "see whether the model itself runs on them",
}

# Exceptions that go through a model's forward as they are.
PASSED = (InputError, MemoryError, torch.OutOfMemoryError, StopForward, PartIsOver)


@contextmanager
def explained(model: str, place: str, input_kind: str = TEXT) -> Iterator[None]:
    """Turn any exception out of a model's own forward, inside the `with` block, into an error of one line.

    Args:
        model: name of the model's class.
        place: what runs: the name of a block, or words.
        input_kind: what its forward is given, in words.

    Raises:
        ForwardFailed: an exception came out of it.
    """
    try:
        yield
    except PASSED:
        raise
    # A model's code may raise whatever there is.
    except Exception as error:
        raise ForwardFailed(
            f"unsupported model {model}: {place} fails on {input_kind}: {type(error).__name__}: "
            f"{shown(first_line(error))}; {ADVICE[input_kind]}"
        ) from error
