"""A checkpoint's tokenizer, used without code from the checkpoint. Its errors become one line.

transformers sees the tokenizer's files in a folder of links, where no entry of theirs leads to anything else.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from sparsefw.checkpoint import tokenizer_trust, trust
from sparsefw.checkpoint.copied import TEMPLATES
from sparsefw.checkpoint.source import TOKENIZER_CONFIG, companions, read_json
from sparsefw.data.apart import Child, Limits
from sparsefw.errors import InputError, first_line, naming, shown
from sparsefw.process import NO_LIMIT, own_peak

# Files whose entries reach the tokenizer's class by their names.
NAMED_ENTRIES = (TOKENIZER_CONFIG, "special_tokens_map.json")

# Far more than any real tokenizer takes: 20 s for a file of 40 MB, 50 bytes for each of its bytes. A slow one takes
# 50,000 characters a second, and 2 KB for each of their tokens.
SECONDS_TO_LOAD, BYTES_TO_LOAD, BYTES_A_BYTE = 120, 4 * 2**30, 64
SECONDS_TO_TOKENIZE, CHARS_A_SECOND, BYTES_A_CHAR = 60, 5000, 4096
# Bytes of the tokens of a character, as JSON: those of ten tokens. Beside them, a few characters may have any number.
ANSWER_A_CHAR, ANSWER = 64, 2**20
# Tokens are kept in 4 bytes each.
LARGEST_TOKEN = 2**31 - 1
# Bytes of memory that a tokenizer may always take, so that a limit that is too low is refused by the needs of the run.
ALWAYS_TAKEN = 2**29


class TokenizerProcess:
    """A tokenizer in a process of its own, which is ended if it takes too much memory or time.

    Attributes:
        name_or_path: folder of its files.
    """

    def __init__(self, folder: Path, room: int | None = None, add_bos_token: bool | None = None) -> None:
        """Load the tokenizer of a checkpoint that `checkpoint.inspect` has looked at.

        Args:
            folder: the checkpoint's folder.
            room: bytes of memory that the process may take; None: any number.
            add_bos_token: whether it puts a start token before a text; None: as its files say.

        Raises:
            InputError: there is no tokenizer, its files are damaged or lead elsewhere, or it takes too much.
        """
        self.name_or_path = str(folder)
        size = sum(path.stat().st_size for path in companions(folder))
        self._room = NO_LIMIT if room is None else max(room, ALWAYS_TAKEN)
        self._limits = self._within_room(SECONDS_TO_LOAD, BYTES_TO_LOAD + BYTES_A_BYTE * size)
        with _links(folder) as links, _errors_in_one_line(f"{folder}: no tokenizer could be loaded", links):
            self._child = Child(lambda: _answering(links, folder, add_bos_token), self._limits)

    def tokens(self, texts: list[str], special: bool = False) -> list[list[int]]:
        """The tokens of each text; `special`: with those that the tokenizer itself puts around it.

        Raises:
            ChildError: the tokenizer fails, or takes too much.
        """
        chars = sum(map(len, texts))
        seconds, nbytes = SECONDS_TO_TOKENIZE + chars // CHARS_A_SECOND, self._limits.nbytes + BYTES_A_CHAR * chars
        limits = self._within_room(seconds, nbytes, ANSWER + ANSWER_A_CHAR * (chars + len(texts)))
        return self._child.ask(["tokens", texts, special], limits)

    def start(self) -> list[int]:
        """The start tokens.

        Raises:
            ChildError: the tokenizer fails, or takes too much.
        """
        return self._child.ask(["start"], self._within_room(SECONDS_TO_TOKENIZE, self._limits.nbytes))

    def traits(self, prefix: int | None) -> "TokenizerTraits":
        """As the function `traits`.

        Raises:
            ChildError: the tokenizer fails, or takes too much.
        """
        limits = self._within_room(SECONDS_TO_TOKENIZE, self._limits.nbytes)
        return TokenizerTraits(*self._child.ask(["traits", prefix], limits))

    def nbytes(self) -> int:
        """The most memory that the process has had until now, beside what it shares with this one."""
        return self._child.ask(["nbytes"], self._limits)

    def _within_room(self, seconds: float, nbytes: int, answer: int = ANSWER) -> Limits:
        remedy = "; give more (--host-memory)" if nbytes > self._room else ""
        return Limits(seconds, min(nbytes, self._room), answer, remedy)

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def __enter__(self) -> "TokenizerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# A tokenizer in a process of its own, or in this one.
Tokenizer = PreTrainedTokenizerBase | TokenizerProcess


class TokenizerTraits(NamedTuple):
    """What a tokenizer says of itself.

    Attributes:
        prefix: token for the beginning of a text: the start token, or else the end token; None if it has neither.
        prefix_text: text of this token; empty if there is none.
        max_length: most tokens of a text, 10^30 where there is no limit.
    """

    prefix: int | None
    prefix_text: str
    max_length: int | None


def load_tokenizer(folder: Path, add_bos_token: bool | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint that `checkpoint.inspect` has looked at, in this process and without limits.

    Args:
        folder: the checkpoint's folder.
        add_bos_token: whether it puts a start token before a text; None: as its files say.

    Raises:
        InputError: there is no tokenizer, or its files are damaged or lead elsewhere.
    """
    with _links(folder) as links, _errors_in_one_line(f"{folder}: no tokenizer could be loaded", links):
        return _load(links, folder, add_bos_token)


def tokenize(tokenizer: Tokenizer, texts: list[str], special: bool = False) -> list[list[int]]:
    """The tokens of each text; `special`: with those that the tokenizer itself puts around it.

    Raises:
        InputError: the tokenizer fails, takes too much, or gives a token that is out of its range.
    """
    with _errors_in_one_line(f"{tokenizer.name_or_path}: the tokenizer cannot take this text"):
        if isinstance(tokenizer, TokenizerProcess):
            found = tokenizer.tokens(texts, special)
        else:
            found = _tokens(tokenizer, texts, special)
        return [_checked(tokenizer, tokens) for tokens in found]


def traits(tokenizer: Tokenizer, prefix: int | None = None) -> TokenizerTraits:
    """What a tokenizer says of itself; `prefix` takes the place of its own.

    Raises:
        InputError: the tokenizer fails, or takes too much.
    """
    with _errors_in_one_line(f"{tokenizer.name_or_path}: the tokenizer has no token {prefix}"):
        if isinstance(tokenizer, TokenizerProcess):
            return tokenizer.traits(prefix)
        return _traits(tokenizer, prefix)


def start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The token that the tokenizer itself puts before a text, as a list; empty if it puts none.

    Raises:
        InputError: the tokenizer fails, takes too much, or gives a token that is out of its range.
    """
    with _errors_in_one_line(f"{tokenizer.name_or_path}: the tokenizer cannot take a text"):
        return _checked(tokenizer, tokenizer.start() if isinstance(tokenizer, TokenizerProcess) else _start(tokenizer))


def _checked(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The tokens, if all of them are in the range."""
    if tokens and not 0 <= min(tokens) <= max(tokens) <= LARGEST_TOKEN:
        wrong = next(token for token in tokens if not 0 <= token <= LARGEST_TOKEN)
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer gives a text the token {wrong}; tokens are numbers from 0 to "
            f"{LARGEST_TOKEN}, correct its vocabulary"
        )
    return tokens


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = False) -> list[list[int]]:
    # Not verbose: a text longer than the model's maximum is no mistake here.
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]


def _traits(tokenizer: PreTrainedTokenizerBase, prefix: int | None) -> TokenizerTraits:
    for own in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        prefix = own if prefix is None else prefix
    if prefix is not None and not 0 <= prefix < len(tokenizer):
        raise ValueError(f"there are {len(tokenizer)}")
    limit = getattr(tokenizer, "model_max_length", None)
    return TokenizerTraits(prefix, "" if prefix is None else str(tokenizer.decode(prefix)), limit and int(limit))


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = tokenizer("a")["input_ids"]
    return ids[:1] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else []


def _answering(links: Path, folder: Path, add_bos_token: bool | None) -> Callable[[list[Any]], Any]:
    """Load the tokenizer in the child; returns what answers there: requests are a name, and what it is of."""
    if "TOKENIZERS_PARALLELISM" in os.environ:
        # Threads would wait for those of the parent, which a fork does not copy. Unset, the library sees to it.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = _load(links, folder, add_bos_token)
    answers: dict[str, Callable[..., Any]] = {
        "tokens": partial(_tokens, tokenizer),
        "start": partial(_start, tokenizer),
        "traits": partial(_traits, tokenizer),
        "nbytes": own_peak,
    }
    return lambda request: answers[request[0]](*request[1:])


def _load(links: Path, folder: Path, add_bos_token: bool | None) -> PreTrainedTokenizerBase:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # fast_tokenizer_files may name several for different versions.
    for path in sorted(links.glob("*tokenizer*.json")):
        if path.name not in NAMED_ENTRIES:
            # The library reads it itself, and says what is wrong.
            content = json.loads(path.read_bytes())
            tokenizer_trust.check_pipeline(content, folder / path.name)
    # An option that is None would count as given.
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    with _without_copies():
        tokenizer = AutoTokenizer.from_pretrained(links, local_files_only=True, trust_remote_code=False, **options)
    # The links are gone when it is saved.
    for values in (vars(tokenizer), tokenizer.init_kwargs):
        for name, value in values.items():
            if isinstance(value, str) and Path(value).is_relative_to(links):
                values[name] = str(folder / Path(value).relative_to(links))
    return tokenizer


@contextmanager
def _without_copies() -> Iterator[None]:
    """Have tiktoken keep no copy of a file that it reads: under the path of a link, it would be a new one each time."""
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = ""
    try:
        yield
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        os.environ |= {} if before is None else {"TIKTOKEN_CACHE_DIR": before}


@contextmanager
def _links(folder: Path) -> Iterator[Path]:
    """A folder of links to the small files of a checkpoint, without the entries that must not be followed."""
    with tempfile.TemporaryDirectory(prefix="sparsefw-") as scratch:
        links = Path(scratch)
        (links / TEMPLATES).mkdir()
        for path in companions(folder):
            if path.name in NAMED_ENTRIES:
                content = read_json(path, trust.MAX_TOKENIZER_CONFIG_BYTES)
                tokenizer_trust.check_followed(content, path)
                with naming(links / path.name):
                    (links / path.name).write_text(json.dumps(tokenizer_trust.handed_on(content)), encoding="utf-8")
            else:
                (links / path.relative_to(folder)).symlink_to(path.resolve())
        yield links


@contextmanager
def _errors_in_one_line(what: str, links: Path | None = None) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # The library raises plain Exception for most mistakes. Its panics are not of class Exception, and their class
        # cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = first_line(error)
        # The user knows the files by their names.
        why = why.replace(f"{links}/", "") if links else why
        raise InputError(f"{what}: {shown(why)}") from error
