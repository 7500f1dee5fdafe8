"""Several ranks in a test: processes that are forked, and joined by gloo."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsefw.driver.job import Job
from sparsefw.driver.run import run_job
from sparsefw.inputs import Inputs, Output
from sparsefw.ranks import Ranks
from sparsefw.report.content import Report
from sparsefw.solver.config import PruneConfig

# Tokens of a window of `prune`.
SEQLEN = 24


def on_ranks(count: int, do: Callable[..., Any], *args: Any) -> list[Any]:
    """Call do(ranks, *args) on `count` ranks; returns the result of each rank.

    Raises:
        AssertionError: it has failed on a rank; the message is the traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_be, args=(Path(folder), number, count, do, args)) for number in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()
        results = [pickle.loads(Path(folder, f"result {n}").read_bytes()) for n in range(count)]
    failures = [f"rank {n}: {result}" for n, (failed, result) in enumerate(results) if failed]
    # The rank that was first, not those that have lost it.
    failures.sort(key=lambda failure: "LostRankError" in failure)
    assert not failures, failures[0]
    return [result for _, result in results]


def prune(
    ranks: Ranks,
    source: Path,
    output: Path,
    text: Path,
    config: dict[str, Any],
    windows: int = 10,
    eval_windows: int = 7,
) -> tuple[Report, list[str]]:
    """Prune a checkpoint; returns the report, and the lines of the log."""
    inputs = Inputs(
        model=str(source),
        dataset=str(text),
        nsamples=windows,
        seqlen=SEQLEN,
        evaluate=(str(text),),
        eval_windows=eval_windows,
    )
    config = PruneConfig(**dict(kernel="torch", precision="ieee") | config)
    lines: list[str] = []
    job = Job(inputs, config, Output(output), None, None, source, lines.append, False, ranks)
    return run_job(job), lines


def _be(folder: Path, number: int, count: int, do: Callable[..., Any], args: tuple[Any, ...]) -> None:
    # A pool of threads does not survive the fork.
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=timedelta(seconds=50))
        result = False, do(Ranks(number, count, count, number), *args)
        if dist.is_initialized():
            # A process that ends closes its connections.
            dist.barrier()
    except BaseException:
        result = True, traceback.format_exc()
    Path(folder, f"result {number}").write_bytes(pickle.dumps(result))
