"""The race: lm-evaluation-harness's own model against ours, `python bench/evaluation/race.py MODEL TASKS`.

MODEL is a checkpoint, such as bench/quality/checkpoint_smollm2.py makes; TASKS a folder of make_tasks.py. Every
evaluation is one of entrant.py's in a process of its own, one after the other:

- once: a model that answers nothing, then the harness's at every batch size, ours between them;
- `--rounds` times, in turn: the harness's at the fastest of these batch sizes, ours with all memory and with the least
  that it says is enough, the one that answers nothing;
- with --exact, once, and not timed: the harness's in float64.

What is timed is the whole process. Memory is the peak of its resident memory, and what it has beside the process of the
model that answers nothing. All answers are compared. Nothing else may run meanwhile; the load of the machine
before each start is kept with its numbers. OMP_NUM_THREADS holds for both. Results are written after each run.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parents[1] / "results" / "evaluation-race.json"
MIB = 2**20
DISTRIBUTIONS = ("lm_eval", "torch", "transformers", "datasets")


@dataclass(frozen=True)
class Entrant:
    """A model in the race: a kind of entrant.py, and its batch size."""

    kind: str
    batch_size: int = 1

    @property
    def name(self) -> str:
        """Its name in the table."""
        return f"hf, batch size {self.batch_size}" if self.kind == "hf" else self.kind

    @property
    def compared(self) -> bool:
        """Whether its answers are worth something."""
        return self.kind != "nothing"


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        name: the entrant's name.
        seconds: of the whole process.
        seconds_behind_imports: of loading, tokenizing and evaluating.
        peak_memory: most bytes of resident memory.
        threads: threads of torch.
        load: runnable processes on the machine before it was started, a mean over a minute.
    """

    name: str
    seconds: float
    seconds_behind_imports: float
    peak_memory: int
    threads: int
    load: float


NOTHING, STREAMED, EXACT = Entrant("nothing"), Entrant("streamed"), Entrant("exact")
FRUGAL = Entrant("frugal")

# Evaluates in a process of its own, and returns what entrant.py writes.
Launch = Callable[[Entrant], dict]


def launch_apart(model: Path, tasks: Path, limit: int | None) -> Launch:
    """Launches entrant.py on this model and these tasks."""

    def launch(entrant: Entrant) -> dict:
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch, "result.json")
            command = [
                sys.executable,
                str(Path(__file__).with_name("entrant.py")),
                entrant.kind,
                str(model),
                str(tasks),
            ]
            command += [str(result), "--batch-size", str(entrant.batch_size)]
            command += ["--limit", str(limit)] if limit else []
            # All files are here: no look at the Hub is timed.
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
            process = subprocess.run(command, env=environment, capture_output=True, text=True)
            if process.returncode:
                raise SystemExit(f"{entrant.name}: exit status {process.returncode}\n{process.stderr[-4000:]}")
            return json.loads(result.read_text(encoding="utf-8"))

    return launch


def measure(entrant: Entrant, launch: Launch) -> tuple[Run, dict]:
    """One evaluation: what it took, and what it answered."""
    load, start = os.getloadavg()[0], time.perf_counter()
    told = launch(entrant)
    seconds = time.perf_counter() - start
    measured = {name: told[name] for name in ("seconds_behind_imports", "peak_memory", "threads")}
    return Run(entrant.name, seconds, **measured, load=load), told["tasks"]


def order(batch_sizes: list[int], rounds: int, exact: bool, fastest: Callable[[], Entrant]) -> Iterator[Entrant]:
    """Who runs, in turn; `fastest` is asked once every batch size has run."""
    yield NOTHING
    for batch_size in batch_sizes:
        yield Entrant("hf", batch_size)
        yield STREAMED
    best = fastest()
    for _ in range(rounds):
        yield from (best, STREAMED, FRUGAL, NOTHING)
    if exact:
        yield EXACT


def race(
    batch_sizes: list[int],
    rounds: int,
    exact: bool,
    launch: Launch,
    keep: Callable[[dict], None] = lambda results: None,
) -> dict:
    """Run the race.

    Args:
        batch_sizes: the harness's batch sizes that are tried.
        rounds: how often the fastest of them runs again, in turn with ours.
        exact: whether the harness's model runs in float64, too.
        launch: evaluates in a process of its own.
        keep: called with the results so far after every run.

    Returns:
        The runs, the fastest of the harness's entrants, and how the answers of each two entrants differ.
    """
    results: dict = {"runs": [], "fastest": None, "differences": {}}
    answers: dict[Entrant, dict] = {}
    theirs = {entrant.name: entrant for entrant in (Entrant("hf", size) for size in batch_sizes)}

    def fastest() -> Entrant:
        name = min((run for run in results["runs"] if run["name"] in theirs), key=lambda run: run["seconds"])["name"]
        results["fastest"] = name
        return theirs[name]

    for entrant in order(batch_sizes, rounds, exact, fastest):
        run, answers[entrant] = measure(entrant, launch)
        results["runs"].append(asdict(run))
        pairs = combinations((one for one in answers if one.compared), 2)
        results["differences"] = {f"{a.name} - {b.name}": differences(answers[a], answers[b]) for a, b in pairs}
        keep(results)
        print(f"{run.name}: {run.seconds:.1f} s, {run.peak_memory / MIB:.0f} MiB, load {run.load:.1f}", flush=True)
    return results


def differences(one: dict, other: dict) -> dict[str, dict]:
    """By task: how many requests, the largest difference of a log-likelihood in nats, and both values of metrics."""
    found = {}
    for task, told in one.items():
        pairs = [
            pair
            for mine, yours in zip(told["loglikelihoods"], other[task]["loglikelihoods"], strict=True)
            for pair in zip(mine, yours, strict=True)
        ]
        found[task] = {
            "requests": len(pairs),
            "largest": max(abs(a - b) for a, b in pairs),
            "metrics": {name: [value, other[task]["results"][name]] for name, value in told["results"].items()},
        }
    return found


def table(results: dict) -> str:
    """Markdown of the results: what evaluations took, and how their answers differ."""
    runs: dict[str, list[dict]] = {}
    for run in results["runs"]:
        runs.setdefault(run["name"], []).append(run)
    alone = median(run["peak_memory"] for run in runs[NOTHING.name])
    head = ["", "runs", "seconds", "behind imports", "peak MiB", "beside the process's own", "of the weights"]
    rows = []
    for name, of in runs.items():
        seconds, behind, peaks = ([r[key] for r in of] for key in ("seconds", "seconds_behind_imports", "peak_memory"))
        beside = median(peaks) - alone
        rows.append([name, str(len(of)), f"{median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"])
        rows[-1] += [f"{median(behind):.1f}", f"{median(peaks) / MIB:.0f}", f"{beside / MIB:.0f}"]
        rows[-1].append(f"{beside / results['weights']:.2f}")
    return "\n".join([*_lines(head, rows), "", *_lines(*_differences(results["differences"]))])


def _differences(of_pairs: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the largest difference of a log-likelihood of each task, and the accuracies that are unequal."""
    first = next(iter(of_pairs.values()))
    head = ["largest difference, nats", *(f"{task}, {of['requests']} requests" for task, of in first.items())]
    rows = []
    for name, of_tasks in of_pairs.items():
        unequal = [
            f"{task} {metric}: {a:.4f}, {b:.4f}"
            for task, of in of_tasks.items()
            for metric, (a, b) in of["metrics"].items()
            if metric.startswith("acc") and a != b
        ]
        rows.append([name, *(f"{of['largest']:.1e}" for of in of_tasks.values()), "; ".join(unequal) or "none"])
    return [*head, "unequal accuracies"], rows


def _lines(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def setting(model: Path, tasks: Path, limit: int | None) -> dict:
    """The model, the tasks, the machine and the versions of a race, for the results."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return {
        "model": model.name,
        "weights": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "tasks": json.loads((tasks / "sources.json").read_text(encoding="utf-8")),
        "limit": limit,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in DISTRIBUTIONS},
    }


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",")]


def main(argv: list[str] | None = None) -> None:
    """Run the race, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="the checkpoint")
    parser.add_argument("tasks", type=Path, nargs="?", help="folder of the tasks")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"(default: bench/results/{RESULTS.name})")
    parser.add_argument("--batch-sizes", type=_sizes, default="1,4,8", metavar="N,N", help="(default: 1,4,8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--exact", action="store_true", help="compare with float64, too: takes twice as long again")
    parser.add_argument("--limit", type=int, metavar="N", help="items of each task (default: all)")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is in the results")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(json.loads(arguments.results.read_text(encoding="utf-8"))))
        return
    if arguments.tasks is None:
        parser.error("MODEL and TASKS are needed")
    told = setting(arguments.model, arguments.tasks, arguments.limit)

    def keep(results: dict) -> None:
        arguments.results.write_text(json.dumps(told | results, indent=1) + "\n", encoding="utf-8")

    launch = launch_apart(arguments.model.resolve(), arguments.tasks.resolve(), arguments.limit)
    results = race(arguments.batch_sizes, arguments.rounds, arguments.exact, launch, keep)
    print(table(told | results))


if __name__ == "__main__":
    main()
