"""The memory of texts: what is expected of them, and that no more tokens are read than it has room for."""

import gzip

import pytest
from helpers.texts import make_tokenizer, refused
from transformers import PreTrainedTokenizerFast

from sparsefw.data import Text, calibration_windows, evaluation_windows, memory, reading_bytes, window_bytes
from sparsefw.process import writable


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


@pytest.fixture
def room(monkeypatch) -> int:
    """Memory for 600 tokens."""
    monkeypatch.setattr(memory, "ALWAYS_READ", 100)
    return memory.PIECE_BYTES + 600 * 12


def test_no_more_tokens_are_read_than_memory_has_room_for(plain, room):
    assert evaluation_windows(plain, ["x" * 600], seqlen=10, room=room).n == 60
    with refused(
        r"^texts: memory has no room for more than 600 tokens of this text; .*\(--host-memory\).*--eval-windows"
    ):
        evaluation_windows(plain, ["x" * 601], seqlen=10, room=room)
    # No more than 4 times the tokens of the windows are ever read.
    assert calibration_windows(plain, ["x" * 2000], nsamples=15, seqlen=10, seed=0, room=room).n == 15
    with refused(r"^texts: memory has no room for more than 600 tokens of this text; .* \(--nsamples, --seqlen\)"):
        calibration_windows(plain, ["x" * 2000], nsamples=16, seqlen=10, seed=0, room=room)


def test_a_limit_changes_no_windows(plain, room):
    free, limited = (evaluation_windows(plain, ["x y" * 200], seqlen=10, room=size).hash for size in (None, room))
    assert free == limited


def test_some_tokens_are_always_read(plain, room):
    """The needs of a whole run say more than those of a text do."""
    assert evaluation_windows(plain, ["x" * 100], seqlen=10, room=-(2**40)).n == 10
    with refused("no room for more than 100 tokens"):
        evaluation_windows(plain, ["x" * 101], seqlen=10, room=-(2**40))


def test_bytes_of_texts():
    assert reading_bytes(0, (), 128) == memory.PIECE_BYTES
    assert reading_bytes(10, (39,), 128) - memory.PIECE_BYTES == 4 * 40 * 128
    assert reading_bytes(10, (7, 50), 128) - memory.PIECE_BYTES == 4 * 50 * 128
    assert window_bytes(10, (7, 50), 128) == 8 * 67 * 128


def test_a_small_record_of_many_objects(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SLACK", 2**24)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a", "x": [' + b"[], " * 2**21 + b"[]]}", 1))
    before = writable()
    with refused(r"x.jsonl.gz: one of its records takes more than 0.0 GiB of memory; give more \(--host-memory\)"):
        calibration_windows(plain, str(path), nsamples=1, seqlen=10, seed=0, room=0)
    assert writable() < before + 2**25


def test_memory_of_libraries_that_read_as_they_like(plain, monkeypatch):
    """As `datasets` does with JSON of the Hub."""
    monkeypatch.setattr(memory, "SLACK", 2**26)

    def read():
        yield "a" * 50
        bytearray(2**27)

    with refused("^org/name: one of its records takes more than 0.1 GiB of memory"):
        evaluation_windows(plain, Text.of("org/name", read()), seqlen=10, room=0)
    assert evaluation_windows(plain, Text.of("org/name", read()), seqlen=10).n == 5
