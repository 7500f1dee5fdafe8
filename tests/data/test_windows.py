"""Windows: what is drawn of a text or of several, what is reproducible, and what is refused."""

import hashlib
import re
import weakref
from pathlib import Path

import pytest
import torch
from helpers.texts import BOS, calibration_windows, make_tokenizer, records, refused, replace_hub
from transformers import PreTrainedTokenizerFast

from sparsefw.call_inputs import text_inputs
from sparsefw.data import tokens
from sparsefw.data.text import SELF
from sparsefw.data.windows import (
    TOKENS_READ,
    Windows,
    WindowStream,
    counts,
    evaluation_windows,
    windows_of,
    windows_of_records,
)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """1000 bytes in which no window of 4 bytes occurs twice."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n:03d}." for n in range(250)))
    return str(path)


class Numbers:
    """A tokenizer of numbers, of which each is a token; `asked` counts them."""

    name_or_path, bos_token_id, asked = "", None, 0

    def __call__(self, texts: list[str], **_) -> dict:
        ids = [[int(word) for word in text.split() if word.isdigit()] for text in texts]
        self.asked += sum(map(len, ids))
        return {"input_ids": ids}


def streamed(dataset, **options) -> WindowStream:
    return WindowStream(Numbers(), dataset, nsamples=2, seqlen=10, seed=3, **options)


# 3 pools and the rest of a text, if a run has 2 windows of 10 tokens.
POOL, NUMBERS = 320, [str(n) for n in range(1000)]


# WindowStream


def test_a_stream_reads_a_text_on_and_then_again():
    """Pool by pool, no token twice, and few are dropped."""
    said: list[str] = []
    stream = streamed(NUMBERS, say=said.append)
    first = stream.take(2)
    assert first.hash == calibration_windows(Numbers(), NUMBERS, nsamples=2, seqlen=10, seed=3).hash
    seen = first.ids.flatten().tolist()
    while not said:
        assert stream.tokenizer.asked == min(1000, POOL * (1 + max(seen) // POOL))
        seen += (last := stream.take(1).ids.flatten().tolist())
    assert (stream.tokenizer.asked, max(last) // POOL) == (1000 + POOL, 0)
    assert 1000 - 4 * 18 <= len(set(seen[:-10])) == len(seen) - 10
    assert last != seen[:10]
    stream.take(200)
    assert said == ["texts: ends after 1,000 tokens, and is read again"]


def own(*_) -> Windows:
    return windows_of(torch.arange(70).view(7, 10), "own")


def test_windows_do_not_depend_on_how_many_are_taken_at_a_time(texts):
    """Before and after the end of a text."""
    mixture = dict.fromkeys([*texts, SELF], 1)
    for make in (
        lambda: streamed(NUMBERS),
        lambda: streamed(iter(NUMBERS)),
        lambda: streamed(own()),
        lambda: WindowStream(make_tokenizer(bos=True), mixture, 28, 10, 3, own),
    ):
        whole, stream = make().take(400).ids, make()
        for part in whole.split([1, 1, 5, 93, 200, 7, 93]):
            assert torch.equal(stream.take(len(part)).ids, part)


def test_what_cannot_be_read_again_repeats():
    """The last tokens of an iterator, as many as a pool has, and windows without a text."""
    stream = streamed(iter(NUMBERS))
    stream.take(100)
    found = stream.take(100).ids.unique()
    assert len(found) > POOL - 18
    assert min(found) >= 1000 - POOL
    stream, given = streamed(own()), own().ids.tolist()
    rounds = [stream.take(7).ids.tolist() for _ in range(3)]
    assert given == rounds[0] == sorted(rounds[1]) == sorted(rounds[2])
    assert given != rounds[1] != rounds[2]


def test_records_of_a_caller_are_read_again_if_they_can_be():
    for data, again in ((NUMBERS, NUMBERS), (iter(NUMBERS), [])):
        _, documents = text_inputs("model", data, None, nsamples=2, seqlen=10, seed=0, eval_windows=None)
        assert [[*documents], [*documents], [*documents]] == [NUMBERS, again, again]


# calibration_windows


@pytest.mark.parametrize(
    ("nsamples", "seqlen", "pieces"), [(3, 255, 1), (3, 257, 2), (2, 1000, 7), (5, 1021, 7), (2, 4099, 8)]
)
@pytest.mark.parametrize("spare", [0, 1, 9000])
def test_windows_of_any_length_are_of_several_places(nsamples, seqlen, pieces, spare):
    """Tokens that are their own places: none is taken twice, and a window has a piece or two more than others."""
    records = [range(2), range(2, nsamples * seqlen + spare)]
    ids = windows_of_records(records, "x", nsamples=nsamples, seqlen=seqlen, seed=0)
    assert (ids.shape, ids.unique().numel()) == ((nsamples, seqlen), nsamples * seqlen)
    breaks = (ids.diff(dim=1) != 1).sum(1)
    assert breaks.max() <= (pieces + 1 if pieces > 1 else 0)
    # Two pieces may follow each other in the text, too.
    assert pieces == 1 or breaks.sum() >= nsamples * (pieces - 1) / 2


def test_windows_are_as_long_as_the_longest_record():
    ids = windows_of_records([range(2), *[range(99)] * 9], "x", nsamples=9, seqlen=None, seed=0)
    assert ids.shape == (9, 99)


def test_nothing_stays_open_once_the_windows_are_drawn():
    closed: list[bool] = []
    weakref.finalize(tokenizer := Numbers(), closed.append, True)
    stream = WindowStream(tokenizer, NUMBERS, 2, 10, 0)
    stream.take(2)
    stream.close()
    del stream, tokenizer
    assert closed


def test_draws_are_those_of_the_seed_and_stay_what_they_are(plain, text):
    """Digests of a run's windows, by which another version may go on with it."""
    drawn = [calibration_windows(plain, text, nsamples=8, seqlen=16, seed=seed) for seed in (3, 4)]
    assert drawn[0].hash == "9f452202d8ec3cf1104911c3cf2a36575dfa8198dd6d5d2e5127f16ed726d263"
    assert drawn[0].hash == hashlib.sha256(drawn[0].ids.numpy().tobytes()).hexdigest() != drawn[1].hash
    assert evaluation_windows(plain, text, seqlen=100).hash == (
        "f41c8019bed10702d7eb3d3f368e5af573649c1e1a8ab257ab1cfc4c9fcf5be0"
    )


def test_only_as_much_is_read_as_needed(plain, monkeypatch):
    read = []

    def rows(*_, **__):
        for n in range(100_000):
            read.append(n)
            yield {"text": f"{n:06d}"}

    monkeypatch.setattr(tokens, "PIECE", 2048)
    replace_hub(monkeypatch, rows)
    calibration_windows(plain, "c4", nsamples=4, seqlen=64, seed=0)
    # 8 tokens a document, the separator among them, and whole batches.
    assert len(read) <= (4 * 64 * TOKENS_READ + 2048) / 8
    read.clear()
    assert evaluation_windows(plain, "c4", seqlen=64, limit=3).n == 3
    assert len(read) < 1000


def test_too_short_for_calibration(plain, text):
    message = r"1000 tokens, but 11 windows of 100 need 1100; use .*at most nsamples=10 or seqlen=90"
    with refused(f"text.txt: {message}$"):
        calibration_windows(plain, text, nsamples=11, seqlen=100, seed=0)
    assert calibration_windows(plain, text, nsamples=10, seqlen=100, seed=0).n == 10
    with refused("^texts: 0 tokens, but 1 windows of 4 need 4"):
        calibration_windows(plain, [], nsamples=1, seqlen=4, seed=0)


# evaluation_windows


def test_evaluation_is_the_joined_text_from_its_start(plain, tmp_path):
    documents = ["", " = Title = \n", "", " Some words .\n", "more"]
    path = records(tmp_path / "x.jsonl", [{"text": d} for d in documents])
    joined = "\n\n".join(documents)
    whole = evaluation_windows(plain, path, seqlen=5)
    assert "".join(plain.batch_decode(whole.ids)) == joined[: len(joined) // 5 * 5]
    assert evaluation_windows(plain, documents, seqlen=5).hash == whole.hash
    for limit in (2, 10_000):
        assert torch.equal(evaluation_windows(plain, path, seqlen=5, limit=limit).ids, whole.ids[:limit])


def test_too_short_for_evaluation(plain):
    for text in ([], ["a"]):
        with refused(r"^texts: [01] tokens, fewer than one window of 2; "):
            evaluation_windows(plain, text, seqlen=2)


def test_only_the_start_token_of_the_tokenizer_and_once(plain, tmp_path):
    with_bos = make_tokenizer(bos=True)
    path = records(tmp_path / "x.jsonl", [{"text": "abc"}, {"text": "defgh"}])
    evaluation = evaluation_windows(with_bos, path, seqlen=11)
    assert evaluation.ids.flatten().tolist() == [BOS, *plain("abc\n\ndefgh", truncation=False).input_ids]
    assert torch.equal(calibration_windows(with_bos, path, nsamples=1, seqlen=11, seed=0).ids, evaluation.ids)


# windows_of


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.uint16])
def test_windows_of_tokens(dtype):
    ids = torch.arange(12).view(4, 3).T.to(dtype)
    windows = windows_of(ids, "mine")
    assert windows.ids.dtype == torch.int64
    assert windows.ids.tolist() == ids.tolist()
    assert windows.hash == hashlib.sha256(ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def test_what_are_no_windows():
    for ids in (torch.arange(6), torch.zeros(2, 3), torch.zeros(3, 1).long(), torch.tensor([[5, 3], [-100, 2]])):
        with refused("^mine: "):
            windows_of(ids, "mine")


# Mixtures


@pytest.mark.parametrize(
    ("n", "shares", "found"),
    [
        (64, [1, 1, 1], [22, 21, 21]),
        (10, [0.5, 0.25, 0.25], [5, 3, 2]),
        (8, [1e6, 1], [8, 0]),
        (5, [1e308, 1e308], [3, 2]),
    ],
)
def test_counts(n, shares, found):
    assert counts(n, shares) == found


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Three texts, each with digits or letters of its own."""
    for name, letters in (("a.txt", "0123456789"), ("b.txt", "ghijklmnop"), ("c.txt", "qrstuvwxyz")):
        (tmp_path / name).write_text("".join(letters[n * n % 10] for n in range(2000)))
    return [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]


def test_a_mixture_has_the_windows_of_each_text(plain, texts):
    a, b, c = texts
    found = calibration_windows(plain, {a: 1, b: 2, c: 1}, nsamples=40, seqlen=8, seed=3)
    assert found.source == f"{a} (10) + {b} (20) + {c} (10)"
    drawn = [calibration_windows(plain, x, nsamples=n, seqlen=8, seed=3).ids for x, n in ((a, 10), (b, 20), (c, 10))]
    expected = [row for ids in drawn for row in ids.tolist()]
    assert sorted(found.ids.tolist()) == sorted(expected)
    assert found.ids.tolist() != expected
    alone = calibration_windows(plain, {a: 7}, nsamples=10, seqlen=8, seed=3)
    assert (alone.source, alone.ids.tolist()) == (a, drawn[0].tolist())


def test_each_group_of_a_mixture_has_the_shares(plain, texts):
    """Before and after the ends of the texts."""
    stream = WindowStream(plain, dict(zip(texts, (1, 2, 1), strict=True)), nsamples=40, seqlen=8, seed=3)
    for _ in range(20):
        letters = "".join(plain.batch_decode(stream.take(40).ids[:, :1]))
        assert [len(re.findall(own, letters)) for own in (r"\d", "[g-p]", "[q-z]")] == [10, 20, 10]
    assert stream.take(80).source == "{} (20) + {} (40) + {} (20)".format(*texts)


def test_own_text_has_its_place_in_a_mixture(plain, texts):
    ids = calibration_windows(plain, {SELF: 1, texts[0]: 1}, own, nsamples=14, seqlen=10, seed=3).ids
    order = torch.randperm(14, generator=torch.Generator().manual_seed(3))
    assert torch.equal(ids[order.argsort()][:7], own().ids)


def test_own_text_is_written_once_the_others_are_there(plain, tmp_path):
    write = lambda *_: pytest.fail("written")  # noqa: E731
    missing = str(tmp_path / "none.txt")
    for shares, message in (({SELF: 1, missing: 1}, "none.txt"), ({SELF: 9, "default": 0.01}, "is none of 4 windows")):
        with refused(message):
            calibration_windows(plain, shares, write, nsamples=4, seqlen=8, seed=3)
