"""Texts and windows: what is drawn, what is reproducible, and what is refused. Nothing here needs a network."""

import gzip
import hashlib
import itertools
import json
import logging
import sys
import types
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets.exceptions import DatasetNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparsefw import data
from sparsefw.data import calibration_windows, evaluation_windows, read_text
from sparsefw.errors import InputError

BOS = 256


def make_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One token per byte, of which no two merge; 256 at the start if `bos`, 257 at the end."""
    vocabulary = {char: n for n, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": BOS, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        specials = [("<s>", BOS), ("</s>", 257)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    # Far shorter than the texts, and a stored truncation: neither may matter.
    tokenizer.enable_truncation(7)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=7,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


@pytest.fixture(scope="module")
def with_bos() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=True)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """1000 bytes, every window of 4 of which is another one."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n:03d}." for n in range(250)))
    return str(path)


def refused(match: str):
    return pytest.raises(InputError, match=match)


def records(path: Path, rows: list) -> str:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


# read_text


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "A [1] * file.TXT"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo \xc3\xa9\n")
    text = read_text(str(path), part="calibration")
    assert text.source == str(path)
    assert list(text) == ["one\n\ntwo é\n"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.json.gz", "x.jsonl.gz", "x [1] *.jsonl"])
def test_records(tmp_path, name):
    rows = [{"text": "one", "id": 1}, {"text": "", "id": 2}, {"text": "two\n", "id": 3}]
    path = records(tmp_path / name, rows)
    assert list(read_text(path, part="evaluation")) == ["one", "", "two\n"]


def test_json_array(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert list(read_text(str(tmp_path / "x.json"), part="calibration")) == ["one", "two"]


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["one", "two"]}), path)
    assert list(read_text(str(path), part="calibration")) == ["one", "two"]


def test_home_and_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(read_text("~/x.txt", part="calibration")) == ["mine"]
    monkeypatch.chdir(tmp_path)
    assert list(read_text("x.txt", part="calibration")) == ["mine"]


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
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("looked up"))
    with refused("unknown dataset; give default, c4, wikitext, a file or a Hub id ORG/NAME"):
        read_text(name, part="calibration")


def test_no_text_column(tmp_path):
    with refused("x.jsonl: no column `text`, only content, id"):
        list(read_text(records(tmp_path / "x.jsonl", [{"content": "a", "id": 1}]), part="calibration"))


@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (None, "NoneType"), (["a"], "list")])
def test_text_that_is_no_string(tmp_path, value, kind):
    path = records(tmp_path / "x.jsonl", [{"text": "a"}, {"text": value}])
    # Which record it is depends on how `datasets` brings values of two types together.
    with refused(f"x.jsonl: record [12]: `text` is {kind}, expected a string|x.jsonl: cannot be read"):
        list(read_text(path, part="calibration"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text":\n'),
        ("x.jsonl", b"not json"),
        ("x.jsonl", b'{"text": "\xff"}\n'),
        ("x.jsonl", b"1\n2\n"),
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
        list(read_text(str(tmp_path / name), part="calibration"))
    assert "\n" not in str(caught.value)


def test_text_file_that_is_not_utf8(tmp_path):
    (tmp_path / "x.txt").write_bytes("é".encode("latin-1"))
    with refused("x.txt: not UTF-8 text"):
        read_text(str(tmp_path / "x.txt"), part="calibration")


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
def hub(monkeypatch) -> list:
    """Records what `load_dataset` is asked for and returns two records."""
    asked = []

    def load(*names, **options):
        asked.append((names, options))
        rows = [{"text": "one"}, {"text": "two"}]
        return rows if "split" in options else {"train": rows, "validation": rows[1:]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_c4_streams_one_shard(hub):
    assert list(read_text("c4", part="calibration")) == ["one", "two"]
    assert "c4-validation.00000-of-00008" in read_text("c4", part="evaluation").source
    file = {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert hub[0] == (("allenai/c4",), {"data_files": file, "split": "train", "streaming": True})
    assert hub[1][1]["split"] == "validation"


def test_wikitext(hub):
    assert read_text("wikitext", part="calibration").source == "Salesforce/wikitext wikitext-2-raw-v1 train"
    read_text("wikitext", part="evaluation")
    assert [options["split"] for _, options in hub] == ["train", "test"]


def test_other_dataset_chooses_its_split(hub):
    train, held_out = (read_text("org/name", part=part) for part in ("calibration", "evaluation"))
    assert (train.source, list(train)) == ("org/name train", ["one", "two"])
    assert (held_out.source, list(held_out)) == ("org/name validation", ["two"])
    assert hub[0] == (("org/name",), {"streaming": True})


def test_other_dataset_without_a_split_to_use(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"dev": [], "extra": []})
    with refused("org/name: no split train, only dev, extra"):
        read_text("org/name", part="calibration")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ConnectionError("Couldn't reach\nmore"),
            r"the Hub cannot be reached \(Couldn't reach\); give a local file with",
        ),
        (data.HTTPError("proxy"), "the Hub cannot be reached"),
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

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with refused(f"^{dataset}: {message}") as caught:
        read_text(dataset, part=part)
    assert "\n" not in str(caught.value)
    assert "local file" not in str(caught.value) or f"{flag} PATH" in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionError, data.HTTPError, data.DatasetsError])
def test_connection_lost_while_reading(monkeypatch, error):
    def rows(*_, **__):
        yield {"text": "one"}
        raise error("gone")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    documents = iter(read_text("c4", part="calibration"))
    assert next(documents) == "one"
    with refused("cannot be read beyond record 1: gone"):
        next(documents)


def test_default_text(monkeypatch):
    module = types.ModuleType("sparsefw.default.text")
    module.training_text = lambda: "for training"
    module.heldout_text = lambda: "held out"
    monkeypatch.setitem(sys.modules, "sparsefw.default.text", module)
    assert list(read_text("default", part="calibration")) == ["for training"]
    assert list(read_text("default", part="evaluation")) == ["held out"]

    def fail():
        raise RuntimeError("this Python has no text")

    module.training_text = fail
    with refused("default: this Python has no text; give a file with --dataset PATH"):
        read_text("default", part="calibration")


# calibration_windows


def test_windows_are_pieces_of_the_text(plain, text):
    windows = calibration_windows(plain, text, nsamples=10, seqlen=20, seed=0)
    content = Path(text).read_text()
    assert (windows.n, windows.seqlen, windows.source) == (10, 20, text)
    assert windows.ids.dtype == torch.int64
    for row in plain.batch_decode(windows.ids):
        assert row in content[: 20 * 10 * data.TOKENS_READ]


@pytest.mark.parametrize(("nsamples", "seqlen"), [(10, 20), (50, 20), (49, 20), (1, 1000), (1, 999), (1, 1), (250, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_windows_are_disjoint(plain, text, nsamples, seqlen, seed):
    windows = calibration_windows(plain, text, nsamples=nsamples, seqlen=seqlen, seed=seed)
    assert windows.ids.shape == (nsamples, seqlen)
    content = Path(text).read_text()
    starts = sorted(content.index(row) for row in plain.batch_decode(windows.ids)) if seqlen > 3 else [0]
    assert all(later - earlier >= seqlen for earlier, later in itertools.pairwise(starts))


def test_draw_depends_on_the_seed_alone(plain, text):
    def draw(seed):
        return calibration_windows(plain, text, nsamples=8, seqlen=16, seed=seed)

    first = draw(3)
    torch.manual_seed(99)
    again = draw(3)
    assert torch.equal(first.ids, again.ids)
    assert first.hash == again.hash == hashlib.sha256(first.ids.numpy().tobytes()).hexdigest()
    hashes = {draw(seed).hash for seed in range(20)}
    assert len(hashes) == 20
    # Not only the order differs: so do the offsets.
    assert len({int(Path(text).read_text().index(plain.decode(draw(s).ids[0]))) % 16 for s in range(20)}) > 4


def test_hash_is_stable(plain, text):
    windows = evaluation_windows(plain, text, seqlen=100)
    assert windows.hash == "f41c8019bed10702d7eb3d3f368e5af573649c1e1a8ab257ab1cfc4c9fcf5be0"


def test_only_as_much_is_read_as_needed(plain, monkeypatch):
    read = []

    def rows(*_, **__):
        for n in range(100_000):
            read.append(n)
            yield {"text": f"{n:06d}"}

    monkeypatch.setattr(datasets, "load_dataset", rows)
    windows = calibration_windows(plain, "c4", nsamples=4, seqlen=64, seed=0)
    assert windows.n == 4
    # 8 tokens a document, the separator among them, and whole batches.
    assert len(read) <= 4 * 64 * data.TOKENS_READ / 8 + data.DOCUMENTS_AT_ONCE
    read.clear()
    assert evaluation_windows(plain, "c4", seqlen=64, limit=3).n == 3
    assert len(read) < 1000


def test_reading_in_other_batches_draws_the_same(plain, tmp_path, monkeypatch):
    path = records(tmp_path / "x.jsonl", [{"text": f"{n:06d}"} for n in range(500)])
    first = calibration_windows(plain, path, nsamples=4, seqlen=64, seed=0)
    monkeypatch.setattr(data, "DOCUMENTS_AT_ONCE", 7)
    assert calibration_windows(plain, path, nsamples=4, seqlen=64, seed=0).hash == first.hash


@pytest.mark.parametrize(
    ("nsamples", "seqlen", "message"),
    [
        (11, 100, "1000 tokens, but 11 windows of 100 need 1100; use --nsamples 10 or --seqlen 90 or a longer text"),
        (3, 2000, "1000 tokens, but 3 windows of 2000 need 6000; use --seqlen 333 or a longer text"),
        (2000, 2, "1000 tokens, but 2000 windows of 2 need 4000; use --nsamples 500 or a longer text"),
        (3000, 1500, "1000 tokens, but 3000 windows of 1500 need 4500000; use a longer text"),
    ],
)
def test_too_short_for_calibration(plain, text, nsamples, seqlen, message):
    with refused(f"text.txt: {message}"):
        calibration_windows(plain, text, nsamples=nsamples, seqlen=seqlen, seed=0)


def test_advice_for_a_short_text_works(plain, text):
    assert calibration_windows(plain, text, nsamples=10, seqlen=100, seed=0).n == 10
    assert calibration_windows(plain, text, nsamples=11, seqlen=90, seed=0).n == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nsamples": 0}, "--nsamples 0: expected at least 1"),
        ({"seqlen": -1}, "--seqlen -1: expected at least 1"),
        ({"seed": -1}, "--seed -1: expected"),
        ({"seed": 2**63}, "--seed 9223372036854775808: expected"),
    ],
)
def test_arguments_out_of_range(plain, text, change, message):
    with refused(message):
        calibration_windows(plain, text, **({"nsamples": 1, "seqlen": 4, "seed": 0} | change))


# evaluation_windows


def test_evaluation_is_the_joined_text_from_its_start(plain, tmp_path):
    documents = ["", " = Title = \n", "", " Some words .\n", "more"]
    path = records(tmp_path / "x.jsonl", [{"text": d} for d in documents])
    windows = evaluation_windows(plain, path, seqlen=5)
    joined = "\n\n".join(documents)
    assert "".join(plain.batch_decode(windows.ids)) == joined[: len(joined) // 5 * 5]


def test_limit_takes_the_first_windows(plain, tmp_path, monkeypatch):
    path = records(tmp_path / "x.jsonl", [{"text": f"{n:06d}"} for n in range(500)])
    whole = evaluation_windows(plain, path, seqlen=32)
    assert whole.n == 500 * 8 // 32 - 1
    for guess in (1, 8, 1000):
        monkeypatch.setattr(data, "CHARS_PER_TOKEN", guess)
        assert torch.equal(evaluation_windows(plain, path, seqlen=32, limit=7).ids, whole.ids[:7])
    assert torch.equal(evaluation_windows(plain, path, seqlen=32, limit=10_000).ids, whole.ids)


def test_too_short_for_evaluation(plain, text):
    with refused("text.txt: 1000 tokens, fewer than one window of 1001; use --seqlen 1000 or a longer text"):
        evaluation_windows(plain, text, seqlen=1001)
    with refused("--eval-windows 0: expected at least 1"):
        evaluation_windows(plain, text, seqlen=10, limit=0)


# Special tokens and warnings


def test_only_the_start_token_of_the_tokenizer_and_once(plain, with_bos, tmp_path):
    path = records(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": "defgh"}])
    held_out = evaluation_windows(with_bos, path, seqlen=11)
    assert held_out.ids.flatten().tolist() == [BOS, *plain("abc\n\ndefgh", truncation=False).input_ids]
    drawn = calibration_windows(with_bos, path, nsamples=1, seqlen=11, seed=0)
    assert torch.equal(drawn.ids, held_out.ids)


def test_no_warning_about_long_texts(text, caplog):
    # A new one, since a tokenizer warns only once.
    plain = make_tokenizer(bos=False)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        calibration_windows(plain, text, nsamples=1, seqlen=900, seed=0)
        evaluation_windows(plain, text, seqlen=900)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""
