"""Texts: what is read, from where, and what is refused. Nothing here needs a network."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from helpers.texts import refused, replace_hub
from huggingface_hub.errors import HTTPError

from sparsefw.data import text
from sparsefw.data.text import read_text

TEXTS = ["", "one", 'a "quote" \\ and / \n\t', "é 日本 \U0001f600", "[{", "}]", " , ", "x" * 50]
VALUES = [{"id": n, "more": {"text": [None, 1.5e-3, True]}, "text": text} for n, text in enumerate(TEXTS)]


def documents(dataset, split="train") -> list[str]:
    _, found = read_text(str(dataset), split)
    return ["".join(document) for document in found]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "X [1] *.JSONL.GZ"])
@pytest.mark.parametrize("form", ["lines", "list", "spread list", "strings", "with a mark"])
def test_records_of_json(tmp_path, name, form):
    content = {
        "lines": "\r\n\n".join(map(json.dumps, VALUES)),
        "list": json.dumps(VALUES, ensure_ascii=False),
        "spread list": "\n " + json.dumps(VALUES, indent=2) + "\n",
        "strings": json.dumps(TEXTS),
        "with a mark": "\ufeff" + "\n".join(map(json.dumps, VALUES)),
    }[form].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert documents(tmp_path / name) == TEXTS


@pytest.mark.parametrize("options", [{"use_dictionary": False, "row_group_size": 3}, {"compression": "zstd"}])
def test_parquet(tmp_path, options):
    path, texts = tmp_path / "x.parquet", TEXTS * 30
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path, **options)
    assert documents(path) == texts


def test_text_file_is_one_document(tmp_path, monkeypatch):
    (tmp_path / "a [1] * file.TXT").write_bytes(b"\xef\xbb\xbfone\n\ntwo \xc3\xa9\r\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "a [1] * file.TXT"), "~/a [1] * file.TXT", "a [1] * file.TXT"):
        assert read_text(name, "train")[0] == name
        assert documents(name) == ["one\n\ntwo é\n"]
    # It is read as far as it is needed.
    monkeypatch.setattr(text, "CHARACTERS", 4)
    assert list(next(read_text(name, "train")[1])) == ["one\n", "\ntwo", " é\n"]


def test_built_in_text_has_two_halves():
    (train,), (test,) = documents("default"), documents("default", "test")
    assert len(train) > 200_000 > len(test) > 20_000


@pytest.mark.parametrize("name", ["gone.txt", "no/gone.jsonl", "./gone", "/gone", "~/gone.parquet"])
def test_missing_file(name):
    with refused(f"^{name}: no such file; check the path"):
        read_text(name, "test")


@pytest.mark.parametrize("name", ["folder", "x.csv", "pipe.txt", "pipe.jsonl"])
def test_what_is_no_file_of_text_is_not_opened(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.csv").touch()
    if name.startswith("pipe"):
        os.mkfifo(tmp_path / name)
    with refused(f"{name}: not a file of text; give one of .txt, .json, .jsonl"):
        read_text(str(tmp_path / name), "train")


@pytest.mark.parametrize("name", ["c5", "general", "", "a/b/c", "org/na me", "a whole text " * 100])
def test_unknown_dataset_is_not_looked_up(name, monkeypatch):
    replace_hub(monkeypatch, lambda *_, **__: pytest.fail("looked up"))
    for split, names in {"train": "default, c4, wikitext, general, self", "test": "default, c4, wikitext"}.items():
        with refused(f"unknown dataset; give {names}, a file or a Hub id ORG/NAME"):
            read_text(name, split)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"code": "a", "id": 1}', "no column text, messages, content, only code, id; rename"),
        ("x.jsonl", b'{"text": "a"}\n{"text": 3}', "record 2 is int, expected a text"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}', "record 2: .utf-8. codec"),
        ("x.jsonl", b'{"text": "a"}\n{"text":\n', "cannot be read beyond record 1: Expecting value"),
        ("x.json.gz", b'{"text": "a"}\n', "cannot be read beyond record 0: Not a gzipped file"),
        ("x.parquet", b"no parquet at all", "cannot be read"),
        ("x.txt", "é".encode("latin-1"), "cannot be read beyond record 0: .utf-8. codec"),
    ],
)
def test_damaged_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with refused(f"^{tmp_path / name}: {message}"):
        documents(tmp_path / name)


def test_the_text_of_code_is_its_content(tmp_path):
    rows = [{"path": "a.py", "content": "pass\n"}, {"path": "b.py", "content": "x = 1\n"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.jsonl", "x.parquet"):
        assert documents(tmp_path / name) == ["pass\n", "x = 1\n"]


# The Hub, replaced


@pytest.fixture
def calls(monkeypatch) -> list:
    """What `load_dataset` is called with; it returns two records."""
    calls = []

    def load(*names, split, **options):
        calls.append((names, split, options))
        rows = [{"text": "one"}, {"text": "two"}]
        return rows if split else {"train": rows, "validation": rows[1:]}

    replace_hub(monkeypatch, load)
    return calls


def test_datasets_of_the_hub(calls):
    assert documents("c4") == ["one", "two"]
    assert read_text("c4", "test")[0] == "allenai/c4 en/c4-validation.00000-of-00008.json.gz validation"
    assert read_text("wikitext", "test")[0] == "Salesforce/wikitext wikitext-2-raw-v1 test"
    assert documents("org/name", "test") == ["two"]
    assert read_text("org/name", "train")[0] == "org/name train"
    shard = {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "streaming": True}
    assert calls[0] == (("allenai/c4",), "train", shard)
    assert calls[2] == (("Salesforce/wikitext",), "test", {"name": "wikitext-2-raw-v1"})
    assert calls[3] == (("org/name",), None, {"streaming": True})


@pytest.mark.parametrize("dataset", ["c4", "org/name"])
def test_failures_of_the_hub_are_one_line(monkeypatch, dataset):
    for error in (ConnectionError("No\nway"), HTTPError("No"), DatasetNotFoundError("No")):

        def fail(*_, error=error, **__):
            raise error

        replace_hub(monkeypatch, fail)
        with refused(rf"^{dataset}: cannot be read from the Hub .*No"):
            read_text(dataset, "test")


def test_connection_lost_while_reading(monkeypatch):
    def rows(*_, **__):
        yield {"text": "one"}
        raise DatasetsError("gone")

    replace_hub(monkeypatch, rows)
    found = read_text("c4", "train")[1]
    assert list(next(found)) == ["one"]
    with refused("cannot be read beyond record 1: gone"):
        next(found)
