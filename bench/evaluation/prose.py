"""English prose in texts of any kind: their whole sentences, without names of code, numbers and formulas."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# A word may have a hyphen or an apostrophe; capitals within a word, digits and underscores are names of code.
_WORD = r"[A-Za-z][a-z]*(?:['-][A-Za-z]?[a-z]+)*"
_SENTENCE = re.compile(rf"[A-Z][a-z'-]*(?:[,;:]? \(?{_WORD}\)?)+[.?!]")

# Words that are in most English sentences, and seldom in lists of names.
FUNCTION_WORDS = frozenset(
    """
    the a an of to and in is are that it for be as with this by on or not from if which can will at has have was were
    but when one all may its you do they there so than only any other into using such then no each these those must
    should would also been does how what where while both more most some between after before because
    """.split()  # noqa: SIM905
)
LEAST_FUNCTION_WORDS = 0.25
LEAST_WORDS = 5


@dataclass(frozen=True)
class Passage:
    """Sentences that follow each other.

    Attributes:
        text: name of the text that they are from.
        sentences: the sentences, at least one.
    """

    text: str
    sentences: tuple[str, ...]


def runs_of_sentences(text: str, seen: set[str]) -> Iterator[tuple[str, ...]]:
    """Sentences of a text that follow each other; what is no prose, or in `seen`, ends a run. Adds them to `seen`."""
    run: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        # A letter with a full stop may be the initial of a name.
        for sentence in re.split(r"(?<=[a-z)][.?!]) (?=[A-Z])", " ".join(paragraph.split())):
            if is_prose(sentence) and sentence not in seen:
                seen.add(sentence)
                run.append(sentence)
            elif run:
                yield tuple(run)
                run = []
    if run:
        yield tuple(run)


def is_prose(sentence: str) -> bool:
    """Whether a text is one whole English sentence, without names of code, numbers and formulas."""
    words = words_of(sentence)
    common = sum(word.lower() in FUNCTION_WORDS for word in words)
    enough = len(words) >= LEAST_WORDS and common >= LEAST_FUNCTION_WORDS * len(words)
    return enough and sentence.count("(") == sentence.count(")") and _SENTENCE.fullmatch(sentence) is not None


def words_of(sentence: str) -> list[str]:
    """The words of a sentence, without punctuation."""
    return [word.strip(".,;:?!()") for word in sentence.split()]
