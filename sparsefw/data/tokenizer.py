"""A checkpoint's tokenizer, used without code from the checkpoint. Its errors become one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from sparsefw.errors import InputError, first_line, shown


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that `checkpoint.inspect` has looked at.

    Raises:
        InputError: there is no tokenizer, or its files are damaged.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with _errors_in_one_line(f"{folder}: no tokenizer could be loaded"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokens of each text, without special ones.

    Raises:
        InputError: the tokenizer fails.
    """
    with _errors_in_one_line(f"{tokenizer.name_or_path}: the tokenizer cannot take this text"):
        # Not verbose: a text longer than the model's maximum is no mistake here.
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the tokenizer itself puts before a text, as a list; empty if it puts none.

    Raises:
        InputError: the tokenizer fails.
    """
    with _errors_in_one_line(f"{tokenizer.name_or_path}: the tokenizer cannot take a text"):
        ids = tokenizer("a")["input_ids"]
        return ids[:1] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


@contextmanager
def _errors_in_one_line(what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # The library raises plain Exception for most mistakes. Its panics are not of class Exception, and their class
        # cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {shown(first_line(error))}") from error
