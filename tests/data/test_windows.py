"""Windows: what is drawn of a text, what is reproducible, and what is refused."""

import hashlib
import itertools
import logging
from pathlib import Path

import pytest
import torch
from helpers.texts import BOS, make_tokenizer, records, refused, replace_hub, whole
from transformers import PreTrainedTokenizerFast

from sparsefw.data import Text, pieces, windows_of
from sparsefw.data.memory import TOKENS_READ
from sparsefw.data.windows import calibration_windows, evaluation_windows


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


@pytest.fixture(scope="module")
def with_bos() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=True)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """1000 bytes in which no window of 4 bytes occurs twice."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n:03d}." for n in range(250)))
    return str(path)


def test_windows_are_pieces_of_the_text(plain, text):
    windows = calibration_windows(plain, text, nsamples=10, seqlen=20, seed=0)
    content = Path(text).read_text()
    assert (windows.n, windows.seqlen, windows.source) == (10, 20, text)
    assert windows.ids.dtype == torch.int64
    for row in plain.batch_decode(windows.ids):
        assert row in content[: 20 * 10 * TOKENS_READ]


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

    monkeypatch.setattr(pieces, "PIECE", 2048)
    replace_hub(monkeypatch, rows)
    windows = calibration_windows(plain, "c4", nsamples=4, seqlen=64, seed=0)
    assert windows.n == 4
    # 8 tokens a document, the separator among them, and whole batches.
    assert len(read) <= 4 * 64 * TOKENS_READ / 8 + pieces.PIECES_AT_ONCE
    read.clear()
    assert evaluation_windows(plain, "c4", seqlen=64, limit=3).n == 3
    assert len(read) < 1000


def test_reading_in_other_batches_draws_the_same(plain, tmp_path, monkeypatch):
    path = records(tmp_path / "x.jsonl", [{"text": f"{n:06d}"} for n in range(500)])
    first = calibration_windows(plain, path, nsamples=4, seqlen=64, seed=0)
    monkeypatch.setattr(pieces, "PIECES_AT_ONCE", 7)
    assert calibration_windows(plain, path, nsamples=4, seqlen=64, seed=0).hash == first.hash


@pytest.mark.parametrize(
    ("nsamples", "seqlen", "message"),
    [
        (11, 100, "1000 tokens, but 11 windows of 100 need 1100; use --nsamples 10 or --seqlen 90 or a longer text"),
        (3, 2000, "1000 tokens, but 3 windows of 2000 need 6000; use --seqlen 333 or a longer text"),
        (2000, 2, "1000 tokens, but 2000 windows of 2 need 4000; use --nsamples 500 or a longer text"),
        (3000, 1500, "1000 tokens, but 3000 windows of 1500 need 4500000; use a longer text"),
        (600, 2, "1000 tokens, but 600 windows of 2 need 1200; use --nsamples 500 or a longer text"),
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


def test_a_text_is_as_good_as_its_name(plain, text):
    def documents():
        return Text.of("mine", [Path(text).read_text()])

    named = calibration_windows(plain, text, nsamples=8, seqlen=16, seed=0)
    opened = calibration_windows(plain, documents(), nsamples=8, seqlen=16, seed=0)
    listed = calibration_windows(plain, whole(documents()), nsamples=8, seqlen=16, seed=0)
    assert named.hash == opened.hash == listed.hash
    assert (opened.source, listed.source) == ("mine", "texts")
    assert evaluation_windows(plain, documents(), seqlen=16).hash == evaluation_windows(plain, text, seqlen=16).hash
    with refused("^texts: empty, there is no text in it$"):
        calibration_windows(plain, [], nsamples=1, seqlen=4, seed=0)


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
    for size in (1100, 2000, 2**20):
        monkeypatch.setattr(pieces, "PIECE", size)
        assert torch.equal(evaluation_windows(plain, path, seqlen=32, limit=7).ids, whole.ids[:7])
    assert torch.equal(evaluation_windows(plain, path, seqlen=32, limit=10_000).ids, whole.ids)


def test_too_short_for_evaluation(plain, text):
    with refused("text.txt: 1000 tokens, fewer than one window of 1001; use --seqlen 1000 or a longer text"):
        evaluation_windows(plain, text, seqlen=1001)
    with refused("texts: 1 tokens, fewer than one window of 2; use a longer text"):
        evaluation_windows(plain, ["a"], seqlen=2)
    with refused("--eval-windows 0: expected at least 1"):
        evaluation_windows(plain, text, seqlen=10, limit=0)


# Special tokens and warnings


def test_only_the_start_token_of_the_tokenizer_and_once(plain, with_bos, tmp_path):
    path = records(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": "defgh"}])
    evaluation = evaluation_windows(with_bos, path, seqlen=11)
    assert evaluation.ids.flatten().tolist() == [BOS, *plain("abc\n\ndefgh", truncation=False).input_ids]
    drawn = calibration_windows(with_bos, path, nsamples=1, seqlen=11, seed=0)
    assert torch.equal(drawn.ids, evaluation.ids)


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


# windows_of


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.uint16])
def test_windows_of_tokens(dtype):
    ids = torch.arange(12).view(4, 3).T.to(dtype)
    windows = windows_of(ids, "mine")
    assert (windows.n, windows.seqlen, windows.source) == (3, 4, "mine")
    assert windows.ids.dtype == torch.int64
    assert windows.ids.tolist() == ids.tolist()
    assert windows.hash == hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.arange(6), r"tokens of shape \(6,\); give a tensor \(windows, seqlen\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"tokens of shape \(1, 2, 3\)"),
        (torch.zeros(2, 3), "tokens of dtype torch.float32; give integers"),
        (torch.zeros(2, 3, dtype=torch.bool), "tokens of dtype torch.bool; give integers"),
        (torch.zeros(0, 3, dtype=torch.int64), "0 windows of 3 tokens; give at least one window, of at least 2"),
        (torch.zeros(3, 1, dtype=torch.int64), "3 windows of 1 tokens; give at least one window, of at least 2"),
        (torch.tensor([[5, 3], [-100, 2]]), "token -100; no token is negative"),
    ],
)
def test_what_are_no_windows(ids, message):
    with refused(f"^mine: {message}") as caught:
        windows_of(ids, "mine")
    assert "\n" not in str(caught.value)
