"""Records of the harness's results of several models, with differences from one of them.

lm-evaluation-harness names a metric "acc,none", with its filter, and has a value for each document in its samples. From
these its value is computed again, and only if that gives the same number, the difference of two models is told.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from sparsefw.checkpoint.files import parse
from sparsefw.evaluation.estimates import Estimate, difference, estimate_of, same, weighted_perplexity
from sparsefw.report.tasks import (
    Measurement,
    TaskRecord,
    TextRecord,
    average_of,
    weighted_difference,
    weighted_stderr,
)

# Papers on pruning average the first of these that a task has.
MAIN = ("acc_norm", "acc")

# The dict that `lm_eval.simple_evaluate` returns.
Harness = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """The results of several models.

    Attributes:
        models: names of the models, in the order in which the user gave them; first the one that others are compared
            with.
        against: name of the model that others are compared with; None: none.
        tasks: metrics of tasks and of groups of tasks; a group comes before its tasks.
        texts: perplexity on texts.
    """

    models: list[str]
    against: str | None
    tasks: list[TaskRecord]
    texts: list[TextRecord]

    @property
    def average(self) -> dict[str, Measurement]:
        """By model, the mean over tasks of accuracies: acc_norm where a task has it, else acc."""
        return average_of(self.tasks)

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Evaluation":
        """Read what `to_json` has written; `path` is the file's, for the message.

        Raises:
            InputError: it is not JSON, or something else; one line that names the place.
        """
        return parse(cls, text.encode("utf-8", "surrogatepass"), path)


def text_record(
    source: str,
    hash: str,
    seqlen: int,
    windows: Mapping[str, Sequence[tuple[float, int]]],
    against: str | None = None,
) -> TextRecord:
    """Perplexity on a text.

    Args:
        source: the text, as the user has named it.
        hash: SHA-256 of the tokens, in hex.
        seqlen: tokens in a window.
        windows: by model, for each window the log-likelihood of its tokens and the number of those.
        against: name of the model that others are compared with.
    """
    estimates = {name: weighted_perplexity(dict(enumerate(of_model))) for name, of_model in windows.items()}
    values = {name: math.nan if found is None else found.value for name, found in estimates.items()}
    first = next(iter(windows.values()))
    results = _compared(values, dict.fromkeys(values), estimates, against)
    return TextRecord(source, hash, len(first), seqlen, sum(tokens for _, tokens in first), results)


def task_records(found: Mapping[str, Harness], against: str | None = None) -> list[TaskRecord]:
    """All metrics of all tasks; a group comes before its tasks.

    Args:
        found: by model, what the harness has returned, with samples; all of the same tasks.
        against: name of the model that others are compared with.
    """
    tree = _Tree.of(next(iter(found.values())))
    of_tasks = {task: [*_of_task(found, task, against)] for task in tree.order() if task not in tree.children}
    records = {task: of_tasks.get(task) or [*_of_group(found, task, tree, of_tasks)] for task in tree.order()}
    return [record for task in _mark_averaged(records, tree) for record in task]


class _Tree(NamedTuple):
    """Groups of tasks.

    Attributes:
        roots: tasks and groups that are in no group.
        children: by name of a group, the tasks and groups in it.
    """

    roots: list[str]
    children: dict[str, list[str]]

    @classmethod
    def of(cls, found: Harness) -> "_Tree":
        # Some versions of the harness list a task as a group of no tasks.
        children = {group: names for group, names in found.get("group_subtasks", {}).items() if names}
        inner = {name for names in children.values() for name in names}
        return cls([name for name in found["results"] if name not in inner], children)

    def order(self) -> list[str]:
        """All tasks and groups, a group before what is in it."""
        return [*dict.fromkeys(name for root in self.roots for name in self.inside(root))]

    def inside(self, name: str) -> Iterator[str]:
        """A task, or a group and all that is in it."""
        yield name
        for child in self.children.get(name, []):
            yield from self.inside(child)

    def leaves(self, group: str) -> list[str]:
        """The tasks in a group and in its groups."""
        return [name for name in dict.fromkeys(self.inside(group)) if name not in self.children]


def _keys(found: Mapping[str, Harness], task: str) -> Iterator[tuple[str, str, str]]:
    """The metrics of a task: the harness's key, the metric's name, the filter's."""
    names = dict.fromkeys(key for harness in found.values() for key in harness["results"][task])
    for key in names:
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield key, metric, filter_name


def _of_task(found: Mapping[str, Harness], task: str, against: str | None) -> Iterator[TaskRecord]:
    for key, metric, filter_name in _keys(found, task):
        values = {name: _number(harness["results"][task].get(key)) for name, harness in found.items()}
        stderrs = {name: _stderr(harness, task, metric, filter_name) for name, harness in found.items()}
        documents = {name: _documents(harness, task, metric, filter_name) for name, harness in found.items()}
        estimates = {
            name: estimate_of(values[name], documents[name], _aggregation(harness, task, metric))
            for name, harness in found.items()
        }
        yield _record(found, task, metric, filter_name, _compared(values, stderrs, estimates, against))


def _of_group(
    found: Mapping[str, Harness], group: str, tree: _Tree, of_tasks: Mapping[str, list[TaskRecord]]
) -> Iterator[TaskRecord]:
    """The aggregates of a group, which are weighted means over its tasks."""
    first = next(iter(found.values()))
    for key, metric, filter_name in _keys(found, group):
        tasks = [
            record
            for task in tree.leaves(group)
            for record in of_tasks[task]
            if (record.metric, record.filter) == (metric, filter_name)
        ]
        values = {name: _number(harness["results"][group].get(key)) for name, harness in found.items()}
        weights = _weights(values, tasks, [_sample_len(first, task.task) for task in tasks])
        results = {}
        for name, value in values.items():
            stderr, compared = _stderr(found[name], group, metric, filter_name), None
            if weights is not None:
                measured = [task.results[name] for task in tasks]
                stderr = weighted_stderr([one.stderr for one in measured], weights) if stderr is None else stderr
                compared = weighted_difference(measured, weights)
            results[name] = Measurement(value, stderr, compared)
        yield _record(found, group, metric, filter_name, results)


def _weights(values: Mapping[str, float], tasks: Sequence[TaskRecord], sizes: Sequence[int]) -> list[float] | None:
    """The weights with which a group's values are means of its tasks' values; None if neither kind gives them.

    The harness weights tasks by their documents, or all alike, as the group's config says.
    """
    for counts in (sizes, [1] * len(tasks)):
        weights = [count / sum(counts) for count in counts] if sum(counts) else []
        if weights and all(same(_mean(weights, tasks, name), value) for name, value in values.items()):
            return weights
    return None


def _mean(weights: Sequence[float], tasks: Sequence[TaskRecord], name: str) -> float:
    return sum(weight * task.results[name].value for weight, task in zip(weights, tasks, strict=True))


def _record(
    found: Mapping[str, Harness], task: str, metric: str, filter_name: str, results: dict[str, Measurement]
) -> TaskRecord:
    harness = next(iter(found.values()))
    version = harness.get("versions", {}).get(task)
    better = harness.get("higher_is_better", {}).get(task, {}).get(metric)
    return TaskRecord(
        task=task,
        metric=metric,
        filter=filter_name,
        documents=len(_documents(harness, task, metric, filter_name)) or _sample_len(harness, task),
        shots=int(harness.get("n-shot", {}).get(task) or 0),
        version="" if version in (None, "N/A") else str(version),
        higher_is_better=None if better is None else bool(better),
        averaged=False,
        results=results,
    )


def _compared(
    values: Mapping[str, float],
    stderrs: Mapping[str, float | None],
    estimates: Mapping[str, Estimate | None],
    against: str | None,
) -> dict[str, Measurement]:
    """A metric by model, with the harness's standard errors where it has some."""
    results = {}
    for name, value in values.items():
        estimate, stderr = estimates[name], stderrs[name]
        if stderr is None and estimate is not None:
            stderr = estimate.stderr
        of_pair = None if against in (None, name) else difference(estimate, estimates[str(against)])
        results[name] = Measurement(value, stderr, of_pair)
    return results


def _mark_averaged(records: Mapping[str, list[TaskRecord]], tree: _Tree) -> Iterator[list[TaskRecord]]:
    """The records of every task, with a mark at those that the average counts.

    A group with an aggregate counts as one task, and the tasks in it do not.
    """
    counted: dict[str, TaskRecord] = {}
    names = list(tree.roots)
    while names:
        name = names.pop()
        main = [record for metric in MAIN for record in records[name] if record.metric == metric]
        if main:
            counted[name] = main[0]
        else:
            names.extend(tree.children.get(name, []))
    for name, of_task in records.items():
        yield [replace(record, averaged=record is counted.get(name)) for record in of_task]


def _documents(harness: Harness, task: str, metric: str, filter_name: str) -> dict[int, Any]:
    """The values that the harness has aggregated, by document; empty if it has kept no samples."""
    samples = harness.get("samples", {}).get(task, [])
    return {one["doc_id"]: one[metric] for one in samples if one["filter"] == filter_name and metric in one}


def _sample_len(harness: Harness, task: str) -> int:
    """The number of documents of a task, by which the harness weights it in a group."""
    return int(harness["results"][task].get("sample_len", 0))


def _aggregation(harness: Harness, task: str, metric: str) -> str | None:
    """Name of the aggregation that a task's config names for a metric."""
    listed = harness.get("configs", {}).get(task, {}).get("metric_list") or []
    return next((one.get("aggregation") for one in listed if one.get("metric") == metric), None)


def _stderr(harness: Harness, task: str, metric: str, filter_name: str) -> float | None:
    """The harness's standard error; None where it has none, or NaN for a group of single documents."""
    found = _number(harness["results"][task].get(f"{metric}_stderr,{filter_name}"))
    return None if math.isnan(found) else found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, Real) else math.nan
