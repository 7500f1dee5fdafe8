"""Log-likelihoods and metrics against those of the harness's own model, for families of every kind."""

import lm_eval
import pytest
from helpers.families import save_model
from helpers.tasks import TASKS
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from sparsefw import checkpoint
from sparsefw.data import load_tokenizer
from sparsefw.evaluation import questions, results
from sparsefw.evaluation.answers import Budget, scores_of
from sparsefw.evaluation.encoding import encoder
from sparsefw.model import read_config

# Plain, with softcaps, a mixture, a hybrid, learned positions, and sliding windows.
FAMILIES = ["llama", "gemma2", "qwen3_moe", "qwen3_next", "gpt2", "mistral"]
# Metrics that count documents. The others are of the log-likelihoods themselves.
COUNTS = ("acc", "acc_norm", "acc_mutual_info")


def of_harness(folder, tasks, batch_size):
    """The results of `lm_eval` for a checkpoint."""
    # By its formula: older versions of transformers leave softcaps out otherwise.
    model = HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size, attn_implementation="eager")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=100)


def responses(found):
    """All answers, in the order of the tasks, documents and requests: a number, and whether it is greedy."""
    kinds = {name: config["output_type"] for name, config in found["configs"].items()}
    for name in TASKS:
        for sample in found["samples"][name]:
            for (answer,) in sample["resps"]:
                yield (name, (answer, False)) if kinds[name] == "loglikelihood_rolling" else (name, answer)


def metrics(found, counts):
    """The metrics that count documents, or the others, with their standard errors."""
    return {
        (name, metric): value
        for name, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, float) and metric.partition(",")[0].removesuffix("_stderr") in COUNTS is counts
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_metrics_are_those_of_the_harness(family, tmp_path, tasks):
    folder = save_model(tmp_path / "model", family)
    expected = of_harness(folder, tasks, batch_size=3)
    asked = questions(list(TASKS), include_path=tasks, include_defaults=False)
    encoded = encoder(load_tokenizer(folder), read_config(checkpoint.inspect(folder))).encode(asked.asked)
    found = results(asked, encoded.answers(scores_of(folder, encoded.requests, Budget())), bootstrap_iters=100)
    assert len(list(responses(expected))) == 98
    for (name, mine), (_, theirs) in zip(responses(found), responses(expected), strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3, rel=1e-6), name
        assert mine[1] == theirs[1], name
    assert metrics(found, counts=True) == metrics(expected, counts=True)
    assert metrics(found, counts=False) == pytest.approx(metrics(expected, counts=False), rel=1e-4)
