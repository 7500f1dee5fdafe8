"""The command, started as torchrun does on two ranks, which are forked: they need not import torch again."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import make_place
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sparsefw.driver import prune as driver
from sparsefw.ranks import joined_with
from sparsefw.report.content import read_report
from sparsefw.run import main

TORCHRUN = LaunchConfig(
    *(1, 1, 2), start_method="fork", rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="a test", max_restarts=0
)


def be_rank(folder: Path, fails: bool) -> None:
    """The process of a rank. An error of rank 1's own GPU may end it in the second block."""
    # A forked process has torchrun's handler, which raises; one that torchrun starts has none.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(folder / "stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    sys.stdout = os.fdopen(1, "w")
    torch.set_num_threads(1)
    prune_block = driver.prune_block

    def prune_or_fail(run, i, *others, **options):
        if fails and i == 1 and run.ranks.number == 1:
            raise FloatingPointError("rank 1 has had enough")
        return prune_block(run, i, *others, **options)

    driver.prune_block = prune_or_fail
    sys.argv = ["run", "--nsamples", "6", "--seqlen", "24", "--kernel", "torch", "--method", "wanda"]
    sys.argv += [f"--model={folder / 'model'}", f"--dataset={folder / 'text.txt'}", f"--output={folder / 'out'}"]
    if status := main():
        sys.exit(status)
    # A script may join the ranks again, and one of them is late.
    time.sleep(int(os.environ["RANK"]))
    with joined_with(print):
        pass


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_and_is_named(tmp_path, out, capfd):
    make_place(tmp_path, "llama", num_hidden_layers=2)
    # torchrun's report: the rank that failed first.
    with pytest.raises(ChildFailedError, match=r"(?s)Root Cause.*rank      : 1 "):
        elastic_launch(TORCHRUN, be_rank)(tmp_path, True)
    printed = capfd.readouterr().err
    assert "sparsefw: rank 1: rank 1 has had enough" in printed
    assert "the connection to another rank broke" not in printed
    assert not out.exists()
    # The same command goes on, and two ranks give one output and one log.
    elastic_launch(TORCHRUN, be_rank)(tmp_path, False)
    lines = (tmp_path / "stdout").read_text().splitlines()
    assert len([line for line in lines if line.startswith("kernel: ")]) == 1
    assert len([line for line in lines if line.startswith("checkpoint: ")]) == 1
    assert [line.split(" windows")[0] for line in lines if line.startswith("rank ")] == ["rank 0: 3", "rank 1: 3"]
    report = read_report(out / "report.json")
    assert [rank.windows for rank in report.ranks] == [3, 3]
    assert {span.lane for span in report.timeline} >= {"main", "read", "rank 1"}
