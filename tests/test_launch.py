"""Whatever ends a command, it prints one line and has an exit status, and a run that was ended goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sparsefw import __version__
from sparsefw.cli import launched
from sparsefw.errors import InputError


@pytest.fixture
def command(capsys):
    """Launches a function as a command; gives the exit status and what it has printed on stderr."""

    def run(body) -> tuple[int, str]:
        with launched([]) as outcome:
            body([])
        return outcome.status, capsys.readouterr().err

    return run


def raising(error):
    def body(argv):
        raise error

    return body


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        (raising(InputError("a\n\x1b[2Jb")), 2, r"a\n\x1b[2Jb"),
        (raising(FloatingPointError("no\nnumber")), 1, "no number"),
        (raising(torch.OutOfMemoryError("CUDA out of memory.\n  Tried")), 1, "CUDA out of memory. Tried"),
        (raising(SafetensorError("a\x07")), 2, r"a\x07"),
        (raising(OSError(28, "No space left on device")), 1, "[Errno 28] No space left on device"),
        (lambda argv: Path("/no\u202ewhere").stat(), 2, r"/no\u202ewhere: No such file or directory"),
        (lambda argv: torch.empty(2**48), 1, "the host's memory is full; "),
        (raising(KeyboardInterrupt()), 130, "interrupted"),
    ],
)
def test_each_end_has_a_status_and_one_line(command, body, status, line):
    ended, printed = command(body)
    assert ended == status
    assert printed.startswith(f"sparsefw: {line}")
    assert printed.count("\n") == 1


def test_a_mistake_is_a_traceback(command):
    status, printed = command(raising(RuntimeError("a\nb")))
    assert status == 70
    assert printed.startswith("Traceback")
    assert "in body\n" in printed


# plan offers the cards that it knows, for which it takes torch.
HELPED = ("run", "verify", "evaluate", "recover", "pack", "unpack")
HELP = f"""
import runpy
import sys
from contextlib import suppress
from sparsefw.cli import main

for command in {HELPED}:
    sys.argv = ["sparsefw", command, "--help"]
    with suppress(SystemExit):
        main()
for flag in ("--help", "--version"):
    sys.argv = ["sparsefw", flag]
    assert main() == 0
assert "torch" not in sys.modules
sys.argv = ["sparsefw", "prune"]
with suppress(SystemExit):
    # As `python -m sparsefw prune`, which is no command.
    runpy.run_module("sparsefw", run_name="__main__")
    raise AssertionError
assert main() == 2
"""


def test_help_does_not_wait_for_torch():
    done = subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True, text=True)
    assert all(f"usage: python -m sparsefw.{command} " in done.stdout for command in HELPED)
    assert "\n  unpack    make a packed output dense again\n" in done.stdout
    assert done.stdout.endswith(f"sparsefw {__version__}\n")
    assert "prune: no such command" in done.stderr


@pytest.mark.parametrize(
    ("output", "line"), [("/dev/full", "sparsefw: [Errno 28] No space left on device\n"), (None, "")]
)
def test_output_that_cannot_be_written(output, line):
    """A full disk, and a reader such as `head`, which has ended."""
    reads, stdout = os.pipe()
    os.close(reads)
    if output:
        os.dup2(os.open(output, os.O_WRONLY), stdout)
    code = "from sparsefw.cli import launched\nwith launched(None):\n    print('much')"
    done = subprocess.run([sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    os.close(stdout)
    assert (done.returncode, done.stderr) == (1, line)


def test_the_gpu_is_hidden_unless_it_is_asked_for(pytestconfig):
    """The tests of runs compare bits with a CPU's, and fork."""
    assert pytestconfig.getoption("gpu") or os.environ["CUDA_VISIBLE_DEVICES"] == ""
