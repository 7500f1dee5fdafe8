"""What a report tells of tasks must agree with itself."""

from dataclasses import replace

import pytest
from helpers.pages import report_of_run, task
from helpers.verifying import WANDA, change_report, refused

from sparsefw.checks.claims import claims_of
from sparsefw.checks.tasks import check_tasks
from sparsefw.errors import InputError
from sparsefw.report import Difference, Measurement

METHODS = ["wanda", "sparsefw"]


def changed(**results: Measurement):
    record = task("boolq")
    return [task("arc_easy"), replace(record, results=record.results | results)]


def test_what_a_run_writes_passes():
    check_tasks([task("boolq"), task("boolq", "acc_norm"), replace(task("boolq"), filter="first")], METHODS)
    check_tasks(changed(wanda=Measurement(float("nan"), None, Difference(float("nan"), None))), METHODS)
    check_tasks(changed(wanda=Measurement(0.25)), METHODS)
    check_tasks([], METHODS)
    # A difference of sums in another order.
    value = 0.1 + 0.2
    check_tasks(changed(wanda=Measurement(value, 0.1, Difference(-0.2 + 1e-12, 0.1))), METHODS)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([task("boolq"), task("boolq")], r"tasks\[1\]: a second row of boolq acc none"),
        ([replace(task("boolq"), documents=-1)], r"tasks\[0\]: -1 documents, 0 shots"),
        (
            changed(ria=Measurement(0.5)),
            r"tasks\[1\]\.results: expected dense, wanda, sparsefw, got dense, wanda, .*ria",
        ),
        (changed(wanda=Measurement(0.375, -0.1)), r"tasks\[1\]\.results\.wanda: a standard error of -0\.1"),
        (
            changed(wanda=Measurement(0.375, 0.1, Difference(-0.125, -0.1))),
            r"tasks\[1\]\.results\.wanda: a standard error of -0\.1",
        ),
        (
            changed(wanda=Measurement(0.375, 0.1, Difference(0.125, 0.1))),
            r"tasks\[1\]\.results\.wanda\.difference\.value: 0\.125, expected 0\.375 - 0\.5",
        ),
        (
            changed(wanda=Measurement(0.375, 0.1, Difference(float("nan"), 0.1))),
            r"tasks\[1\]\.results\.wanda\.difference\.value: nan, expected 0\.375 - 0\.5",
        ),
        (
            changed(dense=Measurement(0.5, 0.1, Difference(0.0, 0.0))),
            r"tasks\[1\]\.results\.dense\.difference: expected null, since others are compared with dense",
        ),
    ],
)
def test_contradictions(tasks, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        check_tasks(tasks, METHODS)


def test_claims_are_checked():
    report = report_of_run()
    report.tasks.append(task("boolq"))
    assert claims_of(report).method == "sparsefw"
    report.tasks[0].results.pop("wanda")
    with pytest.raises(InputError, match=r"^tasks\[0\]\.results: expected dense, wanda, sparsefw"):
        claims_of(report)


def test_the_command_refuses_them(copied, capsys):
    _, output = copied(*WANDA)
    record = {"task": "boolq", "metric": "acc", "filter": "none", "documents": 9, "shots": 0, "version": ""}
    record |= {"higher_is_better": True, "averaged": True, "results": {}}
    change_report(output, lambda report: report.update(tasks=[record]))
    refused(capsys, r".*report\.json: tasks\[0\]\.results: expected dense, wanda, got $", output)
