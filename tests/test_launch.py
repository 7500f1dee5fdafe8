"""Whatever ends a command, it says one line and has an exit status."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from sparsefw.errors import InputError
from sparsefw.launch import launch

LONG = "x" * 5000


@pytest.fixture
def command(monkeypatch, capsys):
    """Launches a function as a command; gives the exit status and the line on stderr."""

    def run(body) -> tuple[int, str]:
        monkeypatch.setitem(sys.modules, "sparsefw.commands.told", SimpleNamespace(run=body))
        status = launch("told", [])
        errors = capsys.readouterr().err
        assert errors.count("\n") == 1
        assert errors.startswith("sparsefw: ")
        return status, errors.removeprefix("sparsefw: ").removesuffix("\n")

    return run


def raising(error):
    def body(argv):
        raise error

    return body


def missing(name):
    return lambda argv: Path(name).stat()


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        (raising(InputError("a\n\x1b[2Jb")), 2, r"a\n\x1b[2Jb"),
        (raising(InputError(LONG + "; the end")), 2, "x" * 1000 + " ... " + "x" * 991 + "; the end"),
        (raising(FloatingPointError("no\nnumber")), 1, "no number"),
        (raising(torch.OutOfMemoryError("CUDA out of memory.\n  Tried")), 1, "CUDA out of memory. Tried"),
        (
            raising(torch.AcceleratorError("CUDA error: out of memory\nSearch for it")),
            1,
            "memory is full; give less (--host-memory, --gpu-memory), or fewer windows: CUDA error: out of memory "
            "Search for it",
        ),
        (raising(ImportError("no\nlib")), 1, "a library cannot be loaded, check the installation: no lib"),
        (raising(SafetensorError("a\x07")), 2, r"a\x07"),
        (raising(OSError(28, "No space left on device")), 1, "[Errno 28] No space left on device"),
        (raising(BrokenPipeError(32, "Broken pipe")), 1, "nobody reads what is printed (broken pipe)"),
        (missing("/no\u202ewhere"), 2, r"/no\u202ewhere: No such file or directory"),
        (missing(LONG), 2, "x" * 200 + "... (5000 characters): File name too long"),
        (raising(MemoryError()), 1, "the host's memory is full; give fewer or shorter windows (--nsamples, --seqlen)"),
        (
            lambda argv: torch.empty(2**48),
            1,
            "the host's memory is full; give fewer or shorter windows (--nsamples, --seqlen)",
        ),
        (raising(KeyboardInterrupt()), 130, "interrupted"),
    ],
)
def test_outcomes(command, body, status, line):
    assert command(body) == (status, line)


def test_what_comes_of_a_signal_is_an_interruption(command):
    def body(argv):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("lost") from error

    assert command(body) == (130, "interrupted")


def test_notes_follow(command):
    error = InputError("full")
    error.add_note("2 of 4\n")
    assert command(raising(error)) == (2, r"full; 2 of 4\n")


def test_what_is_unforeseen_leaves_its_traceback_in_a_file(command, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    status, line = command(raising(RuntimeError("a\nb\x1b")))
    assert status == 70
    (path,) = tmp_path.iterdir()
    told = "this is a mistake in sparsefw: please report it, with the traceback in"
    assert line == rf"unforeseen RuntimeError: a b\x1b; {told} {path}"
    content = path.read_text()
    assert content.startswith("sparsefw ")
    assert f"torch {torch.__version__}" in content
    assert "in body\n" in content
    assert all(text.isprintable() for text in content.splitlines())


def test_a_traceback_that_cannot_be_written(command, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    status, line = command(raising(KeyError("a")))
    assert status == 70
    assert line.startswith("unforeseen KeyError: 'a'; this is a mistake in sparsefw: please report it (its traceback ")


def test_a_current_folder_that_is_gone(command, tmp_path, monkeypatch):
    """Libraries abort there, so it is found out before any is imported."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    told = (2, "the current folder has been deleted; go to another one")
    assert command(lambda argv: pytest.fail("it was imported")) == told


def test_the_status_remains_where_nobody_can_be_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "sparsefw.commands.told", SimpleNamespace(run=raising(InputError("bad"))))
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr("sys.stderr", full)
        assert launch("told", []) == 2
        monkeypatch.undo()
        # What is still in the buffer has to go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


HELP = """
import sys
from sparsefw.launch import launch

try:
    launch(sys.argv[1], ["--help"])
except SystemExit as end:
    assert end.code == 0
assert "sparsefw.model" not in sys.modules
"""


@pytest.mark.parametrize("command", ["run", "verify", "evaluate"])
def test_help_does_not_wait_for_the_models_code(command):
    subprocess.run([sys.executable, "-c", HELP, command], check=True, stdout=subprocess.DEVNULL)


def launched(body: str, **options) -> subprocess.CompletedProcess:
    """A process that launches a command, and is asked what became of it; its end shows what Python would add."""
    code = (
        "import os, signal, sys; from types import SimpleNamespace; from sparsefw.launch import launch; "
        f"sys.modules['sparsefw.commands.told'] = SimpleNamespace(run=lambda argv: {body}); status = launch('told'); "
        "signal.raise_signal(signal.SIGINT) if status == 3 else sys.exit(status)"
    )
    # Set where output is watched, it would hide what is still in a buffer.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = {"stderr": subprocess.PIPE, "env": environment} | options
    return subprocess.run([sys.executable, "-c", code], text=True, check=False, **options)


@pytest.mark.parametrize(
    ("output", "line"),
    [("/dev/full", "[Errno 28] No space left on device"), (None, "nobody reads what is printed (broken pipe)")],
)
def test_output_that_cannot_be_written(output, line):
    if output:
        stdout = os.open(output, os.O_WRONLY)
    else:
        reads, stdout = os.pipe()
        os.close(reads)
    done = launched("print('much')", stdout=stdout)
    os.close(stdout)
    assert (done.returncode, done.stderr) == (1, f"sparsefw: {line}\n")


def test_no_file_takes_the_place_of_a_closed_stream():
    def close():
        os.close(1)
        os.close(2)

    devices = "{os.fstat(n).st_rdev for n in (1, 2)} == {os.stat(os.devnull).st_rdev}"
    body = f"print('a', file=sys.stderr) or print('b') or (5 if {devices} else 1)"
    assert launched(body, preexec_fn=close).returncode == 5


def test_no_traceback_between_the_command_and_the_end_of_python():
    def heed():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    done = launched("3", preexec_fn=heed)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_characters_that_the_terminal_does_not_have():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = launched("print('\\xe4\\u65e5') or 0", stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xe4\\u65e5\n", "")


def test_an_interrupted_command_does_not_wait_for_its_threads():
    wait = "__import__('threading').Thread(target=__import__('time').sleep, args=(60,)).start()"
    done = launched(f"{wait} or signal.raise_signal(signal.SIGTERM)", timeout=30)
    assert (done.returncode, done.stderr) == (130, "sparsefw: interrupted\n")
