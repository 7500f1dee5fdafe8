"""Texts to calibrate and evaluate a model on, its tokenizer, and the windows of tokens that are cut from a text."""

from sparsefw.data.text import Text, read_text
from sparsefw.data.tokenizer import load_tokenizer
from sparsefw.data.windows import Windows, calibration_windows, evaluation_windows, windows_of

__all__ = [
    "Text",
    "Windows",
    "calibration_windows",
    "evaluation_windows",
    "load_tokenizer",
    "read_text",
    "windows_of",
]
