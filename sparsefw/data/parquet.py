"""Records of parquet files, of which a page and a few rows are in memory.

A page is what a file's writer has compressed in one piece, most often some megabytes of values. It has to be unpacked
whole, and no value is larger than its page. The library that reads parquet does not tell how large pages are, and
unpacks any. So their headers are read here first.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sparsefw.data.files import LONGEST_RECORD, TOO_LONG
from sparsefw.data.memory import PIECE_BYTES
from sparsefw.errors import first_line

COLUMN = "text"
# Bytes of rows that are decoded at once, and rows at most.
BYTES_AT_ONCE, ROWS_AT_ONCE = 2**23, 256
# Bytes of an unpacked page that are always taken, and how much of its size a larger one takes: itself and its values.
SMALL_PAGE, COPIES = 2**24, 2
# Bytes that are read from the file at once.
BUFFER = 2**20

# Bytes of a page's header at most: the library that reads parquet takes no longer one.
LONGEST_HEADER = 2**24

# Types of Thrift's compact protocol, in which headers of pages are written: numbers, and what consists of other values.
NUMBERS = (4, 5, 6)
FLAGS, BYTE, DOUBLE, BINARY, LISTS, STRUCT = (1, 2), 3, 7, 8, (9, 10), 12
# Fields of a page's header: bytes of the page, unpacked and in the file.
UNPACKED, IN_FILE = 2, 3


def parquet_records(path: Path, room: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file, with the column `text` alone if there is one.

    Args:
        path: the file.
        room: bytes of memory that reading may take; None: any number.

    Raises:
        OSError, ValueError: while records are read: the file cannot be read.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with path.open("rb") as raw, ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            if COLUMN not in file.schema_arrow.names:
                yield dict.fromkeys(file.schema_arrow.names)
                return
            for group in range(file.num_row_groups):
                rows = _rows_at_once(raw, file.metadata.row_group(group), room)
                for batch in file.iter_batches(rows, row_groups=[group], columns=[COLUMN], use_threads=False):
                    for value in batch.column(0):
                        yield {COLUMN: _content(value)}
    except pyarrow.ArrowException as error:
        raise ValueError(first_line(error)) from error


def _content(value: Any) -> Any:
    """The content of a value of pyarrow, unless it is too large to be copied."""
    import pyarrow

    text = value.value if isinstance(value, pyarrow.DictionaryScalar) else value
    if isinstance(text, pyarrow.BinaryScalar) and text.is_valid and len(text.as_buffer()) > LONGEST_RECORD:
        raise ValueError(TOO_LONG)
    return value.as_py()


def _rows_at_once(raw: IO[bytes], group: Any, room: int | None) -> int:
    """How many rows of a row group are decoded at once: fewer where pages are large, since values may be, too."""
    columns = [group.column(n) for n in range(group.num_columns)]
    # A column of lists, which is refused later, has its values in a column below it.
    own = [column for column in columns if column.path_in_schema.split(".")[0] == COLUMN]
    largest = max((unpacked for column in own for unpacked, _ in _pages(raw, column)), default=1)
    if room is not None and largest > max(SMALL_PAGE, (room - PIECE_BYTES) // COPIES):
        raise ValueError(
            f"a page of {largest / 2**20:.0f} MiB has to be unpacked whole, and memory has no room for it; "
            "give more (--host-memory), or write the file with smaller pages"
        )
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(1, largest)))


def _pages(raw: IO[bytes], column: Any) -> Iterator[tuple[int, int]]:
    """Bytes of the pages of a column, unpacked and in the file, where they lie one after another."""
    at = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
    end = at + column.total_compressed_size
    while at < end:
        raw.seek(at)
        header = _read_struct(_Header(raw))
        unpacked, in_file = header.get(UNPACKED, -1), header.get(IN_FILE, -1)
        if min(unpacked, in_file) < 0:
            raise ValueError("damaged: a page without a size")
        yield unpacked, in_file
        at = raw.tell() + in_file


class _Header:
    """The bytes of a page's header, from where a file stands."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        # Bytes that may still follow.
        self.left = LONGEST_HEADER

    def take(self, size: int) -> bytes:
        """Read so many bytes."""
        if size > self.left:
            raise ValueError(f"damaged: a page's header of more than {LONGEST_HEADER >> 20} MiB")
        self.left -= size
        found = self._raw.read(size)
        if len(found) < size:
            raise ValueError("damaged: it ends inside a page")
        return found

    def byte(self) -> int:
        """Read a byte."""
        return self.take(1)[0]

    def number(self) -> int:
        """Read an unsigned number of 7 bits a byte."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("damaged: a number in a page's header has no end")


def _read_struct(header: _Header) -> dict[int, int]:
    """Read past a struct of Thrift; returns its fields that are numbers."""
    numbers, field = {}, 0
    while byte := header.byte():
        kind, step = byte & 15, byte >> 4
        field = field + step if step else _signed(header.number())
        if kind in NUMBERS:
            numbers[field] = _signed(header.number())
        elif kind not in FLAGS:
            _skip(header, kind)
    return numbers


def _skip(header: _Header, kind: int) -> None:
    """Read past a value of Thrift."""
    if kind in NUMBERS:
        header.number()
    elif kind == BYTE or kind in FLAGS:
        header.byte()
    elif kind == DOUBLE:
        header.take(8)
    elif kind == BINARY:
        header.take(header.number())
    elif kind in LISTS:
        byte = header.byte()
        count = byte >> 4 if byte < 0xF0 else header.number()
        # Each value has at least one byte.
        if count > header.left:
            raise ValueError(f"damaged: a page's header of more than {LONGEST_HEADER >> 20} MiB")
        for _ in range(count):
            _skip(header, byte & 15)
    elif kind == STRUCT:
        _read_struct(header)
    else:
        raise ValueError("damaged: a page's header cannot be read")


def _signed(number: int) -> int:
    """A signed number, of which the lowest bit is the sign."""
    return number >> 1 ^ -(number & 1)
