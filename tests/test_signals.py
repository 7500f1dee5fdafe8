"""SIGINT, SIGTERM and SIGHUP end a process wherever it is, in one line. Each case is a process that imports little."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsefw.signals import OBEYED, obeyed

EACH = pytest.mark.parametrize("number", OBEYED)

# A process that obeys signals. Native code is a call of the C library, and waits for a signal in another thread: in the
# main thread, a signal would end the call.
PROCESS = """
import ctypes, os, signal, sys, time
from sparsefw import signals
signals.RETURN, signals.END = 0.2, 0.6

def ready():
    print("ready", flush=True)

def native(library):
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.OBEYED)
    ready()
    library.sleep(60)

def body():
    {body}

with signals.obeyed("last words") as interruption:
    try:
        body()
    except KeyboardInterrupt:
        print("sparsefw: interrupted", file=sys.stderr)
        sys.exit(130)
print("still there")
"""


# However slow the machine is, limits of time do not end the process.
PATIENT = "signals.RETURN = signals.END = 60"


def not_ignoring() -> None:
    """Take back that signals are ignored, as a shell has it for what runs in its background."""
    for number in OBEYED:
        signal.signal(number, signal.SIG_DFL)


def opened(command: list[str], **options) -> subprocess.Popen:
    """A process that does not ignore signals, unless it is asked to."""
    options = {"preexec_fn": not_ignoring, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, **options)


def start(body: str, **options) -> subprocess.Popen:
    """The process, once it has come to where it says that it is ready."""
    process = opened([sys.executable, "-c", PROCESS.format(body=body.replace("\n", "\n    "))], **options)
    assert process.stdout.readline() == "ready\n"
    # It says so just before it falls asleep.
    while Path(f"/proc/{process.pid}/task/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)
    return process


def finding(folder: Path) -> dict[str, str]:
    """The environment of a process that finds modules in a folder first."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}


def end(process: subprocess.Popen, *numbers: int) -> tuple[int, str]:
    """The exit status and the errors of a process that is sent signals."""
    for number in numbers:
        process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors


@EACH
def test_what_is_open_is_closed(number):
    closing = "try:\n    ready(); time.sleep(60)\nfinally:\n    print('closed', file=sys.stderr)"
    body = f"{PATIENT}\n{closing}"
    assert end(start(body), number) == (130, "closed\nsparsefw: interrupted\n")


@EACH
def test_native_code_that_does_not_come_back(number):
    assert end(start("native(ctypes.CDLL(None))"), number) == (130, "sparsefw: last words\n")


def test_an_end_of_which_nobody_can_be_told():
    with open("/dev/full", "w") as full:
        assert end(start("native(ctypes.CDLL(None))", stderr=full), signal.SIGHUP)[0] == 130


@EACH
def test_a_second_signal_ends_native_code_that_keeps_the_lock_of_python(number):
    process = start("native(ctypes.PyDLL(None))")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.3)
    assert end(process, number) == (-number, "")


def test_two_kinds_of_signals_are_two_signals():
    closing = "try: ready(); time.sleep(60)\nfinally: print('closing', flush=True); time.sleep(60)"
    body = f"{PATIENT}\n{closing}"
    process = start(body)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "closing\n"
    assert end(process, signal.SIGTERM) == (130, "sparsefw: last words\n")


@EACH
def test_closing_that_does_not_end(number):
    body = "try:\n    ready(); time.sleep(60)\nfinally:\n    time.sleep(60)"
    assert end(start(body), number) == (130, "sparsefw: last words\n")


def test_an_import_that_would_go_on(tmp_path):
    """Modules are imported with the exception of a signal lost, or made another one."""
    (tmp_path / "slow.py").write_text(
        "import __main__, time\ntry: __main__.ready(); time.sleep(60)\nexcept BaseException: time.sleep(60)\n"
    )
    process = start(f"{PATIENT}\nimport slow", env=finding(tmp_path))
    assert end(process, signal.SIGINT) == (130, "sparsefw: last words\n")


def test_a_finalizer_in_which_exceptions_are_lost():
    body = (
        "class Last:\n    def __del__(self):\n        ready(); time.sleep(60)\nlast = Last()\n"
        "signals.END = 60\ndel last\ntime.sleep(60)"
    )
    assert end(start(body), signal.SIGINT) == (130, "sparsefw: last words\n")


def test_signals_that_were_ignored_stay_ignored():
    body = "ready(); time.sleep(0.3); print('over', file=sys.stderr); sys.exit(3)"
    process = start(body, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert end(process, signal.SIGINT, signal.SIGINT) == (3, "over\n")


def test_handlers_are_as_before_afterwards():
    handlers = [lambda number, frame: None for _ in OBEYED]
    before = [signal.signal(number, handler) for number, handler in zip(OBEYED, handlers, strict=True)]
    hook = sys.unraisablehook
    try:
        with obeyed("last words") as interruption:
            pass
        assert [signal.getsignal(number) for number in OBEYED] == handlers
        # The system's are, too: a signal comes to Python each time.
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in zip(OBEYED, before, strict=True):
            signal.signal(number, handler)
    assert not interruption.came
    assert sys.unraisablehook is hook
    assert signal.set_wakeup_fd(-1) == -1


@EACH
def test_a_signal_to_a_fork_is_none_to_its_parent(number):
    """As a library's pool ends its workers."""
    body = f"""reads, writes = os.pipe()
child = os.fork()
if not child:
    os.write(writes, b"there")
    time.sleep(60)
os.read(reads, 5)
os.kill(child, {int(number)})
assert os.waitpid(child, 0)[1] == {int(number)}
ready()
time.sleep(2 * signals.RETURN)
sys.exit(3)"""
    assert end(start(body)) == (3, "")


@pytest.mark.parametrize("name", ["run", "plan", "verify"])
@EACH
def test_commands_obey_while_they_import_torch(name, number, tmp_path):
    """A module in place of torch takes as long as it wants."""
    (tmp_path / "torch.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)\n")
    process = opened([sys.executable, "-m", f"sparsefw.{name}"], env=finding(tmp_path))
    assert process.stdout.readline() == "ready\n"
    status, errors = end(process, number)
    assert status == 130
    assert errors.startswith("sparsefw: interrupted")
    assert errors.count("\n") == 1
