"""The embedded model is small, loads, and predicts evaluation text."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsefw.default import text, train

MAX_BYTES = 6_000_000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(train.MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(train.MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def evaluation(tokenizer):
    return train.windows(train.encode(tokenizer, text.evaluation_text()), train.EVAL_SEQLEN)


def keys(content: str) -> list[str]:
    return [text.paragraph_key(paragraph) for paragraph in text.split_paragraphs(content)]


def topics_of(monkeypatch, topics: dict[str, str]) -> None:
    monkeypatch.setattr("pydoc_data.topics.topics", topics)
    monkeypatch.setattr(text, "MIN_TRAINING_CHARS", 1)
    monkeypatch.setattr(text, "MIN_EVALUATION_CHARS", 1)


def test_text_is_deterministic():
    assert text.training_text() == text.training_text()
    assert text.evaluation_text() == text.evaluation_text()


def test_no_paragraph_twice_and_none_in_both():
    training, evaluation = keys(text.training_text()), keys(text.evaluation_text())
    assert len(set(training)) == len(training)
    assert len(set(evaluation)) == len(evaluation)
    assert not set(training) & set(evaluation)


def test_evaluation_text_is_a_tenth():
    training, evaluation = len(text.training_text()), len(text.evaluation_text())
    assert 0.08 < evaluation / (training + evaluation) < 0.12


def test_split_is_by_name_and_paragraph(monkeypatch):
    topics = {
        "with": "Held out.\n\nSee [1].\n",
        "zebra": "Last.\n\n   Held\n   out.\n \t\nSee [2].\n",
        "compound": "First.\n\nLast.\n\n   code\n",
    }
    topics_of(monkeypatch, topics)
    assert text.evaluation_text() == "Held out.\n\nSee [1].\n"
    assert text.training_text() == "First.\n\nLast.\n\n   code\n"


def test_too_little_text_is_an_error(monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {"with": "Held out.", "compound": "First."})
    with pytest.raises(RuntimeError, match="10 characters of held-out text, expected at least 20000"):
        text.evaluation_text()
    monkeypatch.setattr(text, "MIN_EVALUATION_CHARS", 1)
    with pytest.raises(RuntimeError, match="7 characters of training text, expected at least 200000"):
        text.training_text()


def test_size_and_names():
    files = {path.name: path for path in train.MODEL.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in files.values()) <= MAX_BYTES
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        content = json.loads(files[name].read_text())
        assert not [value for value in content.values() if isinstance(value, str) and "/" in value]
        assert "_name_or_path" not in content


def test_loads_as_shipped(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(train.MODEL, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings >= train.EVAL_SEQLEN


def test_tokenizer_writes_any_text(tokenizer):
    sample = "def f(x):\n\treturn  'é ± 語'\n\n"
    assert tokenizer.decode(train.encode(tokenizer, sample)) == sample
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_has_learned_the_evaluation_text(model, tokenizer, evaluation):
    ids = train.encode(tokenizer, text.training_text())
    unigram = train.unigram_perplexity(ids, evaluation, len(tokenizer))
    # 375 against 26.9 on the text of CPython 3.11, which it was trained on; 378 against 27.6 on that of 3.13.
    assert train.perplexity(model, evaluation) < unigram / 10


def test_pruning_hurts(evaluation):
    model = AutoModelForCausalLM.from_pretrained(train.MODEL, dtype=torch.float32)
    rows = evaluation[::3]
    dense = train.perplexity(model, rows)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            removed = weight.abs().topk(int(0.6 * weight.shape[1]), dim=1, largest=False).indices
            weight.scatter_(1, removed, 0.0)
    # 1.9 times, by magnitude; a model with weights to spare would tell nothing about a method.
    assert train.perplexity(model, rows) > 1.5 * dense


def test_splits_tokens_without_overlap():
    ids = torch.arange(10_007)
    fit, validation = train.split(ids)
    assert not set(fit.tolist()) & set(validation.flatten().tolist())
    assert 0.9 < len(fit) / len(ids) < 0.96
