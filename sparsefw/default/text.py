"""Training and evaluation text out of `pydoc_data.topics`, the language reference that every CPython carries.

The text is split by names of topics, so that the split is the same in every Python version; the text itself differs a
little between versions. Topics repeat each other ('compound' holds all of 'try', 'execmodel' most of 'naming').
Therefore repeated paragraphs are left out, and no paragraph of the evaluation text is in the training text.
"""

import re
from collections.abc import Iterable
from pydoc_data import topics

# About a tenth of the text in CPython 3.11 to 3.14, and of every kind: grammar, prose, lists and examples.
EVALUATION_TOPICS = ("calls", "import", "naming", "numeric-types", "raise", "with")


def training_text() -> str:
    """The text to train and to calibrate on: every topic but those of the evaluation text, in order of name."""
    seen = {paragraph_key(paragraph) for paragraph in split_paragraphs(evaluation_text())}
    return _new_paragraphs((name for name in sorted(topics.topics) if name not in EVALUATION_TOPICS), seen)


def evaluation_text() -> str:
    """The text to evaluate on, which shares no paragraph with `training_text`."""
    return _new_paragraphs(EVALUATION_TOPICS, set())


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, which blank lines separate, with their indentation."""
    return [paragraph for paragraph in re.split(r"\n[ \t]*\n", text) if paragraph.strip()]


def paragraph_key(paragraph: str) -> str:
    """What two copies of a paragraph have in common: all but white space and the numbers of footnotes."""
    return re.sub(r"\[\d+\]", "[]", " ".join(paragraph.split()))


def _new_paragraphs(names: Iterable[str], seen: set[str]) -> str:
    """The paragraphs of topics whose keys are not in `seen`, each once, as a text."""
    paragraphs = []
    for name in names:
        for paragraph in split_paragraphs(topics.topics.get(name, "")):
            key = paragraph_key(paragraph)
            if key not in seen:
                seen.add(key)
                paragraphs.append(paragraph.strip("\n"))
    return "\n\n".join(paragraphs) + "\n"
