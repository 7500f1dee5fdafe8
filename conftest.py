"""Without a GPU the Triton kernels of every test run in the interpreter."""

import gc
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each core has a worker, so a worker gets one thread. Set before torch reads it, and for processes that tests
    # start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Set before anything imports triton, as the models of transformers do: its own library is decorated at import.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What the libraries have imported stays. To look through it again and again for what may go takes a seventh of the
# time.
gc.set_threshold(100_000, 50, 100)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take all that is there now out of the collections."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Let it go at the end as it would have gone, or extensions report leaks."""
    gc.unfreeze()
