"""English prose that ships with CPython and Python packages: the sentences of their docstrings.

Files are parsed and never imported. What comes out depends on the versions of the packages, and on nothing else.
"""

import ast
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CPYTHON = "cpython"

# All of them come with `pip install -e '.[dev]'`.
PACKAGES = (CPYTHON, "numpy", "pandas", "matplotlib", "sympy", "networkx", "torch", "mypy", "hypothesis", "jinja2")

# Folders of code that is no part of a package's own, or not there in every installation.
PASSED_OVER = set("test tests site-packages dist-packages idlelib lib2to3 turtledemo ensurepip _vendor".split())  # noqa: SIM905

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
    """Sentences that follow each other in one docstring.

    Attributes:
        package: the package that it is from.
        module: path of the file in the package.
        sentences: the sentences, at least one.
    """

    package: str
    module: str
    sentences: tuple[str, ...]


def passages(packages: Sequence[str] = PACKAGES) -> list[Passage]:
    """The prose of these packages, in the order of the packages and of the names of their files; no sentence twice."""
    seen: set[str] = set()
    return [
        Passage(package, file.relative_to(root).as_posix(), run)
        for package in packages
        for root in (_folder(package),)
        for file in sorted(root.rglob("*.py"))
        if PASSED_OVER.isdisjoint(file.relative_to(root).parts)
        for text in docstrings(file.read_bytes())
        for run in runs_of_sentences(text, seen)
    ]


def versions() -> dict[str, str]:
    """The installed version of each package."""
    return {CPYTHON: platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES[1:]}


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of a file, outer ones first."""
    with warnings.catch_warnings():
        # Backslashes in docstrings cause warnings.
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            # Written for a later Python than this one, and imported there only.
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


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


def _folder(package: str) -> Path:
    if package == CPYTHON:
        return Path(sysconfig.get_path("stdlib"))
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise SystemExit(f"{package}: the tasks take text from this package, which is not installed")
    return Path(found.origin).parent
