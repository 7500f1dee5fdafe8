"""The race: lm-evaluation-harness's own model against ours, `python bench/evaluation/race.py MODEL TASKS`.

MODEL is a checkpoint, such as bench/quality/checkpoint_smollm2.py makes; TASKS a folder of make_tasks.py. `--rounds`
times, in turn, each evaluation is a process of its own that goes through `lm_eval.simple_evaluate`:

- hf:N: the harness's own model on the CPU in fp32, with a batch size of N, for each of `--batch-sizes`;
- streamed: ours;
- nothing: a model that answers 0 to everything. What it needs is what the process and the harness need by themselves.

What is timed is the whole process; memory is the peak of its resident memory. All answers are compared. Nothing else
may run meanwhile: the load of the machine before each start is kept. OMP_NUM_THREADS holds for all.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parents[1] / "results" / "evaluation-race.json"
NOTHING, STREAMED = "nothing", "streamed"
TAG = "prose"


def evaluate(kind: str, model: Path, tasks: Path, limit: int | None) -> dict[str, dict]:
    """The log-likelihoods of every item, and the metrics, by task."""
    import lm_eval
    import lm_eval.models.huggingface
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from sparsefw.evaluation import StreamedLM

    class Nothing(LM):
        """A model that answers 0 to everything."""

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            return [0.0] * len(requests)

        def generate_until(self, requests: list) -> list[str]:
            raise NotImplementedError

    if kind in (STREAMED, NOTHING):
        lm = StreamedLM(model) if kind == STREAMED else Nothing()
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
    """Evaluate in a process of its own; returns what it took, and what it answered."""
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "result.json")
        command = [sys.executable, __file__, str(model), str(tasks), "--one", kind, "--results", str(result)]
        command += ["--limit", str(limit)] if limit else []
        # All files are here: no look at the Hub is timed.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        load, start = os.getloadavg()[0], time.perf_counter()
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{kind}: exit status {process.returncode}\n{process.stderr[-4000:]}")
        return {"kind": kind, "seconds": seconds, "load": load} | json.loads(result.read_text(encoding="utf-8"))


def differences(one: dict[str, dict], other: dict[str, dict]) -> dict[str, dict]:
    """By task: the largest difference of a log-likelihood in nats, and both values of the metrics that differ."""
    return {
        task: {
            "nats": max(abs(a - b) for a, b in zip(told["loglikelihoods"], its["loglikelihoods"], strict=True)),
            "metrics": {name: [x, its["metrics"][name]] for name, x in told["metrics"].items()},
        }
        for (task, told), its in zip(one.items(), (other[task] for task in one), strict=True)
    }


def race(kinds: list[str], rounds: int, launch: Callable[[str], dict]) -> dict:
    """Run all kinds in turn.

    Args:
        kinds: the evaluations.
        rounds: how often each of them runs.
        launch: evaluates in a process of its own.

    Returns:
        The runs, how the answers of each two kinds differ, and our median seconds over the least of the harness's.
    """
    runs, answers = [], {}
    for kind in kinds * rounds:
        run = launch(kind)
        answers[kind] = run.pop("tasks")
        runs.append(run)
        peak = run["peak_memory"] / 2**20
        print(f"{kind}: {run['seconds']:.1f} s, {peak:.0f} MiB, load {run['load']:.1f}", flush=True)
    seconds = {kind: median(run["seconds"] for run in runs if run["kind"] == kind) for kind in kinds}
    theirs = min(seconds[kind] for kind in kinds if kind not in (STREAMED, NOTHING))
    pairs = combinations([kind for kind in kinds if kind != NOTHING], 2)
    found = {f"{a} - {b}": differences(answers[a], answers[b]) for a, b in pairs}
    return {"runs": runs, "differences": found, "ratio": seconds[STREAMED] / theirs}


def main(argv: list[str] | None = None) -> None:
    """Run the race, or one evaluation of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the checkpoint")
    parser.add_argument("tasks", type=Path, help="folder of the tasks")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"(default: bench/results/{RESULTS.name})")
    parser.add_argument("--batch-sizes", default="1,4,8", metavar="N,N", help="(default: 1,4,8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    parser.add_argument("--one", metavar="KIND", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    model, tasks, limit = arguments.model.resolve(), arguments.tasks.resolve(), arguments.limit
    if arguments.one:
        found = evaluate(arguments.one, model, tasks, limit)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        arguments.results.write_text(json.dumps({"peak_memory": peak, "tasks": found}), encoding="utf-8")
        return
    kinds = [NOTHING, *(f"hf:{size}" for size in arguments.batch_sizes.split(",")), STREAMED]
    results = race(kinds, arguments.rounds, lambda kind: launch(kind, model, tasks, limit))
    told = {
        "model": model.name,
        "weights": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "tasks": json.loads((tasks / "sources.json").read_text(encoding="utf-8")),
        "limit": limit,
        "machine": [platform.processor(), os.cpu_count(), os.environ.get("OMP_NUM_THREADS")],
        "versions": {name: version(name) for name in ("lm_eval", "torch", "transformers", "datasets")},
    }
    arguments.results.write_text(json.dumps(told | results, indent=1) + "\n", encoding="utf-8")
    for pair, of_tasks in results["differences"].items():
        print(f"{pair}, nats: " + ", ".join(f"{task} {of['nats']:.1e}" for task, of in of_tasks.items()))
    print(f"streamed / the fastest of hf: {results['ratio']:.2f} of the seconds")


if __name__ == "__main__":
    main()
