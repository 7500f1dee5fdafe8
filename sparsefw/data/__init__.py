"""Text, the tokenizer of a checkpoint, and the windows of tokens that are cut from a text with it."""

from sparsefw.data.text import calibration_windows, evaluation_windows, read_text
from sparsefw.data.tokenizer import load_tokenizer
from sparsefw.data.windows import Windows

__all__ = [
    "Windows",
    "calibration_windows",
    "evaluation_windows",
    "load_tokenizer",
    "read_text",
]
