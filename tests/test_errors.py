"""Text from strangers is made safe to print on one line."""

from pathlib import Path

import pytest

from sparsefw.errors import InputError, first_line, naming, shown


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model.layers.0", "model.layers.0"),
        ("a\nb\r\x1b[31m\x07\x00", r"a\nb\r\x1b[31m\x07\x00"),
        ("\u2028\u202e\ud800\x85", r"\u2028\u202e\ud800\x85"),
        ("Übung 日本", "Übung 日本"),
        ((1, 2), "(1, 2)"),
        ("x" * 200, "x" * 200),
        ("x" * 10**6, "x" * 200 + "... (1000000 characters)"),
    ],
)
def test_shown(text, line):
    assert shown(text) == line
    assert line.isprintable()


def test_no_message_has_what_does_not_print():
    assert str(InputError("the column a\nb\x1b[2J\u202e: none")) == r"the column a\nb\x1b[2J\u202e: none"


def test_errors_of_the_system_name_a_file():
    with pytest.raises(OSError, match=r"No space left on device: '/a/b'"), naming(Path("/a/b")):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No such file or directory: '/nowhere'"), naming(Path("/a/b")):
        Path("/nowhere").stat()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("\n  first\nsecond", "first"),
        ("", "KeyError"),
        ("One of these is wrong:\n\n   a\n   b", "One of these is wrong: a"),
        ("nothing follows:", "nothing follows:"),
    ],
)
def test_the_first_line_says_something(message, line):
    error = KeyError()
    error.args = ()
    assert first_line(ValueError(message) if message else error) == line
