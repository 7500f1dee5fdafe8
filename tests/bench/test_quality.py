"""The quality study: its tables are those of the documents, and its texts share nothing."""

import re
from pathlib import Path
from pydoc_data.topics import topics

import quality
import quality_tables
import texts

REPO = Path(quality.__file__).resolve().parents[2]


def test_documents_have_the_committed_numbers():
    pages = "".join((REPO / page).read_text().replace("**", "") for page in ("README.md", "docs/results.md"))
    printed = quality_tables.tables(quality.load(quality.RESULTS))
    rows = [line for line in printed.splitlines() if re.search(r"\| .*\d\.\d", line)]
    assert len(rows) > 50
    # A page may leave out what has no number.
    assert [row for row in rows if row not in pages] == []


def test_the_parts_of_the_reference_share_no_run_of_words():
    calibration, test = texts.split(topics)
    assert texts.runs(calibration).isdisjoint(texts.runs(test))
    # 64 windows of 512 tokens to calibrate on, 20 to test on, a token of at most 4 characters.
    assert len(calibration) > 64 * 512 * 4
    assert len(test) > 20 * 512 * 4
