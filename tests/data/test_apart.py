"""Work in a child process: answered, or ended at its limits."""

import os
import select
import signal
import time

import pytest

from sparsefw.data.apart import Child, ChildError, Limits

LIMITS = Limits(60, 2**30)


@pytest.fixture
def child():
    started = Child(lambda: eval, LIMITS)
    yield started
    started.close()


def failed(match):
    return pytest.raises(ChildError, match=match)


def test_answers(child):
    assert child.ask("[1 + 1, 'a']", LIMITS) == [2, "a"]
    with failed("^division by zero$"):
        child.ask("1 / 0", LIMITS)
    with failed("^Object of type bytes is not JSON serializable$"):
        child.ask("b'a'", LIMITS)
    # A failure does not end it.
    assert child.ask("'\\ud800'", LIMITS) == "\ud800"


def test_time_is_limited_where_no_signal_is_handled(child):
    started = time.monotonic()
    with failed("^it takes more than 0.2 s$"):
        child.ask("sum(iter(int, 1))", Limits(0.2, 2**30))
    assert time.monotonic() - started < 10
    with failed("^it takes more than"):
        child.ask("1", LIMITS)


def test_memory_is_limited(child):
    with failed("^it needs more than 1.0 GiB of memory$"):
        child.ask("len(bytearray(2**31))", LIMITS)
    assert child.ask("len(bytearray(2**28))", LIMITS) == 2**28


def test_an_answer_is_limited(child):
    """The parent has to hold it, too."""
    with failed("^it makes more than 0.0 MiB of it$"):
        child.ask("[0] * 1000", Limits(60, 2**30, answer=1000))
    assert child.ask("[0] * 300", Limits(60, 2**30, answer=1000)) == [0] * 300


def test_what_to_do_is_said_where_memory_is_too_little(child):
    with failed("^it needs more than 0.0 GiB of memory; give more$"):
        child.ask("len(bytearray(2**31))", Limits(60, 0, remedy="; give more"))


def test_a_crash_is_an_error(child):
    with failed("^it needs more than 1.0 GiB of memory, or crashes$"):
        child.ask("__import__('os').abort()", LIMITS)


def test_what_cannot_be_prepared():
    def fails():
        raise BaseException("a panic\nof many lines")

    with failed("^a panic$"):
        Child(fails, LIMITS)
    with failed("^it takes more than 0.2 s$"):
        Child(lambda: sum(iter(int, 1)), Limits(0.2, 2**30))


def test_nothing_is_left_behind():
    child = Child(lambda: eval, LIMITS)
    process = child.ask("__import__('os').getpid()", LIMITS)
    child.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_the_parent_is_stopped_while_it_waits(child):
    """The child ignores what stops the parent, and is ended by it."""

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            child.ask("sum(iter(int, 1))", LIMITS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert child.ended


def test_it_ends_with_its_parent():
    """Also where the parent is killed while a library is busy."""
    reads, writes = os.pipe()
    parent = os.fork()
    if not parent:
        try:
            Child(lambda: eval, LIMITS).ask(f"__import__('os').write({writes}, b'a') and sum(iter(int, 1))", LIMITS)
        finally:
            os._exit(1)
    os.close(writes)
    assert os.read(reads, 1) == b"a"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    # Nobody holds the other end any more.
    assert select.select([reads], [], [], 10)[0] == [reads]
    assert os.read(reads, 1) == b""
    os.close(reads)


def test_it_does_not_heed_the_terminal():
    """Its parent may have been told to go on without one."""
    child = Child(lambda: eval, LIMITS)
    os.kill(child.ask("__import__('os').getpid()", LIMITS), signal.SIGHUP)
    assert child.ask("1", LIMITS) == 1
    child.close()
