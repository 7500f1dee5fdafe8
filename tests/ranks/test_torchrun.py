"""The command, started by torchrun on two ranks."""

import os
import subprocess
import sys

import pytest
from helpers.families import save_model

from sparsefw.report.content import read_report

TEXT = "".join(f"{n}: a rose is a rose is a rose, {n % 7} times.\n" for n in range(200))
# Ends rank 1 in the second block, as an error of its own GPU might.
FAILING = """
import os, sys
from sparsefw.driver import loop
from sparsefw.run import main

prune_block = loop.prune_block

def fail(run, i, *others, **options):
    if i == 1 and run.ranks.number == 1:
        raise FloatingPointError("rank 1 has had enough")
    return prune_block(run, i, *others, **options)

loop.prune_block = fail
main()
"""


@pytest.fixture
def torchrun(tmp_path):
    """Runs a module or a script on two ranks, which prune a small model into `out`."""
    source = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--nsamples", "6", "--seqlen", "24", "--kernel", "torch", "--method", "wanda"]
    flags += ["--model", source, "--dataset", tmp_path / "text.txt", "--output", tmp_path / "out"]

    def run(*command, **options):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_and_is_named(torchrun, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    ended = torchrun(tmp_path / "failing.py")
    assert ended.returncode == 1
    assert "sparsefw: rank 1: rank 1 has had enough" in ended.stderr
    # torchrun's report: the rank that failed first.
    assert "rank      : 1 " in ended.stderr.partition("Root Cause")[2]
    assert "the connection to another rank broke" not in ended.stderr
    assert not (tmp_path / "out").exists()
    # The same command goes on, and two ranks give one output and one log.
    ended = torchrun("-m", "sparsefw.run")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len([line for line in lines if line.startswith("kernel: ")]) == 1
    assert len([line for line in lines if line.startswith("checkpoint: ")]) == 1
    assert [line.split(" windows")[0] for line in lines if line.startswith("rank ")] == ["rank 0: 3", "rank 1: 3"]
    report = read_report(tmp_path / "out" / "report.json")
    assert [rank.windows for rank in report.ranks] == [3, 3]
    assert {span.lane for span in report.timeline} >= {"main", "read", "rank 1"}
