"""What a caller from Python has set in the process: it stays, and where it would change results it has no effect."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging

from sparsefw.autocast import without_autocast

# Settings of torch and transformers, and limits of memory, are those of the whole process.
_turn = RLock()


@contextmanager
def settings_kept() -> Iterator[None]:
    """Inside the `with` block is one thread at a time. Behind it, libraries show what they did before."""
    # Tensors that are made in inference mode do not tell when they are written to.
    with _turn, torch.inference_mode(False), without_autocast(), _exact_products(), _progress_bars_kept():
        yield


@contextmanager
def on_cpu_by_default() -> Iterator[None]:
    """Inside the `with` block, tensors are made on the CPU unless a device is named.

    This is for models that sparsefw has loaded by itself. The forward of a caller's model may need the caller's device.
    """
    # Not where it would be the same: it slows every call of torch.
    with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of fp32 are products of fp32, whatever torch has been told.

    It can be told by `torch.set_float32_matmul_precision` for all libraries, and for each of them by `fp32_precision`.
    The two must not contradict each other, or whoever asks for the former gets an error.
    """
    # The module of oneDNN is replaced by an object when it is imported, which types do not tell.
    products = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before, of_all = [of_library.fp32_precision for of_library in products], _of_all_libraries()
    try:
        if of_all:
            torch.set_float32_matmul_precision("highest")
        for of_library in products:
            of_library.fp32_precision = "ieee"
        yield
    finally:
        if of_all:
            torch.set_float32_matmul_precision(of_all)
        for of_library, precision in zip(products, before, strict=True):
            of_library.fp32_precision = precision


def _of_all_libraries() -> str | None:
    """The precision of fp32 products that torch was told for all libraries; None if others of theirs contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextmanager
def _progress_bars_kept() -> Iterator[None]:
    """Reading a model turns off those of transformers, and with them the Hub's."""
    of_transformers, of_hub = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    try:
        yield
    finally:
        if of_transformers:
            logging.enable_progress_bar()
        (enable_progress_bars if of_hub else disable_progress_bars)()
