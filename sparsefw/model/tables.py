"""The two tables of a vocabulary, a row for each token: the embeddings of what is read, and the head.

They are the largest tensors outside of the blocks. A pass over texts needs the embeddings of some tokens, and it can
take the head a slice of the vocabulary at a time.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsefw.checkpoint.reader import read_rows
from sparsefw.checkpoint.tensors import QuantizedInfo
from sparsefw.finite import check_finite
from sparsefw.model.flow import name_of
from sparsefw.model.operands import tensors_in
from sparsefw.model.slots import Slot, filled, slots_of
from sparsefw.model.streamed import StreamedModel

# Bytes of the embeddings that are read at once, beside the table.
PIECE = 4 * 2**20

# Methods of a tensor that read none of its values. A view that is made of all values counts as reading them.
OF_FORM = ("dim", "element_size", "is_complex", "is_contiguous", "is_floating_point", "numel", "size", "stride")

# Rows that lie this close together are read at once: a read costs as much as some rows.
NEAR = 8


class Tables:
    """The tables of a model.

    Args:
        model: the model.

    Attributes:
        found: whether each table is one matrix of the checkpoint, stored as the model has it. Otherwise the tables are
            loaded as a whole, and nothing here may be called.
        rows, row_bytes: number of rows of the head, and bytes of a row in memory.
    """

    def __init__(self, model: StreamedModel) -> None:
        self._model = model
        embedding, head = (_weight_of(m) for m in (_embedding(model), model.runs.get_output_embeddings()))
        names = [model.tensor_of(weight) for weight in (embedding, head) if weight is not None]
        self._stored = [name for name in names if name and not isinstance(model.infos[name], QuantizedInfo)]
        self.found = len(self._stored) == 2
        self.rows, self.row_bytes = 0, 0
        if embedding is not None and head is not None:
            self._embedding_slots, self._head_slots = model.places_of(embedding), model.places_of(head)
            self.rows, self.row_bytes = head.shape[0], head.shape[1] * head.element_size()

    @property
    def nbytes(self) -> int:
        """Bytes of both tables in memory; tied ones are one."""
        tied = len({*self._stored}) == 1
        return self.embedding_bytes + (0 if tied else self.rows * self.row_bytes)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the embeddings in memory."""
        return self._embedding_slots[0].own.nbytes

    def bytes_of_rows(self, count: int) -> int:
        """Bytes of the host's memory that the embeddings of so many tokens take, at most: whole pages."""
        own, page = self._embedding_slots[0].own, mmap.PAGESIZE
        row = own.shape[1] * own.element_size()
        # A row that is no part of a page, nor several, may begin anywhere in one.
        pages = -(-row // page) if page % row == 0 or row % page == 0 else -(-(row - 1) // page) + 1
        return min(self.embedding_bytes, count * pages * page)

    @contextmanager
    def embeddings(self, tokens: Iterable[int]) -> Iterator[None]:
        """Inside the `with` block the weights outside of the blocks are on the device, and of the tables these tokens'
        embeddings. Those of other tokens are read when a forward looks them up.

        Raises:
            InputError: weights hold NaN or Inf, or cannot be read any more.
        """
        model, own = self._model, self._embedding_slots[0].own
        table = _untouched(own.shape, own.dtype) if model.device.type == "cpu" else _zeros(own, model.device)
        rows = _Rows(table, self._read_embeddings)
        with model.outside(without=self._stored):
            rows.need(tokens)
            with filled(self._embedding_slots, lambda slot: table):
                slot = self._embedding_slots[0]
                with _Lookups(slot.tensors[slot.name], rows):
                    yield

    def _read_embeddings(self, ranges: list[range]) -> Iterator[Tensor]:
        name = self._stored[0]
        for values in read_rows(name, self._model.infos[name], ranges):
            check_finite(name, values)
            yield values

    @contextmanager
    def head(self, rows: int) -> Iterator[Iterator[slice]]:
        """Inside the `with` block the weights outside of the blocks are on the device, but for the tables.

        Every value of the iterator is a slice of the vocabulary, whose rows of the head are on the device until the
        next one: the model's forward makes the logits of these tokens.

        Args:
            rows: rows of a slice.

        Raises:
            InputError: as for `embeddings`.
        """
        model, own = self._model, self._embedding_slots[0].own
        # What is embedded makes no difference behind the last block.
        nothing = torch.zeros(1, 1, dtype=own.dtype, device=model.device).expand(own.shape)
        with model.outside(without=self._stored), filled(self._embedding_slots, lambda slot: nothing):
            yield self._slices(rows)

    def _slices(self, rows: int) -> Iterator[slice]:
        name = self._stored[1]
        parts = _parts(range(self.rows), rows)
        dtype, biases = self._head_slots[0].own.dtype, self._biases()
        for part, values in zip(parts, read_rows(name, self._model.infos[name], parts), strict=True):
            check_finite(name, values)
            weight = values.to(self._model.device, dtype)
            cut = slice(part.start, part.stop)
            with filled(self._head_slots, _always(weight)), filled(biases, _part(cut)):
                yield cut

    def _biases(self) -> list[Slot]:
        """The place of the head's bias, as it is now."""
        head = self._model.runs.get_output_embeddings()
        return [slot for slot in slots_of([("", head)]) if slot.name == "bias"]


class _Rows:
    """The rows of a table that have been read.

    Args:
        table: the table; its other rows are zero.
        read: reads ranges of rows.
    """

    def __init__(self, table: Tensor, read: Callable[[list[range]], Iterator[Tensor]]) -> None:
        self._table, self._read, self._there = table, read, set[int]()

    def need(self, numbers: Iterable[int]) -> None:
        """Read these rows, if they are not there."""
        missing = {n for n in numbers if 0 <= n < len(self._table)} - self._there
        size = max(1, PIECE // self._table[0].nbytes)
        ranges = [part for rows in _ranges(sorted(missing)) for part in _parts(rows, size)]
        for rows, values in zip(ranges, self._read(ranges), strict=True):
            self._table[rows.start : rows.stop].copy_(values)
        self._there |= missing

    def need_all(self) -> None:
        """Read all rows that are not there."""
        self.need(range(len(self._table)))


class _Lookups(TorchFunctionMode):
    """Inside the `with` block, rows of a table are read before a function of torch reads them.

    A model may embed tokens that its text does not have, such as a prompt of its own.

    Args:
        weight: the table, as the model has it.
        rows: its rows.
    """

    def __init__(self, weight: Any, rows: _Rows) -> None:
        super().__init__()
        self._weight, self._rows = weight, rows

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if not any(x is self._weight for x in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        if func is nn.functional.embedding and args[1:2] and args[1] is self._weight:
            self._rows.need(args[0].unique().tolist())
        elif name_of(func) not in ("__get__", *OF_FORM):
            self._rows.need_all()
        out = func(*args, **kwargs)
        if name_of(func) == "__get__" and isinstance(out, Tensor):
            # Such as the transposed table.
            self._rows.need_all()
        return out


def _always(tensor: Tensor) -> Callable[[Slot], Tensor]:
    return lambda slot: tensor


def _part(cut: slice) -> Callable[[Slot], Tensor]:
    return lambda slot: slot.own[cut]


def _embedding(model: StreamedModel) -> nn.Module | None:
    return model.runs.get_input_embeddings()


def _weight_of(module: nn.Module | None) -> Tensor | None:
    """The matrix of an embedding or a head, if it is all that the module has; a head may have a bias."""
    parameters = dict(module.named_parameters()) if isinstance(module, nn.Embedding | nn.Linear) else {}
    weight = parameters.get("weight")
    return weight if weight is not None and weight.dim() == 2 and {*parameters} <= {"weight", "bias"} else None


def _zeros(like: Tensor, device: torch.device) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=device)


def _untouched(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros on the host, of which only pages that are written to take memory."""
    memory = mmap.mmap(-1, max(1, shape.numel() * dtype.itemsize))
    # The system would make large pages of small ones.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel()).view(shape)


def _ranges(numbers: list[int]) -> Iterator[range]:
    """Ranges that hold all of these numbers, which are sorted, and few others."""
    if not numbers:
        return
    first = numbers[0]
    for one, other in pairwise([*numbers, numbers[-1] + NEAR + 1]):
        if other - one > NEAR:
            yield range(first, one + 1)
            first = other


def _parts(numbers: range, size: int) -> list[range]:
    """A range in pieces of at most this size."""
    return [range(first, min(first + size, numbers.stop)) for first in range(numbers.start, numbers.stop, size)]
