"""The streamed model in lm-evaluation-harness, against the harness's own model; and what is refused."""

import functools
import sys

import lm_eval
import lm_eval.tasks
import numpy as np
import pytest
from helpers.checkpoints import refused
from helpers.families import byte_tokenizer, first_is_fast, save_model
from helpers.tasks import TASKS, write_task
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

import sparsefw.lm_eval as command
from sparsefw.extras.evaluation import harness
from sparsefw.extras.evaluation.harness import StreamedLM

TEMPLATE = "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}{% endfor %}[a]"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with a chat template."""
    folder = save_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def hf(folder, **options):
    # By its formula: older versions of transformers leave softcaps out otherwise.
    return HFLM(str(folder), device="cpu", dtype="float32", attn_implementation="eager", **options)


def evaluated(lm, names, manager, **options):
    return lm_eval.simple_evaluate(lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)


def check_same(found, expected):
    for task, samples in expected["samples"].items():
        for mine, theirs in zip(found["samples"][task], samples, strict=True):
            # Log-likelihoods, and whether answers are greedy.
            assert np.ravel(mine["resps"]) == pytest.approx(np.ravel(theirs["resps"]), abs=1e-3, rel=1e-6)
    for task, metrics in expected["results"].items():
        for metric, value in metrics.items():
            assert found["results"][task][metric] == (
                value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            )


# Plain, with softcaps, a hybrid, and with a table of positions.
@pytest.mark.parametrize("family", first_is_fast(["llama", "gemma2", "qwen3_next", "gpt2"]))
def test_answers_and_metrics_are_those_of_the_harness(family, tmp_path, manager):
    folder = save_model(tmp_path / "model", family)
    found = evaluated(StreamedLM(folder), TASKS, manager)
    check_same(found, evaluated(hf(folder, batch_size=3), TASKS, manager))


def test_chat_template(model, manager):
    options = {"apply_chat_template": True, "num_fewshot": 1, "system_instruction": "Be brief."}
    found = evaluated(StreamedLM(model), ["tiny_choices"], manager, **options)
    expected = evaluated(hf(model), ["tiny_choices"], manager, **options)
    prompts = [[of["arguments"] for of in results["samples"]["tiny_choices"]] for results in (found, expected)]
    assert prompts[0] == prompts[1]
    check_same(found, expected)
    lm = StreamedLM(model)
    assert lm.tokenizer_name == hf(model).tokenizer_name
    lm.tokenizer.chat_template = "{{ raise_exception('no system prompt') }}"
    with refused("the chat template fails.*: no system prompt"):
        lm.apply_chat_template([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize("add_bos_token", [None, False])
def test_special_tokens_are_those_of_the_harness(add_bos_token, tmp_path):
    folder, tokenizer = save_model(tmp_path, "llama"), byte_tokenizer()
    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    mine, theirs = (of(folder, add_bos_token=add_bos_token) for of in (StreamedLM, hf))
    assert (mine.prefix_token_id, mine.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    for text in ("a heron", f"{start}a heron", ""):
        for special in (None, True, False):
            assert mine.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(text, special)


def test_text_is_not_generated(model, tmp_path):
    config, documents = TASKS["tiny_last_word"]
    write_task(tmp_path, "writes", config | {"output_type": "generate_until", "metric_list": []}, documents)
    with refused(r"^task writes: generates text, and only likelihoods are computed here"):
        harness.Tasks(["writes"], tmp_path).results(StreamedLM(model), None, None)


def test_an_answer_that_the_model_cannot_read_is_refused(model):
    lm = StreamedLM(model, max_length=4)
    for answer in ("", "bcdef"):
        asked = Instance("loglikelihood", {}, ("a", answer), 0, metadata=("task", 0, 1))
        with refused(rf"^an answer of {len(answer)} tokens, '{answer}': the model predicts"):
            lm.loglikelihood([asked], disable_tqdm=True)


def test_a_task_that_fails_is_one_line(model, tmp_path, monkeypatch):
    """The message must blame the model, since nobody would look for its mistake in a task."""
    config, documents = TASKS["tiny_choices"]
    write_task(tmp_path, "sound", config, documents)
    write_task(tmp_path, "broken", config | {"doc_to_text": "{{ 1 / 0 }}"}, documents)
    with refused(r"^tasks='broken': the harness cannot evaluate them: ZeroDivisionError"):
        harness.Tasks(["broken"], tmp_path).results(StreamedLM(model), None, None)
    monkeypatch.setattr(harness, "scores_of", None)
    with pytest.raises(TypeError, match="not callable"):
        harness.Tasks(["sound"], tmp_path).results(StreamedLM(model), None, None)


def test_names_of_tasks(tasks):
    found = harness.Tasks(["tiny_*ing", "tiny_group", "tiny_tag", f"{tasks}/tiny_long.yaml", "tiny_group"], tasks)
    assert found.names == ["tiny_rolling", "tiny_group", "tiny_tag", f"{tasks}/tiny_long.yaml"]
    # The harness's own tasks are not known here.
    with refused(r"^task 'boolq': unknown"):
        harness.Tasks(["paper"], tasks)


def test_the_harness_command_knows_the_model(model, tasks, monkeypatch, capsys):
    """The harness's own tasks are left out: to read their configs takes seconds."""
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    flags = ["lm_eval", "--model", "sparsefw", "--include_path", str(tasks), "--tasks", "tiny_choices", "--model_args"]
    monkeypatch.setattr(sys, "argv", [*flags, f"pretrained={model}"])
    assert command.main() == 0
    assert "|tiny_choices|" in capsys.readouterr().out
    for of_model, message in (
        ("max_length=64", "pretrained: no model is named; give one"),
        (f"pretrained={model},dtype=bfloat16", "dtype: no argument of the model; give pretrained, max_length or a "),
        (f"pretrained={model},max_length=long", "max_length='long': expected a whole number"),
    ):
        monkeypatch.setattr(sys, "argv", [*flags, of_model])
        assert command.main() == 2
        assert f"\nsparsefw: {message}" in f"\n{capsys.readouterr().err}"
