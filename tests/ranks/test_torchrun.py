"""The command, started by torchrun on two ranks."""

import os
import subprocess
import sys

from helpers.families import save_model

from sparsefw.report import read_report

TEXT = "".join(f"{n}: a rose is a rose is a rose, {n % 7} times.\n" for n in range(200))


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sparsefw.run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_two_ranks_give_one_output_and_one_log(tmp_path):
    source = save_model(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ["--nsamples", 6, "--seqlen", 24, "--kernel", "torch", "--steps", 3, "--rounds", 0, "--reconstruct", 0]
    places = ["--model", source, "--dataset", tmp_path / "text.txt", "--output", tmp_path / "out"]
    ended = torchrun(*places, *flags)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert len([line for line in lines if line.startswith("kernel: ")]) == 1
    assert len([line for line in lines if line.startswith("checkpoint: ")]) == 1
    assert [line.split(" windows")[0] for line in lines if line.startswith("rank ")] == ["rank 0: 3", "rank 1: 3"]
    report = read_report(tmp_path / "out" / "report.json")
    assert [rank.windows for rank in report.ranks] == [3, 3]
    assert {span.lane for span in report.timeline} == {"main", "read", "write", "rank 1"}
    refused = torchrun(*places, *flags, "--sparsity", 2)
    assert refused.returncode == 1
    told = [line for line in refused.stderr.splitlines() if line.startswith("sparsefw: ")]
    assert len(told) == 1
    assert "--sparsity 2: the fraction removed lies between 0 and 1" in told[0]
