"""Text from strangers is made safe to print on one line."""

import ast
import re
from pathlib import Path

import pytest
import torch

from sparsefw import errors
from sparsefw.errors import InputError, by_command, errors_in_one_line, first_line, naming, option, shown, worded

PACKAGE = Path(errors.__file__).parent


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


def test_errors_of_a_library_are_one_line_but_for_full_memory_and_mistakes():
    line = r"^a: cannot be read: no b; give another$"
    with pytest.raises(InputError, match=line), errors_in_one_line("a: cannot be read", "give another"):
        raise ValueError("no b\nand more")
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for error in (
        InputError("b"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        full,
        NameError("b"),
        OSError(28, "b"),
    ):
        with pytest.raises(type(error)) as caught, errors_in_one_line("a", passing=(OSError,)):
            raise error
        assert caught.value is error


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


def test_options_in_the_words_of_the_caller():
    def words():
        return [option("nsamples", 3), option("overwrite", True), option("evaluate", "a b"),
                option("steps", 1), worded("--eval-windows"), worded("threads"), errors.invocation()]  # fmt: skip

    python = ["nsamples=3", "overwrite=True", "evaluate='a b'", "steps=1", "eval_windows", "threads", "call"]
    flags = ["--nsamples 3", "--overwrite", "--eval a b", "--steps 1", "--eval-windows", "threads"]
    assert words() == python
    with by_command():
        assert words() == [*flags, "command"]
    assert words() == python


def test_no_message_names_a_flag_by_itself():
    """`option` does, in the words of the caller. Only commands speak of flags alone, and the help of a flag."""
    commands = [PACKAGE / f"{name}.py" for name in ("cli", "plan", "verify", "evaluate", "run")]
    for path in {*PACKAGE.rglob("*.py")} - {*commands}:
        nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        help = [
            x
            for node in nodes
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "flag"
            for x in ast.walk(node)
        ]
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        texts = {
            x.value for x in {*nodes} - {*help, *docstrings} if isinstance(x, ast.Constant) and isinstance(x.value, str)
        }
        # What is a flag and nothing else is a name, which `worded` takes. Docker has flags of its own.
        assert not [text for text in texts if re.search(r"(^(?!--[a-z-]*$)|(?<!docker run)[ (])--[a-z]{2}", text)], path
