"""One evaluation in a process of its own: `python bench/evaluation/entrant.py KIND MODEL TASKS RESULT.json`.

All kinds go through `lm_eval.simple_evaluate` with the same tasks, and import the same:

- hf: the harness's own model on the CPU, in fp32;
- exact: the same in float64;
- streamed: ours;
- frugal: ours, in the least memory that it says is enough;
- nothing: a model that answers 0 to everything. What it needs is what the process and the harness need by themselves.
"""

import argparse
import json
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path

import lm_eval
import lm_eval.models.huggingface
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from sparsefw.errors import InputError
from sparsefw.evaluation import StreamedLM

# The harness's own model, with the dtype of its weights.
DTYPES = {"hf": "float32", "exact": "float64"}
KINDS = (*DTYPES, "streamed", "frugal", "nothing")
TAG = "prose"


class Nothing(LM):
    """A model that answers 0 to everything."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [0.0] * len(requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError


def evaluate(kind: str, model: Path, tasks: Path, batch_size: int, limit: int | None) -> dict:
    """The harness's results of a model on all tasks of a folder."""
    asked = {
        "tasks": [TAG],
        "task_manager": TaskManager(include_path=str(tasks), include_defaults=False),
        "limit": limit,
        # Standard errors come of the samples; the harness's own take longer than the models.
        "bootstrap_iters": 0,
    }
    if kind in DTYPES:
        options = {"pretrained": str(model), "dtype": DTYPES[kind]}
        return lm_eval.simple_evaluate("hf", options, device="cpu", batch_size=batch_size, **asked)
    if kind == "frugal":
        return in_little_memory(lambda limit: lm_eval.simple_evaluate(StreamedLM(model, host_memory=limit), **asked))
    return lm_eval.simple_evaluate(StreamedLM(model) if kind == "streamed" else Nothing(), **asked)


def in_little_memory(evaluate: Callable[[float], dict]) -> dict:
    """Call a function with the least GiB of host memory with which it does not refuse to begin; returns its result.

    The first limit is too low for any process. The message says which one is enough.
    """
    limit = 0.01
    for _ in range(8):
        try:
            return evaluate(limit)
        except InputError as error:
            named = re.search(r"needs at least ([\d.]+) GiB", str(error))
            if named is None:
                raise
            limit = float(named[1])
    raise AssertionError("a limit that was named is too low")


def kept(results: dict) -> dict:
    """The log-likelihoods and metrics of each item of every task, in order, from the harness's results."""
    tasks = {}
    for task, samples in results["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        names = samples[0]["metrics"]
        tasks[task] = {
            "loglikelihoods": [[_loglikelihood(response[0]) for response in s["resps"]] for s in samples],
            "metrics": {name: [sample[name] for sample in samples] for name in names},
            "results": {name: results["results"][task][f"{name},none"] for name in names},
        }
    return tasks


def _loglikelihood(response: float | tuple[float, bool]) -> float:
    """The log-likelihood in a response; a rolling request has no other part."""
    return response if isinstance(response, float) else response[0]


def main(argv: list[str] | None = None) -> None:
    """Evaluate, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    for name in ("model", "tasks", "result"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    results = evaluate(arguments.kind, arguments.model, arguments.tasks, arguments.batch_size, arguments.limit)
    told = {
        "seconds_behind_imports": time.perf_counter() - start,
        "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
        "tasks": kept(results),
    }
    arguments.result.write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
