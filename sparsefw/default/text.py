"""Training and evaluation text out of `pydoc_data.topics`, the language reference that every CPython carries.

The text is split by names of topics, so that the split is the same in every Python version; the text itself differs a
little between versions. Topics repeat each other ('compound' holds all of 'try', 'execmodel' most of 'naming').
Therefore repeated paragraphs are left out, and no paragraph of the evaluation text is in the training text.
"""

import re

from sparsefw.errors import InputError

# About a tenth of the text in CPython 3.11 to 3.14, and of every kind: grammar, prose, lists and examples.
EVALUATION_TOPICS = ("calls", "import", "naming", "numeric-types", "raise", "with")

MIN_TRAINING_CHARS = 200_000
MIN_EVALUATION_CHARS = 20_000


def training_text() -> str:
    """The text to train and to calibrate on: every topic but those of the evaluation text, in order of name.

    Raises:
        InputError: this Python's `pydoc_data.topics` is missing or holds too little.
    """
    topics = _topics()
    seen = {paragraph_key(paragraph) for paragraph in split_paragraphs(evaluation_text())}
    names = [name for name in sorted(topics) if name not in EVALUATION_TOPICS]
    return _join("training", _new_paragraphs(topics, names, seen), MIN_TRAINING_CHARS)


def evaluation_text() -> str:
    """The text to evaluate on, which shares no paragraph with `training_text`.

    Raises:
        InputError: this Python's `pydoc_data.topics` is missing or holds too little.
    """
    topics = _topics()
    names = [name for name in EVALUATION_TOPICS if name in topics]
    return _join("held-out", _new_paragraphs(topics, names, set()), MIN_EVALUATION_CHARS)


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, which blank lines separate, with their indentation."""
    return [paragraph for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]


def paragraph_key(paragraph: str) -> str:
    """What two copies of a paragraph have in common: all but white space and the numbers of footnotes."""
    return re.sub(r"\[\d+\]", "[]", " ".join(paragraph.split()))


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise InputError("default: the text is pydoc_data.topics, which this Python lacks; give a file") from error
    return topics


def _new_paragraphs(topics: dict[str, str], names: list[str], seen: set[str]) -> list[str]:
    """The paragraphs of the topics `names` whose keys are not in `seen`; adds their keys to it."""
    paragraphs = []
    for name in names:
        for paragraph in split_paragraphs(topics[name]):
            key = paragraph_key(paragraph)
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
    return paragraphs


def _join(what: str, paragraphs: list[str], min_chars: int) -> str:
    text = "\n\n".join(paragraphs) + "\n"
    if len(text) < min_chars:
        raise InputError(
            f"default: pydoc_data.topics of this Python has {len(text)} characters of {what} text, expected at least "
            f"{min_chars}; give a file"
        )
    return text
