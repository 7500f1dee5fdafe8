"""Runs that are killed give the bytes of one that is not."""

import subprocess
import sys

import kill_runs
import pytest


@pytest.mark.slow
def test_a_run_that_is_killed_once(tmp_path):
    command = [sys.executable, kill_runs.__file__, str(tmp_path / "runs"), "--kills", "1"]
    command += ["--preset", "fast", "--nsamples", "8", "--eval-windows", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 runs of" in done.stdout.splitlines()[-1]
