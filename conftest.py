"""Without a GPU the Triton kernels of every test run in the interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # Before anything imports triton (the models of transformers do): its own library is decorated at import.
    os.environ.setdefault("TRITON_INTERPRET", "1")
