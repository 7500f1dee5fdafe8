"""Calibration text that the dense model writes itself: the same bytes again, as documents and as answers."""

import json
from functools import partial

import pytest
import torch
from helpers.checkpoints import refused
from helpers.commands import interrupted_at, killed_at, report_of, tensors_of
from helpers.tensors import assert_equal
from helpers.texts import BOS, make_tokenizer
from helpers.whole import streamed
from transformers import AutoModelForCausalLM

import sparsefw.plan
from sparsefw import prune
from sparsefw.data.text import OWN_TEXT
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import windows_of
from sparsefw.driver import generation
from sparsefw.driver.generation import write_tokens
from sparsefw.inputs import DEFAULT_MODEL, Inputs
from sparsefw.run import main

FLAGS = ["--nsamples", "4", "--seqlen", "24", "--eval-windows", "2", "--method", "wanda"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def run(output, *more, dataset=("self",)):
    return main([*FLAGS, *(x for name in dataset for x in ("--dataset", name)), "--output", str(output), *more])


def own(output):
    """The bytes of the text, and its windows."""
    content = (output / OWN_TEXT).read_bytes()
    return content, torch.tensor([json.loads(line)["input_ids"] for line in content.splitlines()])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "out"
    assert run(folder) == 0
    return folder


def test_the_same_seed_writes_the_same_bytes(written, tmp_path):
    content, ids = own(written)
    # A model in memory writes the same, and stays as it is.
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL)
    config = model.generation_config
    options = dict(nsamples=4, seqlen=24, method="wanda", progress=False)
    report = prune(model, tmp_path / "again", dataset="self", **options).report
    assert own(tmp_path / "again")[0] == content
    assert model.generation_config is config
    # Documents begin with the token that the model knows as the end of one.
    assert ids[:, 0].tolist() == 4 * [0]
    assert report.data.source == report_of(written)["data"]["source"] == "self (T=0.8, top_p=0.95, seed 0)"
    assert windows_of(ids, "").hash == report.data.hash == report_of(written)["data"]["hash"]


def test_a_share_of_a_mixture_by_another_seed(written, out, capsys):
    assert run(out, "--seed", "1", dataset=("self=3", "default")) == 0
    # The line is wrapped.
    said = " ".join(capsys.readouterr().out.split())
    assert "windows of 24 tokens of self (T=" in said
    assert "seed 1) (3) + default, training text (1)" in said
    ids, other = own(written)[1], own(out)[1]
    assert not any((row == ids).all(1).any() for row in other)


def test_a_killed_run_is_resumed_with_its_text(written, out, monkeypatch, capsys):
    killed_at(16, lambda: run(out))
    # It is read.
    monkeypatch.setattr(generation, "write_tokens", None)
    assert run(out, dataset=(f"self={__file__}",)) == 2
    assert "the text that the model writes" in capsys.readouterr().err
    assert run(out) == 0
    assert "resuming an unfinished run" in capsys.readouterr().out
    assert_equal(tensors_of(written), tensors_of(out))
    assert own(out)[0] == own(written)[0]


def test_a_resumed_run_refuses_other_prompts(tmp_path, out, capsys):
    prompts = tmp_path / "asked.jsonl"
    asked = {"dataset": (f"self={prompts}",)}
    prompts.write_text('{"text": "Which"}\n')
    with interrupted_at(16):
        assert run(out, **asked) == 130
    prompts.write_text('{"text": "Why"}\n')
    assert run(out, **asked) == 2
    assert "its prompts" in capsys.readouterr().err


def test_prompts_are_answered(tmp_path):
    tokenizer, file = load_tokenizer(DEFAULT_MODEL), tmp_path / "prompts.jsonl"
    tokenizer.chat_template, asked = TEMPLATE, "<|user|>One<|end|><|assistant|>"
    file.write_text('{"messages": [{"role": "user", "content": "One"}]}\n{"text": "Two"}\n')
    with streamed(DEFAULT_MODEL) as model:
        write = partial(write_tokens, model, tokenizer, 2, 40, 0, say=print, name=f"self={file}")
        # The sixth token of the second window, which the model has written, ends a turn.
        model.model.generation_config.eos_token_id = [int(write(2)[1, 5])]
        ids, others = map(write, (2, 1))
        file.write_text('"0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4"')
        with refused("prompts.jsonl: no prompts"):
            write(2)
    assert torch.equal(ids, others)
    first, second = map(tokenizer.decode, ids)
    assert first.startswith(asked)
    assert second.startswith("Two")
    # After an answer the next prompt follows.
    assert asked in second


def test_prompts_begin_with_the_start_token(tmp_path):
    file, lines = tmp_path / "prompts.jsonl", []
    file.write_text('"a"\n"<s>b"\n"abcd"\n""')
    a, b = (make_tokenizer(bos=False).encode(x)[0] for x in "ab")
    assert generation._prompts(make_tokenizer(bos=True), str(file), 9, 5, lines.append) == [[BOS, a], [BOS, b]]
    assert lines == [f"note: {file}: left out 1 prompt of 5 tokens or more"]


def test_a_text_in_the_output_of_a_model_in_memory_stays(written):
    with refused("would be deleted with it"):
        prune(
            AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL),
            written,
            dataset=str(written / OWN_TEXT),
            overwrite=True,
        )


def test_no_text_is_given_twice():
    for twice in ("self=a.jsonl", "self"), ("a.txt", "./a.txt"):
        with refused(f"{twice[1]}.*given twice"):
            Inputs(model="m", dataset=twice)


def test_tokens_are_drawn_from_the_nucleus(monkeypatch):
    monkeypatch.setattr(generation, "TEMPERATURE", 0.5)
    monkeypatch.setattr(generation, "TOP_P", 0.9)
    draws = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = generation._Sampler([generation._document(0) for _ in draws], draws)
    for row in sampler._rows:
        next(row)
    # Their squares are in the ratio 1/4 : 8 : 4 : 1, so that the first two are 0.91 of all.
    scores = torch.tensor([0.5, 8**0.5, 2.0, 1.0]).log().expand(2000, -1)
    chosen = sampler(torch.zeros(2000, 1), scores).argmax(1).bincount(minlength=4)
    assert chosen[[0, 3]].sum() == 0
    assert chosen[1] / chosen[2] == pytest.approx(2, rel=0.1)


def test_a_model_that_does_not_fit_is_refused(out, monkeypatch, capsys):
    monkeypatch.setattr("sparsefw.estimate.memory.BYTES_OF_SAMPLING", 2**32)
    assert sparsefw.plan.main([*FLAGS, "--dataset", "self", "--host-memory", "2"]) == 2
    assert run(out, "--host-memory", "2") == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("sparsefw: --host-memory 2.0: this run needs at least ")
        assert "; give more, or another text than --dataset self" in line
