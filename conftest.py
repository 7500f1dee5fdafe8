"""Without a GPU the Triton kernels of every test run in the interpreter."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each core has a worker, so a worker gets one thread. Set before torch reads it, and for processes that tests
    # start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Set before anything imports triton, as the models of transformers do: its own library is decorated at import.
    os.environ.setdefault("TRITON_INTERPRET", "1")
