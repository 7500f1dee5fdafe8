"""Text from strangers is made safe to print on one line."""

import pytest

from sparsefw.errors import shown


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
