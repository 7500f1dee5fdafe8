"""A checkpoint's tokenizer: loaded and used, or refused in one line, whatever its files hold."""

import json
import shutil

import pytest
from helpers.texts import make_tokenizer, refused

from sparsefw.data import tokenizer
from sparsefw.data.tokenizer import load_tokenizer, start_tokens, tokenize
from sparsefw.inputs import DEFAULT_MODEL


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEFAULT_MODEL, tmp_path / "model")


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_texts_are_tokenized_without_special_tokens():
    with_start = make_tokenizer(bos=True)
    assert tokenize(with_start, ["ab" * 5, ""]) == [with_start.convert_tokens_to_ids(["a", "b"]) * 5, []]
    assert start_tokens(with_start) == [with_start.bos_token_id]
    assert start_tokens(make_tokenizer(bos=False)) == []


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}),
        ("tokenizer.json", {"pre_tokenizer": "\x1b[31m"}),
        ("tokenizer.json", {"added_tokens": [{"id": 0}]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}),
        ("tokenizer_config.json", {"model_max_length": "many", "extra_special_tokens": 3}),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(file, entries, folder):
    change(folder / file, **entries)
    with refused(f"^{folder}: no tokenizer could be loaded: ") as caught:
        load_tokenizer(folder)
    assert str(caught.value).isprintable()


class PanicException(BaseException):
    """Stands for the class in tokenizers, which cannot be imported."""


@pytest.mark.parametrize("error", [PanicException, Exception, OverflowError])
def test_a_tokenizer_that_fails_at_a_text_is_refused(error, folder, monkeypatch):
    def fails(*texts, **options):
        raise error("index out of bounds\nat all")

    loaded = load_tokenizer(folder)
    monkeypatch.setattr(type(loaded), "__call__", fails)
    with refused(f"^{folder}: the tokenizer cannot take this text: index out of bounds$"):
        tokenize(loaded, ["a"])
    with refused(f"^{folder}: the tokenizer cannot take a text: index out of bounds$"):
        start_tokens(loaded)


def test_an_interruption_is_no_fault_of_the_tokenizer(folder, monkeypatch):
    def interrupted(*names, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(folder)
