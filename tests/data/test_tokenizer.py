"""A checkpoint's tokenizer: loaded and used, or refused in one line, whatever its files hold."""

import json
import os
import shutil

import pytest
from helpers.texts import make_tokenizer, refused

from sparsefw.data import evaluation_windows, tokenizer
from sparsefw.data.tokenizer import TokenizerProcess, load_tokenizer, start_tokens, tokenize
from sparsefw.errors import InputError
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


def test_a_full_folder_for_temporary_files_is_named(folder, tmp_path, monkeypatch):
    def full(path, *content, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as caught:
        load_tokenizer(folder)
    assert caught.value.filename.endswith("/tokenizer_config.json")


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


# A process of its own


def test_threads_that_a_fork_does_not_copy_are_not_waited_for(monkeypatch):
    """The user asks the library for threads, and this process has used them."""
    texts = [f"a rose is a rose, {n} times" for n in range(50)]
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    expected = tokenize(load_tokenizer(DEFAULT_MODEL), texts)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(tokenizer, "SECONDS_TO_TOKENIZE", 10)
    with TokenizerProcess(DEFAULT_MODEL) as apart:
        assert tokenize(apart, texts) == expected


def test_a_tokenizer_in_a_process_of_its_own(folder):
    texts = ["ab" * 50, "", "\0\u202e\ud800"[:2]]
    here = load_tokenizer(folder)
    with TokenizerProcess(folder) as apart:
        assert tokenize(apart, texts) == tokenize(here, texts)
        assert start_tokens(apart) == start_tokens(here)
        assert apart.name_or_path == here.name_or_path == str(folder)


@pytest.mark.parametrize("entries", [{"model": {}}, {"pre_tokenizer": "\x1b[31m"}])
def test_a_damaged_tokenizer_is_refused_there_too(entries, folder):
    change(folder / "tokenizer.json", **entries)
    with refused(f"^{folder}: no tokenizer could be loaded: ") as caught:
        TokenizerProcess(folder)
    assert str(caught.value).isprintable()


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.setattr(tokenizer, "SECONDS_TO_TOKENIZE", 0.3)
    monkeypatch.setattr(tokenizer, "CHARS_A_SECOND", 10**9)
    monkeypatch.setattr(tokenizer, "BYTES_TO_LOAD", 2**28)
    monkeypatch.setattr(tokenizer, "BYTES_A_BYTE", 0)
    monkeypatch.setattr(tokenizer, "BYTES_A_CHAR", 1)


def test_a_replacement_that_makes_texts_long(folder, limits, monkeypatch):
    # Memory is what it runs out of, however slow the machine is.
    monkeypatch.setattr(tokenizer, "SECONDS_TO_TOKENIZE", 60)
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 250}
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [grow] * 4})
    with (
        TokenizerProcess(folder) as apart,
        refused(f"^{folder}: the tokenizer cannot take this text: it needs more than"),
    ):
        tokenize(apart, ["a"])


def test_no_more_memory_than_there_is_room_for(folder, monkeypatch):
    """A text may make a tokenizer take less than the most that any may take, and still too much here."""
    monkeypatch.setattr(tokenizer, "ALWAYS_TAKEN", 2**28)
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 250}
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [grow] * 3})
    with (
        TokenizerProcess(folder, 0) as apart,
        refused(r"^.*: it needs more than 0.2 GiB of memory.*; give more \(--host-memory\)$"),
    ):
        tokenize(apart, ["a"])


def test_more_tokens_than_any_text_has(folder, monkeypatch):
    monkeypatch.setattr(tokenizer, "ANSWER", 0)
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 200}
    change(folder / "tokenizer.json", normalizer=grow)
    with (
        TokenizerProcess(folder) as apart,
        refused(f"^{folder}: the tokenizer cannot take this text: it makes more than 0.0 MiB of it$"),
    ):
        tokenize(apart, ["a" * 100])


def test_tokens_that_are_out_of_their_range(folder, monkeypatch):
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    line = f"^{folder}: the tokenizer gives a text the token {2**31}; tokens are numbers from 0 to {2**31 - 1}, "
    change(folder / "tokenizer.json", model=model | {"vocab": model["vocab"] | {"a": 2**31, "b": 2**31 - 1}})
    loaded = load_tokenizer(folder)
    with TokenizerProcess(folder) as apart:
        for either in (loaded, apart):
            assert tokenize(either, ["b", ""]) == [[2**31 - 1], []]
            with refused(line):
                tokenize(either, ["b", "ba"])
    with refused(line):
        evaluation_windows(loaded, ["ba"], seqlen=2)
    monkeypatch.setattr(tokenizer, "_start", lambda of: [2**31])
    with refused(line):
        start_tokens(loaded)


def test_memory_of_the_process(folder):
    with TokenizerProcess(folder) as apart:
        assert 2**20 < apart.nbytes() < 2**30


def test_a_pattern_that_takes_for_ever(folder, limits):
    cut = {"type": "Split", "pattern": {"Regex": "a*?\\d"}, "behavior": "Isolated", "invert": False}
    change(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [cut] * 20})
    with (
        TokenizerProcess(folder) as apart,
        refused(f"^{folder}: the tokenizer cannot take this text: it takes more than 0.3 s"),
    ):
        tokenize(apart, ["a" * 10**4])


# What the files name


@pytest.fixture
def pipe(tmp_path):
    """Whoever opens it waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("kind", [f"{name}Tokenizer" for name in ("GPT2", "Qwen2", "Llama", "Roberta", "Bart")])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_files_elsewhere_are_not_opened(kind, whole, file, folder, pipe):
    secret = pipe.with_name("secret.json")
    secret.write_text("{}")
    # Written after it was read, as far as the system knows: so reading shows.
    os.utime(secret, (1, 10**9))
    if not whole:
        (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", tokenizer_class=kind)
    (folder / "special_tokens_map.json").write_text("{}")
    for place in (pipe, secret):
        for key in ("vocab", "merges", "gguf_file", "init_inputs", "tokenizer_object"):
            kept = (folder / file).read_text()
            change(folder / file, **{key: str(place)})
            with refused(f"{file}: {key} .* would be followed out of the checkpoint"):
                TokenizerProcess(folder)
            (folder / file).write_text(kept)
        names = ("vocab_file", "merges_file", "tokenizer_file", "added_tokens_file", "name_or_path", "subfolder")
        change(folder / file, **dict.fromkeys(names, str(place)))
        try:
            TokenizerProcess(folder).close()
        except InputError:
            # Without tokenizer.json some classes have nothing to be made of.
            assert not whole
    assert secret.stat().st_atime == 1
