"""What a report tells of tasks, compared with itself: models, counts, and differences."""

import math
from collections.abc import Sequence

from sparsefw.errors import InputError, shown
from sparsefw.report import DENSE, Measurement, TaskRecord


def check_tasks(tasks: Sequence[TaskRecord], methods: Sequence[str]) -> None:
    """Refuse metrics that a run cannot have measured.

    Args:
        tasks: metrics of tasks, of the report of a run.
        methods: the run's methods.

    Raises:
        InputError: the report contradicts itself; the message begins with the place in the report.
    """
    seen = set()
    for n, task in enumerate(tasks):
        place, name = f"tasks[{n}]", (task.task, task.metric, task.filter)
        if name in seen:
            raise InputError(f"{place}: a second row of {shown(' '.join(name))}")
        seen.add(name)
        if task.documents < 0 or task.shots < 0:
            raise InputError(f"{place}: {task.documents} documents, {task.shots} shots")
        if task.results.keys() != {DENSE, *methods}:
            expected = ", ".join([DENSE, *methods])
            raise InputError(f"{place}.results: expected {expected}, got {shown(', '.join(task.results))}")
        for model, measured in task.results.items():
            _check(task, measured, f"{place}.results.{model}")


def _check(task: TaskRecord, measured: Measurement, place: str) -> None:
    difference, dense = measured.difference, task.results[DENSE].value
    for stderr in (measured.stderr, None if difference is None else difference.stderr):
        if stderr is not None and stderr < 0:
            raise InputError(f"{place}: a standard error of {stderr}")
    if difference is None:
        return
    if measured is task.results[DENSE]:
        raise InputError(f"{place}.difference: expected null, since others are compared with {DENSE}")
    # As far as sums in another order, and files of finite numbers, can tell.
    off, size = difference.value - (measured.value - dense), abs(measured.value) + abs(dense)
    if math.isfinite(size) and not abs(off) <= 1e-9 * size:
        raise InputError(f"{place}.difference.value: {difference.value}, expected {measured.value} - {dense}")
