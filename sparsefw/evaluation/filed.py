"""Lists of micro-batches that share one file and its thread."""

from collections.abc import Iterator

from torch import Tensor

from sparsefw.model.activations import FiledActivations


class Part:
    """Some of the micro-batches of a file, used like all `Activations`. The file goes with its last part.

    Args:
        file: the file.
    """

    def __init__(self, file: FiledActivations) -> None:
        self._file = file
        self._places: list[int] = []

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[j] for j in range(len(self)))

    def append(self, hidden: Tensor) -> None:
        """Add a micro-batch."""
        self._places.append(len(self._file))
        self._file.append(hidden)

    def __getitem__(self, j: int) -> Tensor:
        return self._file[self._places[j]]

    def __setitem__(self, j: int, hidden: Tensor) -> None:
        self._file[self._places[j]] = hidden

    def fork(self) -> "Part":
        """A copy that changes independently, in the same file."""
        copy = Part(self._file)
        for hidden in self:
            copy.append(hidden)
        return copy

    def close(self) -> None:
        """Let the micro-batches go."""
        self._places = []
