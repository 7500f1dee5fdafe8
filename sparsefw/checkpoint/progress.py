"""A line of the log and a progress bar for what takes seconds to hash."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

# Bytes that take seconds to hash.
MANY_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Progress:
    """Tells the user of a long wait.

    Attributes:
        say: called with every line of the log.
        bar: whether to show a progress bar, on a terminal.
    """

    say: Callable[[str], None]
    bar: bool

    @contextmanager
    def hashing(self, what: str, nbytes: int) -> Iterator[Callable[[int], object]]:
        """Name what is hashed, if it is much. Inside the `with` block, call the function with bytes that are done."""
        many = nbytes >= MANY_BYTES
        if many:
            self.say(f"hashing {nbytes / 1e9:.0f} GB: {what}")
        with tqdm(total=nbytes, unit="B", unit_scale=True, disable=None if self.bar and many else True) as bar:
            yield bar.update


SILENT = Progress(lambda line: None, bar=False)
