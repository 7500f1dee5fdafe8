"""Texts: what is read, from where, and what is refused. Nothing here needs a network."""

import gzip
import json
import os
import subprocess
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.parquet.parquet import Parquet
from helpers.texts import make_tokenizer, records, refused, replace_hub, whole
from huggingface_hub.errors import HTTPError
from transformers import PreTrainedTokenizerFast

from sparsefw.data import calibration_windows, evaluation_windows, hub, read_text


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


# read_text


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "A [1] * file.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo \xc3\xa9\n")
    text = read_text(str(path), part="calibration")
    assert text.source == str(path)
    assert whole(text) == ["one\n\ntwo é\n"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.json.gz", "x.jsonl.gz", "x [1] *.jsonl"])
def test_records(tmp_path, name):
    rows = [{"text": "one", "id": 1}, {"text": "", "id": 2}, {"text": "two\n", "id": 3}]
    path = records(tmp_path / name, rows)
    assert whole(read_text(path, part="evaluation")) == ["one", "", "two\n"]


def test_json_array(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert whole(read_text(str(tmp_path / "x.json"), part="calibration")) == ["one", "two"]


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["one", "two"]}), path)
    assert whole(read_text(str(path), part="calibration")) == ["one", "two"]


def test_home_and_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert whole(read_text("~/x.txt", part="calibration")) == ["mine"]
    monkeypatch.chdir(tmp_path)
    assert whole(read_text("x.txt", part="calibration")) == ["mine"]


@pytest.mark.parametrize("name", ["gone.txt", "no/gone.jsonl", "./gone", "/gone", "~/gone.parquet"])
def test_missing_file(name):
    with refused(f"{name}: no such file; check the path after --eval"):
        read_text(name, part="evaluation")


def test_folder_and_unknown_kind(tmp_path):
    with refused("a folder; give one file"):
        read_text(str(tmp_path), part="calibration")
    (tmp_path / "x.csv").write_text("text\none\n")
    with refused(r"x.csv: unknown kind of file; give one of .txt, .json, .jsonl"):
        read_text(str(tmp_path / "x.csv"), part="calibration")


@pytest.mark.parametrize("name", ["c5", "text", "json", "", "a/b/c", "org/na me"])
def test_unknown_dataset_is_not_looked_up(name, monkeypatch):
    replace_hub(monkeypatch, lambda *_, **__: pytest.fail("looked up"))
    with refused("unknown dataset; give default, c4, wikitext, a file or a Hub id ORG/NAME"):
        read_text(name, part="calibration")


def test_no_text_column(tmp_path):
    with refused("x.jsonl: record 1: no column `text`, only content, id"):
        whole(read_text(records(tmp_path / "x.jsonl", [{"content": "a", "id": 1}]), part="calibration"))
    with refused("y.jsonl: record 2: no column `text`, only txt; rename"):
        whole(read_text(records(tmp_path / "y.jsonl", [{"text": "a"}, {"txt": "a"}]), part="calibration"))


@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (None, "NoneType"), (["a"], "list")])
def test_text_that_is_no_string(tmp_path, value, kind):
    path = records(tmp_path / "x.jsonl", [{"text": "a"}, {"text": value}])
    # The number of the record depends on how `datasets` merges values of two types.
    with refused(f"x.jsonl: record [12]: `text` is {kind}, expected a string|x.jsonl: cannot be read"):
        whole(read_text(path, part="calibration"))


def test_half_of_a_surrogate_pair(tmp_path):
    """JSON can hold it. Whole pairs are characters like others, also at the edges of what is checked at once."""
    pairs = "\U0001f600" * 2**17
    path = records(tmp_path / "x.jsonl", [{"text": pairs}, {"text": f"{pairs}ab\ud83d"}])
    documents = read_text(path, part="calibration").documents
    assert "".join(next(documents)) == pairs
    line = r"character 131075 is half of a surrogate pair \(\\ud83d\), which no encoding of text has; correct the text"
    with refused(rf"x\.jsonl: record 2: {line}"):
        next(documents)
    with refused(rf"^texts: document 2: {line}"):
        whole(read_text([pairs, f"{pairs}ab\ud83d"], part="calibration"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text":\n'),
        ("x.jsonl", b"not json"),
        ("x.jsonl", b'{"text": "\xff"}\n'),
        ("x.json.gz", b'{"text": "a"}\n'),
        # Cut short: EOFError; wrong in the middle: zlib.error.
        ("x.jsonl.gz", gzip.compress(bytes(range(256)) * 100)[:-40]),
        ("x.jsonl.gz", gzip.compress(b"")[:10] + b"\xff" * 100),
        ("x.parquet", b"no parquet at all"),
    ],
)
def test_damaged_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with refused(f"{name}: cannot be read") as caught:
        whole(read_text(str(tmp_path / name), part="calibration"))
    assert "\n" not in str(caught.value)


def test_text_file_that_is_not_utf8(tmp_path):
    (tmp_path / "x.txt").write_bytes("é".encode("latin-1"))
    with refused("x.txt: not UTF-8 text"):
        whole(read_text(str(tmp_path / "x.txt"), part="calibration"))


@pytest.mark.parametrize("content", [b"", b" \n\t\n"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.jsonl.gz", "x.parquet"])
def test_empty_text(tmp_path, plain, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    if name == "x.parquet" and content:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["", " \n"]}), path)
    with refused(f"{name}: empty, there is no text in it"):
        calibration_windows(plain, str(path), nsamples=1, seqlen=1, seed=0)
    with refused(f"{name}: empty, there is no text in it"):
        evaluation_windows(plain, str(path), seqlen=1)


# The Hub, replaced


@pytest.fixture
def asked(monkeypatch) -> list:
    """Records what `load_dataset` is asked for and returns two records."""
    calls = []

    def load(*names, **options):
        calls.append((names, options))
        rows = [{"text": "one"}, {"text": "two"}]
        return rows if "split" in options else {"train": rows, "validation": rows[1:]}

    replace_hub(monkeypatch, load)
    return calls


def test_c4_streams_one_shard(asked):
    assert whole(read_text("c4", part="calibration")) == ["one", "two"]
    assert "c4-validation.00000-of-00008" in read_text("c4", part="evaluation").source
    file = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert asked[0] == (("allenai/c4",), {"data_files": file, "split": "train", "streaming": True})
    assert asked[1][1]["split"] == "validation"


def test_wikitext(asked):
    assert read_text("wikitext", part="calibration").source == "Salesforce/wikitext wikitext-2-raw-v1 train"
    read_text("wikitext", part="evaluation")
    assert [options["split"] for _, options in asked] == ["train", "test"]


def test_other_dataset_chooses_its_split(asked):
    train, evaluation = (read_text("org/name", part=part) for part in ("calibration", "evaluation"))
    assert (train.source, whole(train)) == ("org/name train", ["one", "two"])
    assert (evaluation.source, whole(evaluation)) == ("org/name validation", ["two"])
    assert asked[0] == (("org/name",), {"streaming": True})


def test_other_dataset_without_a_split_to_use(monkeypatch):
    replace_hub(monkeypatch, lambda *_, **__: {"dev": [], "extra": []})
    with refused("org/name: no split train, only dev, extra"):
        read_text("org/name", part="calibration")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach\nmore"),
            r"the Hub cannot be reached \(Couldn't reach\); give a local file with",
        ),
        (HTTPError("proxy"), "the Hub cannot be reached"),
        (DatasetNotFoundError("no"), "neither a file nor a dataset of the Hub that you have access to"),
        (RuntimeError("Dataset scripts are no longer supported"), "cannot be read: Dataset scripts"),
        (ValueError("Config name is missing."), "cannot be read: Config name is missing."),
    ],
)
@pytest.mark.parametrize(
    ("dataset", "part", "flag"), [("c4", "calibration", "--dataset"), ("o/n", "evaluation", "--eval")]
)
def test_hub_failures_are_one_line(monkeypatch, error, message, dataset, part, flag):
    def fail(*_, **__):
        raise error

    replace_hub(monkeypatch, fail)
    with refused(f"^{dataset}: {message}") as caught:
        read_text(dataset, part=part)
    assert "\n" not in str(caught.value)
    assert "local file" not in str(caught.value) or f"{flag} PATH" in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionError, HTTPError, DatasetsError])
def test_connection_lost_while_reading(monkeypatch, error):
    def rows(*_, **__):
        yield {"text": "one"}
        raise error("gone")

    replace_hub(monkeypatch, rows)
    documents = read_text("c4", part="calibration").documents
    assert list(next(documents)) == ["one"]
    with refused("cannot be read beyond record 1: gone"):
        next(documents)


def test_default_text(monkeypatch):
    module = types.ModuleType("sparsefw.default.text")
    module.training_text = lambda: "for training"
    module.evaluation_text = lambda: "held out"
    monkeypatch.setitem(sys.modules, "sparsefw.default.text", module)
    assert whole(read_text("default", part="calibration")) == ["for training"]
    assert whole(read_text("default", part="evaluation")) == ["held out"]

    def fail():
        raise RuntimeError("this Python has no text")

    module.training_text = fail
    with refused("default: this Python has no text; give a file with --dataset PATH"):
        read_text("default", part="calibration")


def test_streamed_parquet_comes_in_few_rows(tmp_path, monkeypatch):
    """The library itself, on a file: it would decode a whole row group otherwise."""
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"{n}" for n in range(500)]}), path)
    sizes = []
    cast = Parquet._cast_table
    monkeypatch.setattr(Parquet, "_cast_table", lambda self, table: sizes.append(len(table)) or cast(self, table))
    options = {"data_files": str(path), "split": "train", "streaming": True, "cache_dir": str(tmp_path)}
    records = hub.load_records("x", "--dataset", "parquet", **options)
    assert [record["text"] for record in records] == [f"{n}" for n in range(500)]
    assert max(sizes) == hub.ROWS_AT_ONCE


# Lists of documents


def test_documents_are_a_text():
    text = read_text(["one", "", "two\n"], part="calibration")
    assert (text.source, whole(text)) == ("texts", ["one", "", "two\n"])
    assert whole(read_text(("one",), part="evaluation")) == ["one"]


@pytest.mark.parametrize("document", [3, None, b"bytes", ["a"]])
def test_documents_that_are_no_strings(document):
    with refused(f"^texts: document 2 is {type(document).__name__}, expected a string$"):
        whole(read_text(["one", document], part="calibration"))


# Without `datasets`


@pytest.mark.parametrize("name", ["c4", "wikitext", "org/name"])
def test_datasets_is_needed_for_the_hub_alone(name, tmp_path, monkeypatch, plain):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text")
    records(tmp_path / "x.jsonl", [{"text": "some text"}])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"]}), "x.parquet")
    with refused(f"^{name}: the package `datasets` is needed to read it .*--eval PATH$") as caught:
        read_text(name, part="evaluation")
    assert "\n" not in str(caught.value)
    for file in ("x.txt", "x.jsonl", "x.parquet"):
        assert calibration_windows(plain, file, nsamples=1, seqlen=4, seed=0).n == 1
    assert evaluation_windows(plain, "default", seqlen=100, limit=1).n == 1


@pytest.mark.slow
def test_datasets_is_not_imported_without_need():
    code = "import sys; from sparsefw import data; data.read_text('default', part='evaluation')"
    code += "; print('datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet"])
@pytest.mark.parametrize("device", [None, "/dev/zero"])
def test_what_may_have_no_end_is_not_opened(tmp_path, name, device):
    path = tmp_path / name
    path.symlink_to(device) if device else os.mkfifo(path)
    with refused(f"{name}: a pipe or a device, which may have no end; give a file$"):
        read_text(str(path), part="calibration")


def test_names_of_columns_are_cut(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({f"{n}\x1b" * 50: "a" for n in range(1000)}))
    with refused(r"x.json: record 1: no column `text`, only 0\\x1b.* characters\); rename") as caught:
        whole(read_text(str(path), part="calibration"))
    assert len(str(caught.value)) < 2000
