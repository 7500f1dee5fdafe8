"""The reference text of the quality study: `python bench/quality/texts.py DIR` writes its two parts there.

The text is CPython's language reference, which every CPython carries in `pydoc_data.topics`, so that anybody can make
it without a network. A topic goes to the calibration or to the test part by a hash of its name. Topics repeat each
other ('compound' holds all of 'try'), so a paragraph is left out if it shares a run of words with an earlier one. The
test part is made first: no run of words of it is in the calibration part.
"""

import argparse
import hashlib
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Paragraphs have text in common if they share so many words in a row, as in the study of tasks.
RUN = 13

# One topic in this many is in the test part.
TEST_SHARE = 3

# Names of the files, by which the results tell texts apart.
CALIBRATION, TEST = "reference_calibration.txt", "reference_test.txt"


@dataclass(frozen=True)
class Reference:
    """The reference text on disk.

    Attributes:
        calibration, test: the files of the two parts.
        python: version of the Python that carries the text; other versions have other words in it.
    """

    calibration: Path
    test: Path
    python: str

    def header(self) -> dict:
        """The text as the results describe it: its Python version, and the hash of each part."""
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (self.calibration, self.test)}
        return {"python": self.python} | hashes


def write_reference(folder: Path) -> Reference:
    """Write both parts of the running Python's reference.

    Raises:
        SystemExit: this Python carries no reference.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise SystemExit("the reference text is pydoc_data.topics, which this Python lacks") from error
    folder.mkdir(parents=True, exist_ok=True)
    reference = Reference(folder / CALIBRATION, folder / TEST, platform.python_version())
    for path, text in zip((reference.calibration, reference.test), split(topics), strict=True):
        # A study beside this one may be reading the file, so it is never there in part.
        partial_file = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial_file.write_text(text, encoding="utf-8")
        os.replace(partial_file, path)
    return reference


def split(topics: dict[str, str]) -> tuple[str, str]:
    """The calibration and the test part: topics in the order of their names, no run of words twice."""
    seen: set[str] = set()
    test = _new_paragraphs((topics[name] for name in sorted(topics) if is_test(name)), seen)
    calibration = _new_paragraphs((topics[name] for name in sorted(topics) if not is_test(name)), seen)
    return calibration, test


def is_test(topic: str) -> bool:
    """Whether a topic belongs to the test part. Its name alone decides, so that it does in every Python version."""
    return hashlib.sha256(topic.encode()).digest()[0] % TEST_SHARE == 0


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


def main(argv: list[str] | None = None) -> None:
    """Write the reference text and say what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="made if it is not there")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    reference = write_reference(folder)
    print(f"Language reference of Python {reference.python}")
    for path in (reference.calibration, reference.test):
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
