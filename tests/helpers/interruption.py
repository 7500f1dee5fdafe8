"""Ends of runs at any step of the disk."""

from sparsefw.checkpoint import files


def interrupt():
    raise KeyboardInterrupt


def interrupted_at(monkeypatch, n, end=interrupt):
    """From now on, the n-th call that makes a file durable ends the run, by default as Ctrl-C does."""
    left, sync = [n], files._sync

    def count(path):
        left[0] -= 1
        if left[0] == 0:
            end()
        sync(path)

    monkeypatch.setattr(files, "_sync", count)
