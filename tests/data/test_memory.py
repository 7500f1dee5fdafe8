"""The memory of texts: what is expected of them, and that no more tokens are read than it has room for."""

import pytest
from helpers.texts import make_tokenizer, refused
from transformers import PreTrainedTokenizerFast

from sparsefw.data import calibration_windows, evaluation_windows, memory, reading_bytes, window_bytes


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
