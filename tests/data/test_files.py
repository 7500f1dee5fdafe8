"""Files of text and of JSON: what records there are, and that no more is in memory than one."""

import gzip
import io
import itertools
import json

import pytest
from helpers.texts import make_tokenizer, refused, whole

from sparsefw.data import calibration_windows, files, read_text

TEXTS = ["", "one", 'a "quote" \\ and / \n\t', "é 日本 \U0001f600", "[{", "}]", " , ", "x" * 50]
VALUES = [{"id": n, "more": {"text": [None, 1.5e-3, True]}, "text": text} for n, text in enumerate(TEXTS)]


@pytest.mark.parametrize("at_once", [1, 2, 7, 10_000])
@pytest.mark.parametrize("escaped", [True, False])
@pytest.mark.parametrize("form", ["lines", "list", "spread list", "spread", "strings", "with a mark"])
def test_records_of_json(tmp_path, monkeypatch, at_once, escaped, form):
    monkeypatch.setattr(files, "AT_ONCE", at_once)

    def dumped(value, indent=None):
        return json.dumps(value, ensure_ascii=escaped, indent=indent)

    content = {
        "lines": "\r\n\n".join(map(dumped, VALUES)),
        "list": dumped(VALUES),
        "spread list": "\n " + dumped(VALUES, 2) + "\n",
        "spread": "\n".join(dumped(value, 2) for value in VALUES),
        "strings": dumped(TEXTS),
        "with a mark": "\ufeff" + "\n".join(map(dumped, VALUES)),
    }[form]
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8", newline="")
    assert whole(read_text(str(path), part="calibration")) == TEXTS


class Endless(io.StringIO):
    """A file that never ends, after a beginning."""

    def __init__(self, start: str, then: str) -> None:
        self.left, self.then, self.given = start, then, 0

    def read(self, size: int = -1) -> str:
        text = self.left[:size] or self.then * (size // len(self.then))
        self.left = self.left[size:]
        self.given += len(text)
        return text


def test_a_record_without_an_end_is_not_read_for_ever(monkeypatch):
    monkeypatch.setattr(files, "AT_ONCE", 100)
    monkeypatch.setattr(files, "LONGEST_RECORD", 10_000)
    file = Endless('{"text": "a"} {"text": "', "ab ")
    found = files._values(file)
    assert next(found) == {"text": "a"}
    with pytest.raises(ValueError, match="a record of more than 16 million characters; give such a text as a"):
        next(found)
    assert file.given < 50_000


def test_damage_is_found_at_once(monkeypatch):
    monkeypatch.setattr(files, "AT_ONCE", 100)
    file = Endless('{"text": "a"}\n{"text": damaged}\n', '{"text": "a"}\n')
    found = files._values(file)
    assert next(found) == {"text": "a"}
    with pytest.raises(ValueError, match="Expecting value"):
        next(found)
    assert file.given < 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1\n2\n", "x.jsonl: record 1 is int; expected an object with a text"),
        ('"text"', "x.jsonl: record 1 is str; expected an object"),
        ('{"text": "a"} null', "x.jsonl: record 2 is NoneType; expected an object"),
        ('[["a"]]', "x.jsonl: record 1 is list; expected an object"),
        ('[{"text": "a"}', "x.jsonl: cannot be read beyond record 1: the list has no end"),
        ('{"text": "a"}]', "x.jsonl: cannot be read beyond record 1: Expecting value"),
        ('{"text": "a\nb"}', "x.jsonl: cannot be read beyond record 0: Invalid control character"),
        ("[" * 100_000, "x.jsonl: cannot be read beyond record 0: maximum recursion depth exceeded"),
        ('{"text": ' + "1" * 5000 + "}", "x.jsonl: cannot be read beyond record 0: Exceeds the limit"),
    ],
)
def test_what_are_no_records(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with refused(message) as caught:
        whole(read_text(str(path), part="calibration"))
    assert "\n" not in str(caught.value)


def test_no_more_is_read_than_windows_take(tmp_path):
    """What comes after that may be damaged, or unpack to any size."""
    plain = make_tokenizer(bos=False)
    line = json.dumps({"text": "some words " * 100}).encode() + b"\n"
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(line * 5000)[:-100])
    (tmp_path / "x.txt").write_bytes(b"some words " * 100_000 + b"\xff")
    for name in ("x.jsonl.gz", "x.txt"):
        path = str(tmp_path / name)
        assert calibration_windows(plain, path, nsamples=2, seqlen=10, seed=0).n == 2
        with refused(f"{name}: (cannot be read beyond record|not UTF-8 text)"):
            whole(read_text(path, part="calibration"))


def test_text_comes_in_strings(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "AT_ONCE", 3)
    (tmp_path / "x.txt").write_bytes("éé\r\né\U0001f600é".encode())
    strings = next(read_text(str(tmp_path / "x.txt"), part="calibration").documents)
    assert list(itertools.islice(strings, 9)) == ["éé\n", "é\U0001f600é"]
