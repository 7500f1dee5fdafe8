"""The text that small runs calibrate on."""

from pathlib import Path

import pytest
from helpers.commands import TEXT


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
