"""Texts to calibrate and evaluate a model on, its tokenizer, and the windows of tokens that are cut from a text."""

from sparsefw.data.batches import BATCHES, Batch, Batches, batches_of, token_batch
from sparsefw.data.tokenizer import Tokenizer, load_tokenizer, tokenize
from sparsefw.data.windows import (
    Windows,
    calibration_windows,
    evaluation_windows,
    mixed_windows,
    reading_bytes,
    window_bytes,
    window_length,
    windows_of,
)

__all__ = [
    "BATCHES",
    "Batch",
    "Batches",
    "Tokenizer",
    "Windows",
    "batches_of",
    "calibration_windows",
    "evaluation_windows",
    "load_tokenizer",
    "mixed_windows",
    "reading_bytes",
    "token_batch",
    "tokenize",
    "window_bytes",
    "window_length",
    "windows_of",
]
