"""Make the training and evaluation text from `pydoc_data.topics`, the language reference in every CPython.

The names of the topics split the text, so the split is the same in every Python version. The text itself differs a
little between versions. Topics repeat each other: 'compound' contains all of 'try', 'execmodel' most of 'naming'. So
repeated paragraphs are dropped, and no paragraph of the evaluation text is in the training text.
"""

import re
from collections.abc import Iterable
from pydoc_data import topics

# These topics are about a tenth of the text in CPython 3.11 to 3.14, with grammar, prose, lists and examples.
EVALUATION_TOPICS = ("calls", "import", "naming", "numeric-types", "raise", "with")


def training_text() -> str:
    """Return the text for training and calibration: all topics but those of the evaluation text, by name."""
    seen = {paragraph_key(paragraph) for paragraph in split_paragraphs(evaluation_text())}
    return _new_paragraphs((name for name in sorted(topics.topics) if name not in EVALUATION_TOPICS), seen)


def evaluation_text() -> str:
    """Return the text for evaluation, which shares no paragraph with `training_text`."""
    return _new_paragraphs(EVALUATION_TOPICS, set())


def split_paragraphs(text: str) -> list[str]:
    """Split a text at blank lines into paragraphs, which keep their indentation."""
    return [paragraph for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]


def paragraph_key(paragraph: str) -> str:
    """Return a paragraph without its white space and footnote numbers, in which copies may differ."""
    return re.sub(r"\[\d+\]", "[]", " ".join(paragraph.split()))


def _new_paragraphs(names: Iterable[str], seen: set[str]) -> str:
    """Join the paragraphs of topics whose keys are not in `seen`, and add the keys to `seen`."""
    paragraphs = []
    for name in names:
        for paragraph in split_paragraphs(topics.topics.get(name, "")):
            key = paragraph_key(paragraph)
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
    return "\n\n".join(paragraphs) + "\n"
