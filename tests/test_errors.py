"""Text from strangers is safe to print on one line, and errors of libraries end in one."""

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import refused

from sparsefw.errors import InputError, by_command, errors_in_one_line, naming, option, shown, worded


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model.layers.0", "model.layers.0"),
        ("a\nb\r\x1b[31m\x07\x00\u2028\u202e\ud800", r"a\nb\r\x1b[31m\x07\x00\u2028\u202e\ud800"),
        ("Übung 日本", "Übung 日本"),
        ("x" * 10**6, "x" * 200 + "... (1000000 characters)"),
    ],
)
def test_what_does_not_print_is_spelled_out(text, line):
    assert shown(text) == line
    assert str(InputError(text)).isprintable()


def test_errors_of_a_library_are_one_line_but_for_full_memory_and_mistakes():
    line = r"^a: cannot be read: no b; give another$"
    with refused(line), errors_in_one_line("a: cannot be read", "give another"):
        raise ValueError("no b\nand more")
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA out of memory")
    for error in (InputError("b"), MemoryError(), *full, NameError("b"), OSError(28, "b")):
        with pytest.raises(type(error)) as caught, errors_in_one_line("a", passing=(OSError,)):
            raise error
        assert caught.value is error


def test_errors_of_the_system_name_a_file():
    with pytest.raises(OSError, match=r"No space left on device: '/a/b'"), naming(Path("/a/b")):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No such file or directory: '/nowhere'"), naming(Path("/a/b")):
        Path("/nowhere").stat()


def test_options_are_named_as_the_caller_writes_them():
    def words():
        return [option("nsamples", 3), option("overwrite", True), option("evaluate", "a b"), worded("--eval-windows")]

    python = ["nsamples=3", "overwrite=True", "evaluate='a b'", "eval_windows"]
    assert words() == python
    with by_command():
        assert words() == ["--nsamples 3", "--overwrite", "--eval a b", "--eval-windows"]
    assert words() == python
