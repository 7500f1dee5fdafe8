"""The race: lm-evaluation-harness's own model against ours, `python bench/evaluation/race.py MODEL TASKS`.

MODEL is a checkpoint, such as bench/quality/checkpoint_smollm2.py makes; TASKS a folder of make_tasks.py. `--rounds`
times, in turn, each evaluation is a process of its own that goes through `lm_eval.simple_evaluate`:

- hf:N: the harness's own model on the CPU in fp32, with a batch size of N, for each of `--batch-sizes`;
- streamed: ours.

What is timed is the whole process; memory is the peak of its resident memory. All answers are compared. Nothing else
may run meanwhile: the load of the machine before each start is printed. OMP_NUM_THREADS holds for all.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import median

STREAMED = "streamed"
TAG = "prose"


def evaluate(kind: str, model: Path, tasks: Path, limit: int | None) -> dict[str, dict]:
    """The log-likelihoods of every item, and the metrics, by task."""
    import lm_eval
    import lm_eval.models.huggingface
    from lm_eval.tasks import TaskManager

    from sparsefw.evaluation import StreamedLM

    if kind == STREAMED:
        lm = StreamedLM(model)
    else:
        size = int(kind.partition(":")[2])
        lm = lm_eval.models.huggingface.HFLM(str(model), device="cpu", dtype="float32", batch_size=size)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    # Standard errors come of the samples; the harness's own take longer than the models.
    found = lm_eval.simple_evaluate(lm, tasks=[TAG], task_manager=manager, limit=limit, bootstrap_iters=0)
    return {
        task: {
            "loglikelihoods": [
                answer if isinstance(answer, float) else answer[0]
                for sample in sorted(samples, key=lambda sample: sample["doc_id"])
                for (answer,) in sample["resps"]
            ],
            "metrics": {name: found["results"][task][f"{name},none"] for name in samples[0]["metrics"]},
        }
        for task, samples in found["samples"].items()
    }


def launch(kind: str, model: Path, tasks: Path, limit: int | None) -> dict:
    """Evaluate in a process of its own; returns its seconds, its peak memory and what it answered."""
    command = [sys.executable, __file__, str(model), str(tasks), "--one", kind]
    command += ["--limit", str(limit)] if limit else []
    # All files are here: no look at the Hub is timed.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    start = time.perf_counter()
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{kind}: exit status {process.returncode}\n{process.stderr[-4000:]}")
    return {"seconds": seconds} | json.loads(process.stdout.splitlines()[-1])


def differences(one: dict[str, dict], other: dict[str, dict]) -> dict[str, dict]:
    """By task: the largest difference of a log-likelihood in nats, and both values of every metric."""
    found = {}
    for task, first in one.items():
        second = other[task]
        nats = [abs(a - b) for a, b in zip(first["loglikelihoods"], second["loglikelihoods"], strict=True)]
        metrics = {name: [value, second["metrics"][name]] for name, value in first["metrics"].items()}
        found[task] = {"nats": max(nats), "metrics": metrics}
    return found


def race(kinds: list[str], rounds: int, launch: Callable[[str], dict]) -> dict:
    """Run all kinds in turn, `rounds` times.

    Returns:
        How the answers of each two kinds differ, and our median seconds over the least of the harness's.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    answers = {}
    for kind in kinds * rounds:
        load, run = os.getloadavg()[0], launch(kind)
        answers[kind] = run["tasks"]
        seconds[kind].append(run["seconds"])
        print(f"{kind}: {run['seconds']:.1f} s, {run['peak_memory'] / 2**20:.0f} MiB, load {load:.1f}", flush=True)
    medians = {kind: median(values) for kind, values in seconds.items()}
    found = {f"{a} - {b}": differences(answers[a], answers[b]) for a, b in combinations(kinds, 2)}
    return {"differences": found, "ratio": medians.pop(STREAMED) / min(medians.values())}


def main(argv: list[str] | None = None) -> None:
    """Run the race, or one evaluation of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the checkpoint")
    parser.add_argument("tasks", type=Path, help="folder of the tasks")
    parser.add_argument("--batch-sizes", default="1,4,8", metavar="N,N", help="(default: 1,4,8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    parser.add_argument("--one", metavar="KIND", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    model, tasks, limit = arguments.model.resolve(), arguments.tasks.resolve(), arguments.limit
    if arguments.one:
        found = evaluate(arguments.one, model, tasks, limit)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"peak_memory": peak, "tasks": found}))
        return
    kinds = [*(f"hf:{size}" for size in arguments.batch_sizes.split(",")), STREAMED]
    results = race(kinds, arguments.rounds, lambda kind: launch(kind, model, tasks, limit))
    for pair, of_tasks in results["differences"].items():
        print(f"{pair}, nats: " + ", ".join(f"{task} {of['nats']:.1e}" for task, of in of_tasks.items()))
    print(f"streamed / the fastest of hf: {results['ratio']:.2f} of the seconds")


if __name__ == "__main__":
    main()
