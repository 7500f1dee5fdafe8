"""The reference text of the quality study, which is evaluated beside the texts that it is given.

The text is CPython's language reference, which every CPython carries in `pydoc_data.topics`, so that anybody can make
it without a network. A topic goes to the calibration or to the test part by a hash of its name. Topics repeat each
other ('compound' holds all of 'try'), so a paragraph is left out if it shares a run of words with an earlier one. The
test part is made first: no run of words of it is in the calibration part.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

# Paragraphs have text in common if they share this many words in a row, as in the study of tasks.
RUN = 13

# One topic in this many is in the test part.
TEST_SHARE = 3

# Names of the files, by which the results tell texts apart.
CALIBRATION, TEST = "reference_calibration.txt", "reference_test.txt"


def write_reference(folder: Path) -> tuple[Path, Path]:
    """Write both parts of the running Python's reference; returns the calibration and the test file.

    Raises:
        SystemExit: this Python carries no reference.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise SystemExit("the reference text is pydoc_data.topics, which this Python lacks") from error
    paths = folder / CALIBRATION, folder / TEST
    for path, text in zip(paths, split(topics), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def split(topics: dict[str, str]) -> tuple[str, str]:
    """The calibration and the test part: topics in the order of their names, no run of words twice."""
    # The name alone decides, so that it does in every Python version.
    tested = {name for name in topics if hashlib.sha256(name.encode()).digest()[0] % TEST_SHARE == 0}
    seen: set[str] = set()
    test = _new_paragraphs((topics[name] for name in sorted(tested)), seen)
    return _new_paragraphs((topics[name] for name in sorted(topics.keys() - tested)), seen), test


def _new_paragraphs(texts: Iterable[str], seen: set[str]) -> str:
    """The paragraphs that have no run in `seen`; adds their runs to it."""
    kept = []
    for text in texts:
        for paragraph in re.split(r"\n[ \t]*\n", text.strip("\n")):
            own = runs(paragraph)
            if seen.isdisjoint(own):
                seen |= own
                kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept) + "\n"


def runs(paragraph: str) -> set[str]:
    """The runs of words of a paragraph, without case, numbers and signs; of a short one all its words."""
    words = re.findall(r"[a-z]+", paragraph.lower())
    return {" ".join(words[start : start + RUN]) for start in range(max(1, len(words) - RUN + 1))}
