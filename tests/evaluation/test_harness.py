"""Questions of tasks, and the harness's results of the answers."""

import math
import os
import random
import zlib

import lm_eval
import numpy as np
import pytest
import torch
from helpers.tasks import GROUP, TAG, TASKS, write_task, write_tasks
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from sparsefw.errors import InputError
from sparsefw.evaluation import PAPER, questions, results
from sparsefw.evaluation.encoding import LOGLIKELIHOOD, ROLLING

CHOICES, DOCUMENTS = TASKS["tiny_choices"]


def answer(kind, texts):
    """A number that depends on the texts alone."""
    number = -(zlib.crc32(repr(texts).encode()) % 1000) / 7
    return number if kind == ROLLING else (number, number > -70)


class Made(LM):
    """A model of the harness with these answers."""

    def loglikelihood(self, requests):
        return [answer(LOGLIKELIHOOD, request.args) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [answer(ROLLING, request.args) for request in requests]

    def generate_until(self, requests):
        raise AssertionError


def asked(names, folder, **options):
    return questions(names, include_path=folder, include_defaults=False, **options)


def results_of(found, bootstrap_iters=100):
    return results(found, [answer(*question.key) for question in found.asked], bootstrap_iters)


def of_harness(names, folder, **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(Made(), tasks=names, task_manager=manager, bootstrap_iters=100, **options)


SHOWN = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples", "samples", "group_subtasks")


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2}, {"limit": 3}, {"limit": 0.5, "num_fewshot": 1}], ids=str)
def test_results_are_those_of_the_harness(options, tasks):
    """Metrics, standard errors, prompts with examples and samples, to the last digit."""
    names = [GROUP, "tiny_rolling", "tiny_last_word", "tiny_long"]
    expected = of_harness(names, tasks, **options)
    found = results_of(asked(names, tasks, **options))
    for key in SHOWN:
        assert found[key] == expected[key], key
    assert set(found["samples"]) == set(TASKS)
    assert found["n-shot"]["tiny_choices"] == options.get("num_fewshot", 0)
    # Results do not depend on how often they are made.
    again = asked(names, tasks, **options)
    assert results_of(again)["samples"] == results_of(again)["samples"] == expected["samples"]


def test_documents_that_are_drawn_are_drawn_as_the_harness_does(tmp_path):
    """Some tasks shuffle with the generators of the whole process, each time that their documents are looked at."""
    folder = write_tasks(tmp_path / "tasks", ["tiny_choices"])
    (folder / "shuffling.py").write_text(
        "import random\nimport numpy\n\n"
        "def shuffled(dataset):\n"
        "    def one(document):\n"
        "        order = random.sample(range(4), 4)\n"
        "        text = f'{document[\"text\"]} {numpy.random.randint(1000)}'\n"
        "        choices = [document['choices'][n] for n in order]\n"
        "        return {'text': text, 'choices': choices, 'label': order.index(document['label'])}\n"
        "    return dataset.map(one, load_from_cache_file=False)\n"
    )
    config = (folder / "tiny_choices.yaml").read_text()
    assert config.endswith("}")
    (folder / "tiny_choices.yaml").write_text(config[:-1] + ', "process_docs": !function shuffling.shuffled}')
    expected = of_harness(["tiny_choices"], folder)["samples"]["tiny_choices"]
    found = asked(["tiny_choices"], folder)
    assert [sample["arguments"] for sample in results_of(found)["samples"]["tiny_choices"]] == [
        sample["arguments"] for sample in expected
    ]
    assert results_of(found)["samples"]["tiny_choices"] == expected


def test_each_question_is_asked_once(tasks):
    found = asked([TAG, "tiny_choices"], tasks)
    assert found.tasks == sorted(TASKS)
    keys = [question.key for question in found.asked]
    assert len(keys) == len(set(keys))
    # Documents 0, 3 and 6 of the nine have two answers that are alike.
    assert len(asked(["tiny_choices"], tasks).asked) == 9 * 4 - 3
    assert found.asked[0].place == "task tiny_choices, document 0"


def test_patterns_and_paths_are_names(tasks):
    assert asked(["tiny_l*"], tasks).tasks == ["tiny_last_word", "tiny_long"]
    assert asked([str(tasks / "tiny_long.yaml")], tasks).tasks == ["tiny_long"]


def test_tasks_that_generate_are_refused_before_anything_is_loaded(tmp_path):
    folder = write_tasks(tmp_path / "tasks", ["tiny_choices"])
    for name in ("writes", "writes_too"):
        config = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "a"}
        write_task(folder, name, config, DOCUMENTS)
        (folder / f"{name}.jsonl").unlink()
    with pytest.raises(InputError, match=r"^task writes: generates text, and only likelihoods are computed here"):
        asked(["tiny_choices", "writes"], folder)
    with pytest.raises(InputError, match=r"^task writes, writes_too: generates text"):
        asked(["writes*"], folder)


def test_a_task_in_a_group_that_generates_is_named(tmp_path):
    folder = write_tasks(tmp_path / "tasks", ["tiny_choices", "tiny_mutual"])
    config = {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "a", "tag": TAG}
    write_task(folder, "writes", config, DOCUMENTS)
    with pytest.raises(InputError, match=r"^task writes: generates text"):
        asked([TAG], folder)


def test_unknown_tasks_are_refused(tasks):
    with pytest.raises(InputError, match=r"^task 'tiny_choice': unknown; the closest names are tiny_choices"):
        asked(["tiny_choice"], tasks)
    with pytest.raises(InputError, match=r"^task 'zzzz': unknown; `lm_eval ls tasks` lists all names"):
        asked(["tiny_long", "zzzz"], tasks)
    with pytest.raises(InputError, match=r"no/where: no folder of tasks"):
        questions(["tiny_long"], include_path="no/where")


def test_a_task_whose_data_cannot_be_loaded_is_named(tmp_path):
    folder = write_tasks(tmp_path / "tasks", ["tiny_choices", "tiny_long"])
    (folder / "tiny_long.jsonl").unlink()
    with pytest.raises(InputError, match=r"^task tiny_long: cannot be loaded: Unable to find .*tiny_long.jsonl"):
        asked(["tiny_choices", "tiny_long"], folder)


def test_a_task_whose_documents_do_not_fit_is_named(tmp_path):
    folder = write_tasks(tmp_path / "tasks", ["tiny_choices"])
    documents = [DOCUMENTS[0] | {"text": "a:b"}, DOCUMENTS[1] | {"text": "no colon"}]
    write_task(folder, "broken", CHOICES | {"doc_to_text": "{{text.split(':')[1]}}"}, documents)
    with pytest.raises(InputError, match=r"^task broken: no questions can be made of it: .*has no element 1"):
        asked(["tiny_choices", "broken"], folder)


def test_a_task_whose_metrics_fail_is_named(tmp_path):
    """The harness makes metrics only behind the last answer."""
    folder = write_tasks(tmp_path / "tasks", ["tiny_choices", "tiny_rolling"])
    write_task(folder, "broken", CHOICES | {"process_results": "!function broken.metrics"}, DOCUMENTS)
    path = folder / "broken.yaml"
    path.write_text(path.read_text().replace('"!function broken.metrics"', "!function broken.metrics"))
    (folder / "broken.py").write_text("def metrics(document, answers):\n    return {'acc': document['points']}\n")
    found = asked(["tiny_choices", "broken", "tiny_rolling"], folder)
    with pytest.raises(InputError, match=r"^task broken: no metrics can be made of its answers: KeyError: 'points'$"):
        results_of(found)


@pytest.mark.parametrize("limit", [0, -1, 1.5, math.inf, math.nan])
def test_limits_that_are_no_number_of_documents(limit, tasks):
    with pytest.raises(InputError, match=rf"^--limit {limit:g}: expected a number of documents, or a share"):
        asked(["tiny_choices"], tasks, limit=limit)


def test_more_examples_than_there_are(tasks):
    with pytest.raises(InputError, match=r"^task tiny_choices: .*it may have fewer examples than --num-fewshot 100"):
        asked(["tiny_choices"], tasks, num_fewshot=100)


@pytest.mark.parametrize(("data", "why"), [
    ("", "there is no document in it"), ('{"text": "x', "JSON parse error: Missing a closing quotation mark"),
])  # fmt: skip
def test_data_of_a_task_that_is_damaged(data, why, tmp_path, capfd):
    folder = write_tasks(tmp_path / "tasks", ["tiny_choices"])
    (folder / "tiny_choices.jsonl").write_text(data)
    with pytest.raises(InputError, match=rf"^task tiny_choices: cannot be loaded: {why}"):
        asked(["tiny_choices"], folder)
    assert capfd.readouterr() == ("", "")


def test_a_task_that_is_no_yaml(tmp_path):
    (tmp_path / "bad.yaml").write_text("task: [")
    with pytest.raises(InputError, match=r"^task .*bad.yaml: cannot be loaded: while parsing"):
        questions([str(tmp_path / "bad.yaml")], include_defaults=False)


def test_likelihoods_that_are_very_low(tasks):
    """The harness cannot compute exp of them."""
    found = asked(["tiny_rolling", "tiny_last_word"], tasks)
    answers = [-1e6 if question.kind == ROLLING else (-1e6, False) for question in found.asked]
    values = results(found, answers, 1000)["results"]
    assert values["tiny_rolling"]["word_perplexity,none"] == values["tiny_last_word"]["perplexity,none"] == math.inf
    assert lm_eval.api.metrics.math is math


def test_nothing_is_printed_and_nothing_drawn(tasks, capfd):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    results_of(asked(list(TASKS), tasks, num_fewshot=1))
    assert capfd.readouterr() == ("", "")
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.slow
def test_the_tasks_of_the_paper_are_known():
    """Four seconds: the harness reads the configs of all its tasks."""
    names = TaskManager().all_tasks
    assert set(PAPER) <= set(names)
    # The name that stands for them is no task's.
    assert "paper" not in names


def test_standard_errors_are_drawn_without_other_processes(tasks, monkeypatch):
    """The harness forks for those of a perplexity, and torch has threads."""
    found = asked(["tiny_last_word"], tasks)
    monkeypatch.setattr("os.fork", None)
    before = dict(os.environ)
    assert results_of(found, bootstrap_iters=1000)["results"]["tiny_last_word"]["perplexity_stderr,none"] > 0
    assert dict(os.environ) == before
