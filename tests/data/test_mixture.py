"""Calibration windows of several texts: how many of each, which, and what is refused."""

import hashlib
from pathlib import Path

import pytest
import torch
from helpers.texts import make_tokenizer, refused

from sparsefw.data import calibration_windows, mixed_windows, mixture
from sparsefw.data.mixture import counts

SIZE = dict(seqlen=8, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos=False)


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Three texts, each with digits or letters of its own."""
    for name, letters in (("a.txt", "0123456789"), ("b.txt", "ghijklmnop"), ("c.txt", "qrstuvwxyz")):
        (tmp_path / name).write_text("".join(letters[n * n % 10] for n in range(2000)))
    return [str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt")]


@pytest.mark.parametrize(
    ("n", "shares", "found"),
    [
        (9, [1, 1, 1], [3, 3, 3]),
        (64, [1, 1, 1], [22, 21, 21]),
        (65, [1, 1, 1], [22, 22, 21]),
        (64, [3, 1], [48, 16]),
        (10, [0.5, 0.25, 0.25], [5, 3, 2]),
        (8, [1e6, 1], [8, 0]),
        (7, [0.1, 0.2, 0.7], [1, 1, 5]),
        (1, [1], [1]),
        (5, [1e308, 1e308], [3, 2]),
        (5, [5e-324, 5e-324], [3, 2]),
    ],
)
def test_counts(n, shares, found):
    assert counts(n, shares) == found


def test_one_text_is_drawn_as_it_is_alone(tokenizer, texts):
    alone = calibration_windows(tokenizer, texts[0], nsamples=20, **SIZE)
    for share in (1, 7):
        found = mixed_windows(tokenizer, {texts[0]: share}, nsamples=20, **SIZE)
        assert torch.equal(found.ids, alone.ids)
        assert (found.source, found.hash) == (alone.source, alone.hash)


def test_a_mixture_has_the_windows_of_each_text(tokenizer, texts):
    """In an order in which every part of them has some of each."""
    a, b, c = texts
    found = mixed_windows(tokenizer, {a: 1, b: 2, c: 1}, nsamples=40, **SIZE)
    assert found.source == f"{a} (10) + {b} (20) + {c} (10)"
    assert found.hash == hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()
    parts = [calibration_windows(tokenizer, x, nsamples=n, **SIZE).ids for x, n in ((a, 10), (b, 20), (c, 10))]
    expected = [row for ids in parts for row in ids.tolist()]
    assert sorted(found.ids.tolist()) == sorted(expected)
    assert found.ids.tolist() != expected
    owner = [next(n for n, ids in enumerate(parts) if row in ids.tolist()) for row in found.ids.tolist()]
    assert set(owner[:20]) == set(owner[20:]) == {0, 1, 2}


def test_the_draw_depends_on_the_seed_alone(tokenizer, texts):
    def draw(seed, share=1):
        return mixed_windows(tokenizer, dict.fromkeys(texts, share), nsamples=12, seqlen=8, seed=seed)

    first = draw(3)
    torch.manual_seed(99)
    assert torch.equal(draw(3).ids, first.ids)
    assert draw(4).hash != first.hash
    # A share is a ratio.
    assert draw(3, share=5).hash == first.hash


def test_room_for_the_windows_is_set_aside(tokenizer, texts, monkeypatch):
    rooms = []

    def drawn(*args, room, **kwargs):
        rooms.append(room)
        return calibration_windows(*args, **kwargs)

    monkeypatch.setattr(mixture, "calibration_windows", drawn)
    mixed_windows(tokenizer, dict.fromkeys(texts, 1), nsamples=12, room=10**6, **SIZE)
    assert rooms == [10**6 - 8 * 12 * 8] * 3


def test_what_is_refused(tokenizer, texts):
    a, b, _ = texts
    with refused(r"b.txt: its share, 0.1, is none of 8 windows; give more"):
        mixed_windows(tokenizer, {a: 99, b: 0.1}, nsamples=8, **SIZE)
    with refused(r"a.txt: 2000 tokens, but 300 windows of 8 need 2400; use --seqlen 6 or a smaller share or a longer"):
        mixed_windows(tokenizer, {a: 3, b: 1}, nsamples=400, **SIZE)
    with refused(r"none.txt: no such file"):
        mixed_windows(tokenizer, {a: 1, "none.txt": 1}, nsamples=8, **SIZE)
