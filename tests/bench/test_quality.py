"""The quality study predicts from its cells, and prices them."""

import json
import math
import subprocess

import pytest
import quality
import tables


def test_a_line_predicts_what_more_tokens_gain():
    """Where the logarithms of ratios are a power of the tokens, it is exact."""
    cells = {f"start + {n:,} | 2:4": {"ratio": math.exp(3 / n**0.1)} for n in (10, 1000, 32768)}
    *_, row = tables.predictions({"start | 2:4": {"ratio": 9.0}, **cells}).splitlines()
    assert row.startswith("| start, 2:4 |")
    assert row.endswith(f"| {math.exp(3 / 10**0.8):.2f} |")


def test_a_price_has_the_seconds_before_a_kill(tmp_path):
    """The command waits for a second of the processor, and fails at its first run."""
    code = """
import pathlib, time
while time.process_time() < 1: pass
pathlib.Path("begun").mkdir()
"""
    command, cost = ["-c", f"import os; os.chdir({str(tmp_path)!r}){code}"], tmp_path / "cost.json"
    quality.spend(command, cost)
    with pytest.raises(subprocess.CalledProcessError):
        quality.spend(command, cost)
    (seconds,) = json.loads(cost.read_text()).values()
    assert 2 <= seconds < 4
