"""The streamed model as a model of lm-evaluation-harness."""

import functools
import sys

import lm_eval
import lm_eval.tasks
import pytest
import torch
from helpers.families import byte_tokenizer, save_model
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

import sparsefw.lm_eval as command
from sparsefw import evaluation
from sparsefw.errors import InputError
from sparsefw.evaluation import StreamedLM, language_model
from sparsefw.inputs import DEFAULT_MODEL

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ message['role'][0] }}]{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with a chat template that knows no system."""
    folder = save_model(tmp_path_factory.mktemp("model"), "llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def answers(found, name):
    return [answer for sample in found["samples"][name] for (answer,) in sample["resps"]]


def evaluated(lm, names, manager, **options):
    return lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def hf(folder):
    return HFLM(str(folder), device="cpu", dtype="float32")


def test_the_harness_finds_it_by_its_name(model, manager):
    """As `lm_eval --model sparsefw --model_args pretrained=...,max_length=48` does, with what the harness adds."""
    names = ["tiny_choices", "tiny_rolling"]
    options = {"model_args": f"pretrained={model},max_length=48,add_bos_token=false,host_memory=4.5"}
    found = evaluated("sparsefw", names, manager, batch_size="auto", max_batch_size=8, device="cpu", **options)
    theirs = HFLM(str(model), device="cpu", dtype="float32", max_length=48, add_bos_token=False)
    expected = evaluated(theirs, names, manager)
    assert found["results"]["tiny_choices"] == expected["results"]["tiny_choices"]
    assert answers(found, "tiny_rolling") == pytest.approx(answers(expected, "tiny_rolling"), abs=1e-3, rel=1e-6)
    assert found["config"]["model_num_parameters"] == theirs.get_model_info()["model_num_parameters"]
    assert get_model("sparsefw") is StreamedLM


def test_the_embedded_model_has_its_name():
    assert StreamedLM("default").checkpoint.folder == DEFAULT_MODEL
    assert StreamedLM(DEFAULT_MODEL, tokenizer="default").tokenizer.name_or_path == str(DEFAULT_MODEL)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_template(system, model, manager):
    options = {"apply_chat_template": True, "num_fewshot": 1, "system_instruction": system}
    found = evaluated(StreamedLM(model), ["tiny_choices"], manager, **options)
    expected = evaluated(hf(model), ["tiny_choices"], manager, **options)
    samples = found["samples"]["tiny_choices"], expected["samples"]["tiny_choices"]
    arguments = [[sample["arguments"] for sample in part] for part in samples]
    assert arguments[0] == arguments[1]
    prompt = arguments[0][0][0][0]
    assert (prompt[:3], prompt[-3:]) == ("[u]", "[a]")
    assert found["results"] == expected["results"]
    assert StreamedLM(model).chat_template(True) == TEMPLATE
    assert StreamedLM(model).tokenizer_name == hf(model).tokenizer_name


def test_a_model_without_a_chat_template_says_so(model):
    lm = StreamedLM(model, tokenizer=byte_tokenizer())
    with pytest.raises(InputError, match=r"no chat template that fits"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])


def test_the_most_likely_token_is_found(model):
    lm = StreamedLM(model)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([lm.tok_encode("a heron")])).logits[0, -1]
    best = lm.tokenizer.decode(logits.argsort(descending=True)[:30])
    # Only some tokens are texts by themselves.
    texts = [text for text in best if text.isascii() and text.isprintable() and not text.isspace()]
    asked = [Instance("loglikelihood", {}, ("a heron", text), 0, metadata=("t", 0, 1)) for text in texts]
    found = lm.loglikelihood(asked, disable_tqdm=True)
    expected = hf(model).loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [number for number, _ in found] == pytest.approx([number for number, _ in expected], abs=1e-4)


def test_tokens_can_be_given(model):
    """A method of the harness that its own classes call."""
    requests = [(("a", "b"), [5, 6], [7, 8]), (("a", "c"), [5], [9])]
    lm = StreamedLM(model)
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = hf(model)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [number for number, _ in found] == pytest.approx([number for number, _ in expected], abs=1e-4)


def test_answers_are_kept_in_the_harness_cache(model, manager, tmp_path, monkeypatch):
    names, options = ["tiny_choices", "tiny_rolling"], {"use_cache": str(tmp_path / "answers")}
    first = evaluated(StreamedLM(model), names, manager, **options)
    monkeypatch.setattr(language_model, "scores_of", lambda *_, **__: pytest.fail("asked again"))
    assert evaluated(StreamedLM(model), names, manager, **options)["results"] == first["results"]


def test_text_is_not_generated(model):
    asked = Instance("generate_until", {}, ("a", {}), 0, metadata=("gsm8k", 0, 1))
    with pytest.raises(InputError, match=r"^task gsm8k: generates text, and sparsefw only computes likelihoods"):
        StreamedLM(model).generate_until([asked])


def test_a_tokenizer_of_another_folder(model, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    assert StreamedLM(model, tokenizer=tmp_path).tokenizer.chat_template is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaForCausalLM"}')
    with pytest.raises(InputError, match=r"is not the name of a tokenizer"):
        StreamedLM(model, tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "^dtype: no argument of sparsefw; it takes pretrained, tokenizer, max_length"),
        ({"trust_remote_code": True}, "^trust_remote_code: no argument"),
        ({"max_length": "many"}, "^max_length many: expected a number, at least 1"),
        ({"max_length": 0}, "^max_length 0: expected"),
        ({"max_length": 1.5}, "^max_length 1.5: expected"),
        ({"gpu_memory": -1}, "^gpu_memory -1: expected"),
        ({"gpu_memory": "nan"}, "^gpu_memory nan: expected"),
        ({"prefix_token_id": 10**6}, "no token 1000000"),
        ({"add_bos_token": "maybe"}, "^add_bos_token maybe: expected true or false"),
        ({"add_bos_token": 1}, "^add_bos_token 1: expected true or false"),
        ({"batch_size": "some"}, "^batch_size some: expected"),
        ({"max_batch_size": 0}, "^max_batch_size 0: expected"),
        ({"device": "mps"}, "^device mps: "),
        ({"pretrained": None}, "^pretrained: the checkpoint is left out"),
        ({"pretrained": None, "pretrain": "x"}, "^pretrain: no argument"),
        ({"pretrained": torch.nn.Linear(2, 2)}, "^pretrained: expected a folder or a Hub id, got Linear"),
        ({"tokenizer": 5}, "^tokenizer: expected "),
    ],
    ids=str,
)
def test_arguments_that_are_wrong_are_refused(options, message, model):
    with pytest.raises(InputError, match=message):
        StreamedLM(**{"pretrained": model, **options})


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": "auto:4"}, {"device": "auto"}, {"device": "cuda:0"}], ids=str
)
def test_arguments_that_change_nothing_are_taken(options, model):
    assert StreamedLM(model, **options).max_length == 64


def test_without_the_harness_one_line_says_so(monkeypatch):
    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^lm-evaluation-harness is not installed; pip install -e '.\[eval\]'"):
        evaluation.StreamedLM  # noqa: B018
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        evaluation.nothing  # noqa: B018


def test_the_harness_command_knows_the_model(model, tasks, monkeypatch, capsys):
    """The harness's own tasks are left out: to read their configs takes seconds."""
    own = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", own)
    flags = ["lm_eval", "--model", "sparsefw", "--include_path", str(tasks), "--tasks", "tiny_choices", "--model_args"]
    monkeypatch.setattr(sys, "argv", [*flags, f"pretrained={model}"])
    assert command.main() == 0
    assert "|tiny_choices|" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*flags, f"pretrained={model},dtype=float16"])
    assert command.main() == 2
    assert "sparsefw: dtype: no argument of sparsefw; it takes" in capsys.readouterr().err
