"""The lines that the command prints."""

from dataclasses import replace

import pytest

from sparsefw.evaluation.measured import Evaluation
from sparsefw.evaluation.tables import summary
from sparsefw.report.task_table import number
from sparsefw.report.tasks import Difference, Measurement, TaskRecord, TextRecord


def record(task: str, metric: str = "acc", **changes) -> TaskRecord:
    results = {
        "dense": Measurement(0.5, 0.01),
        "wanda": Measurement(0.45, 0.011, Difference(-0.05, 0.02)),
        "sparsefw": Measurement(0.52, 0.012, Difference(0.02, 0.008)),
    }
    return replace(TaskRecord(task, metric, "none", 2376, 0, "1.0", True, True, results), **changes)


TEXT = TextRecord(
    "wikitext",
    "abc",
    141,
    2048,
    288627,
    {
        "dense": Measurement(17.4, 0.25),
        "wanda": Measurement(1278.2, 40.0, Difference(1260.8, 39.5)),
        "sparsefw": Measurement(36.25, 0.5, Difference(18.85, 0.4)),
    },
)


def squeezed(line: str) -> str:
    """A line with single spaces."""
    return " ".join(line.split())


def only(evaluation: Evaluation, *names: str) -> Evaluation:
    def of(one):
        return replace(one, results={name: one.results[name] for name in names})

    return replace(evaluation, models=[*names], tasks=[*map(of, evaluation.tasks)], texts=[*map(of, evaluation.texts)])


ALL = Evaluation(
    ["dense", "wanda", "sparsefw"], "dense", [record("arc_easy", "acc_norm"), record("boolq", shots=5)], [TEXT]
)


def test_one_model():
    lines = [*summary(replace(only(ALL, "dense"), against=None))]
    assert lines == [
        "task                         metric                   n shots                dense",
        "wikitext                     perplexity             141            17.400 ± 0.2500",
        "arc_easy                     acc_norm              2376     0      0.5000 ± 0.0100",
        "boolq                        acc                   2376     5      0.5000 ± 0.0100",
        "average                      acc_norm or acc          2            0.5000 ± 0.0071",
        "",
        "n: documents of a task, windows of a text, tasks of an average; ±: standard error",
        "perplexity: 141 windows of 2048 tokens of wikitext",
    ]


def test_two_models():
    lines = [*summary(only(ALL, "dense", "wanda"))]
    assert [squeezed(line).split(maxsplit=2)[-1] for line in lines[1:5]] == [
        "141 17.400 ± 0.2500 1278.200 ± 40.000 +1260.800 ± 39.500 +31.9",
        "2376 0 0.5000 ± 0.0100 0.4500 ± 0.0110 -0.0500 ± 0.0200 -2.5",
        "2376 5 0.5000 ± 0.0100 0.4500 ± 0.0110 -0.0500 ± 0.0200 -2.5",
        "or acc 2 0.5000 ± 0.0071 0.4500 ± 0.0078 -0.0500 ± 0.0141 -3.5",
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert squeezed(lines[0]) == "task metric n shots dense wanda difference errors"
    assert "difference: from dense, the same documents in pairs; errors: so many of its standard errors" in lines


def test_several_models_have_a_table_each():
    lines = [*summary(ALL)]
    assert [line.split()[-4:] for line in lines if line.startswith("task ")] == [
        ["dense", "wanda", "difference", "errors"],
        ["dense", "sparsefw", "difference", "errors"],
    ]
    side_by_side = [*summary(replace(ALL, against=None))]
    assert side_by_side[0].split()[-3:] == ALL.models
    assert not any("difference" in line for line in side_by_side)


def test_what_is_unknown_is_left_empty():
    results = {
        "dense": Measurement(0.5, None),
        "wanda": Measurement(0.25, 0.1, None),
        "sparsefw": Measurement(0.5, 0.1, Difference(0.0, 0.0)),
    }
    lines = [*summary(replace(ALL, tasks=[record("cola", "mcc", results=results, filter="first")], texts=[]))]
    assert squeezed(lines[1]) == "cola mcc (first) 2376 0 0.5000 0.2500 ± 0.1000"
    assert squeezed(lines[4]) == "cola mcc (first) 2376 0 0.5000 0.5000 ± 0.1000 +0.0000 ± 0.0000"
    assert not any(line.startswith("average") for line in lines)


def test_long_names_of_models_are_told_below():
    name = "/models/meta-llama/Llama-3.1-8B"
    results = {name: Measurement(0.5, 0.01), "pruned": Measurement(0.25, 0.01, Difference(-0.25, 0.01))}
    lines = [*summary(Evaluation([name, "pruned"], name, [record("boolq", results=results)], []))]
    assert lines[0].split()[4:] == ["model", "1", "pruned", "difference", "errors"]
    assert f"model 1: {name}" in lines
    assert any(line.startswith("difference: from model 1,") for line in lines)


def test_names_are_printed_harmless():
    task = record("a\x1b[31m\nb", "acc\u202e", filter="\ud800")
    model = "m\x07"
    task = replace(task, results={model: Measurement(0.5, 0.1)})
    lines = [*summary(Evaluation([model], None, [task], []))]
    assert all(line.isprintable() for line in lines[:2])
    assert r"a\x1b[31m\nb" in lines[1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.45678, "0.4568"), (-9.5, "-9.5000"), (31.75432, "31.754"), (2.5e7, "2.500e+07"), (float("nan"), "nan")],
)
def test_digits(value, text):
    assert number(value) == text
