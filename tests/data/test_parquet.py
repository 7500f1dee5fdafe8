"""Parquet: few rows are decoded at once, and pages and values that are too large are refused."""

import io
import itertools
import random
import types

import pyarrow
import pytest
from helpers.texts import refused, whole
from pyarrow.parquet import ParquetFile, write_table

from sparsefw.data import parquet, read_text

# The text is of no known length, and repeats itself here and there.
TEXTS = [f"{n} " * (n % 50) for n in range(3000)]

WAYS = [
    {"use_dictionary": False, "compression": "none"},
    {"use_dictionary": False, "compression": "zstd", "data_page_version": "2.0", "write_statistics": False},
    {"use_dictionary": True, "compression": "snappy", "row_group_size": 700},
    {"use_dictionary": True, "data_page_version": "2.0", "dictionary_pagesize_limit": 5000},
    {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}, "write_page_index": True},
    {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}, "write_page_checksum": True},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_all_pages_are_seen(tmp_path, way):
    """Their sizes and those of their headers add up to what the file says of a column."""
    path = tmp_path / "x.parquet"
    write_table(
        pyarrow.table({"n": range(3000), "text": TEXTS}), path, data_page_size=2000, write_batch_size=100, **way
    )
    metadata = ParquetFile(path).metadata
    seen = 0
    with path.open("rb") as raw:
        for group, n in itertools.product(range(metadata.num_row_groups), range(2)):
            column = metadata.row_group(group).column(n)
            pages = list(parquet._pages(raw, column))
            headers = column.total_compressed_size - sum(in_file for _, in_file in pages)
            assert sum(unpacked for unpacked, _ in pages) + headers == column.total_uncompressed_size
            seen += len(pages)
    assert seen > 10
    assert whole(read_text(str(path), part="calibration")) == TEXTS


@pytest.mark.parametrize(
    "stored", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary("int32", "string")], ids=str
)
def test_a_bomb_is_unpacked_row_by_row(tmp_path, stored):
    path = tmp_path / "x.parquet"
    text = "some words " * 50_000
    write_table(pyarrow.table({"text": pyarrow.array([text] * 100, stored)}), path)
    assert path.stat().st_size < len(text) / 2
    before = pyarrow.total_allocated_bytes()
    documents = read_text(str(path), part="calibration").documents
    for document in itertools.islice(documents, 20):
        assert next(document) == text
        assert pyarrow.total_allocated_bytes() - before < 30 * len(text)


def test_rows_of_a_large_row_group_are_decoded_in_parts(tmp_path):
    path = tmp_path / "x.parquet"
    texts = [f"{n} some words" * 1000 for n in range(1000)]
    write_table(pyarrow.table({"text": texts, "other": texts}), path, use_dictionary=False, write_batch_size=10)
    before = pyarrow.total_allocated_bytes()
    documents = read_text(str(path), part="calibration").documents
    assert next(next(documents)) == texts[0]
    assert pyarrow.total_allocated_bytes() - before < sum(map(len, texts)) / 2


def test_too_large_a_page_and_value(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    write_table(pyarrow.table({"text": ["a", "some words" * 200_000]}), path, use_dictionary=False)
    monkeypatch.setattr(parquet, "LONGEST_RECORD", 10_000)
    documents = read_text(str(path), part="calibration").documents
    assert next(next(documents)) == "a"
    with refused("x.parquet: cannot be read beyond record 1: a record of more than 16 million characters; give such a"):
        next(documents)
    monkeypatch.setattr(parquet, "SMALL_PAGE", 2**20)
    with refused(
        "x.parquet: cannot be read beyond record 0: a page of 2 MiB has to be unpacked whole, and memory has no r"
    ):
        whole(read_text(str(path), part="calibration", room=2**26))
    documents = read_text(str(path), part="calibration", room=2**27).documents
    assert next(next(documents)) == "a"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([3], "record 1: `text` is int, expected a string"),
        ([["a"]], "record 1: `text` is list, expected a string"),
        (["a", None], "record 2: `text` is NoneType, expected a string"),
        ([{"text": "a"}], "record 1: `text` is dict, expected a string"),
    ],
)
def test_text_that_is_no_string(tmp_path, column, message):
    path = tmp_path / "x.parquet"
    write_table(pyarrow.table({"text": column}), path)
    with refused(f"x.parquet: {message}"):
        whole(read_text(str(path), part="calibration"))


def test_no_text_column(tmp_path):
    path = tmp_path / "x.parquet"
    write_table(pyarrow.table({"n": [1], "content": ["a"]}), path)
    with refused("x.parquet: record 1: no column `text`, only n, content"):
        whole(read_text(str(path), part="calibration"))


def test_damaged_headers_of_pages_are_refused():
    random_bytes = random.Random(0)
    endings = set()
    for size in range(2000):
        content = random_bytes.randbytes(size % 60)
        column = types.SimpleNamespace(dictionary_page_offset=None, data_page_offset=0, total_compressed_size=60)
        try:
            list(parquet._pages(io.BytesIO(content), column))
            endings.add("read")
        except ValueError as error:
            endings.add(str(error))
    assert endings >= {
        "damaged: it ends inside a page",
        "damaged: a page without a size",
        "damaged: a page's header cannot be read",
    }


class Limited(io.BytesIO):
    """A file that is read and sought in at most some thousand times."""

    calls = 0

    def read(self, size):
        self._count()
        return super().read(size)

    def seek(self, *place):
        self._count()
        return super().seek(*place)

    def _count(self):
        self.calls += 1
        assert self.calls < 5000, "it is read for ever"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # Lists of 2^70 - 1 and of 2^14 doubles.
        ("19 F7 FFFFFFFFFFFFFFFFFF7F", "a page's header of more than 16 MiB"),
        ("19 F7 808001", "it ends inside a page"),
        # A string of 2^30 bytes, and one of more than follow.
        ("18 8080808004 00", "a page's header of more than 16 MiB"),
        ("18 05 0000", "it ends inside a page"),
    ],
)
def test_headers_of_pages_end(content, message):
    column = types.SimpleNamespace(dictionary_page_offset=None, data_page_offset=0, total_compressed_size=2**62)
    with pytest.raises(ValueError, match=f"^damaged: {message}$"):
        list(parquet._pages(Limited(bytes.fromhex(content)), column))


def test_a_header_is_as_long_as_it_may_be(monkeypatch):
    """Sizes of 4 and 0 bytes, then a list of three numbers, and the end: 11 bytes in all."""
    monkeypatch.setattr(parquet, "LONGEST_HEADER", 11)
    column = types.SimpleNamespace(dictionary_page_offset=None, data_page_offset=0, total_compressed_size=11)
    content = bytes.fromhex("25 08 15 00 19 35 01 02 03 11 00")
    assert list(parquet._pages(io.BytesIO(content), column)) == [(4, 0)]
    monkeypatch.setattr(parquet, "LONGEST_HEADER", 10)
    with pytest.raises(ValueError, match="a page's header of more than"):
        list(parquet._pages(io.BytesIO(content), column))
