"""The tables in README.md and docs/results.md, each between `<!-- table: NAME -->` and `<!-- end -->`."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from document_tables import document_tables
from document_tasks import TASKS_RESULTS

REPO = Path(__file__).resolve().parents[2]
DOCUMENTS = (REPO / "README.md", REPO / "docs" / "results.md")

OPENED = re.compile(r"^<!-- table: .*$", re.MULTILINE)
MARKED = re.compile(r"^<!-- table: (\S+) -->\n.*?^<!-- end -->$", re.DOTALL | re.MULTILINE)


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: a table is not closed, there is none of its name, or it has no number.
    """
    names = [match[1] for match in MARKED.finditer(text)]
    if len(names) < len(OPENED.findall(text)):
        raise ValueError("a line <!-- table: NAME --> has no line <!-- end --> behind it")
    for name in names:
        if not tables.get(name):
            known = ", ".join(known for known, table in tables.items() if table)
            raise ValueError(f"<!-- table: {name} -->: there is no such table, or it has no number; there is {known}")
    return MARKED.sub(lambda match: f"<!-- table: {match[1]} -->\n\n{tables[match[1]]}\n<!-- end -->", text)


def nowhere(documents: Sequence[str], tables: Mapping[str, str]) -> list[str]:
    """The tables with numbers that stand in no document."""
    placed = {match[1] for text in documents for match in MARKED.finditer(text)}
    return [name for name, table in tables.items() if table and name not in placed]


def tables_of(results: dict) -> dict[str, str]:
    """Every table of the documents by its name: of these results and of the committed ones of the tasks."""
    return document_tables(results, json.loads(TASKS_RESULTS.read_text(encoding="utf-8")))


def write_documents(results: dict) -> list[str]:
    """Make the tables of the documents anew; returns the names of those that stand in none."""
    tables = tables_of(results)
    documents = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    for path, text in zip(DOCUMENTS, [with_tables(text, tables) for text in documents], strict=True):
        path.write_text(text, encoding="utf-8")
    return nowhere(documents, tables)
