"""Texts to calibrate and evaluate a model on, its tokenizer, and the windows of tokens that are cut from a text."""

from sparsefw.data.batches import BATCHES, Batch, Batches, batches_of, token_batch
from sparsefw.data.memory import reading_bytes, window_bytes
from sparsefw.data.mixture import mixed_windows
from sparsefw.data.text import Text, read_text
from sparsefw.data.tokenizer import Tokenizer, TokenizerProcess, TokenizerTraits, load_tokenizer, tokenize, traits
from sparsefw.data.windows import Windows, calibration_windows, evaluation_windows, window_length, windows_of

__all__ = [
    "BATCHES",
    "Batch",
    "Batches",
    "Text",
    "Tokenizer",
    "TokenizerProcess",
    "TokenizerTraits",
    "Windows",
    "batches_of",
    "calibration_windows",
    "evaluation_windows",
    "load_tokenizer",
    "mixed_windows",
    "read_text",
    "reading_bytes",
    "token_batch",
    "tokenize",
    "traits",
    "window_bytes",
    "window_length",
    "windows_of",
]
