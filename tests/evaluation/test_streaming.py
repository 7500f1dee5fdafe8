"""Requests that stream through a model are answered as by the whole model."""

import pytest
import torch
from helpers.families import FAMILIES, HANDING_ON, OTHERS, VOCABULARY, save_model
from helpers.requests import check_same, score_requests, some_requests
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsefw.checkpoint import inspect, read_tensors
from sparsefw.errors import InputError
from sparsefw.evaluation import scoring
from sparsefw.evaluation.answers import Budget, plan_of
from sparsefw.evaluation.room import Room
from sparsefw.evaluation.scoring import Likelihoods
from sparsefw.model import StreamedModel
from sparsefw.model import tables as model_tables
from sparsefw.model.tables import Tables

ATTENTION = {"gemma2": "eager"}


def answers_of_whole(folder, requests, attention=None):
    # Some versions of the fused attention leave out a cap on attention logits.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    answers = []
    with torch.no_grad():
        for request in requests:
            logprobs = model(torch.tensor([request.read])).logits[0, -len(request.targets) :].log_softmax(-1)
            targets = torch.tensor(request.targets)
            total = logprobs[torch.arange(len(targets)), targets].sum().item()
            answers.append((total, bool((logprobs.argmax(-1) == targets).all())))
    return answers


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, *HANDING_ON])
def test_answers_are_those_of_the_whole_model(family, tmp_path):
    save_model(tmp_path, family)
    requests = some_requests()
    with StreamedModel(inspect(tmp_path), torch.device("cpu")) as model:
        answers = score_requests(model, requests, Room())
    check_same(answers, answers_of_whole(tmp_path, requests, ATTENTION.get(family)), 1e-3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("streaming") / "llama", "llama")


@pytest.mark.parametrize("room", [Room(16), Room(64, "file"), Room(4096, "file", ahead=False)], ids=str)
def test_answers_do_not_depend_on_the_room(room, llama):
    requests = some_requests()
    with StreamedModel(inspect(llama), torch.device("cpu")) as model:
        answers, others = score_requests(model, requests, Room()), score_requests(model, requests, room)
    check_same(answers, others)


def test_the_same_bytes_in_every_run(llama):
    requests = some_requests()
    with StreamedModel(inspect(llama), torch.device("cpu")) as model:
        assert score_requests(model, requests, Room()) == score_requests(model, requests, Room())


def test_every_block_is_read_once_beside_the_trial(llama):
    read = []

    def reading(tensors, pin):
        read.extend(tensors)
        return read_tensors(tensors, pin)

    with StreamedModel(inspect(llama), torch.device("cpu"), reading) as model:
        score_requests(model, some_requests(), Room())
    counts = [read.count(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)]
    # The first block shows what all blocks of its kind allow.
    assert counts == [2, 1, 1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3", "opt"])
def test_the_head_is_cut_into_slices(family, tmp_path, monkeypatch):
    """Caps of logits and biases of the head are cut with it."""
    save_model(tmp_path, family)
    requests = some_requests()
    monkeypatch.setattr(scoring, "ROWS", 50)
    seen = []
    original = Likelihoods.add

    def add(self, first, logits, start):
        seen.append((start, logits.shape[1]))
        original(self, first, logits, start)

    with StreamedModel(inspect(tmp_path), torch.device("cpu")) as model:
        whole = score_requests(model, requests, Room())
        monkeypatch.setattr(Likelihoods, "add", add)
        monkeypatch.setattr(scoring, "slice_rows", lambda model, tables: 50)
        cut = score_requests(model, requests, Room())
    assert sorted({start for start, _ in seen}) == [0, 50, 100, 150, 200, 250]
    assert {size for _, size in seen} == {50, 8}
    check_same(whole, cut)


def test_a_head_whose_logits_need_the_whole_vocabulary_is_not_cut(llama, monkeypatch):
    """Such as a model that masks certain tokens."""
    requests = some_requests()

    def forward(self, hidden):
        out = torch.nn.functional.linear(hidden, self.weight, self.bias)
        out[..., 7] = -100.0
        return out

    with StreamedModel(inspect(llama), torch.device("cpu")) as model:
        monkeypatch.setattr(type(model.model.lm_head), "forward", forward)
        whole = score_requests(model, requests, Room())
        monkeypatch.setattr(scoring, "slice_rows", lambda model, tables: 50)
        check_same(score_requests(model, requests, Room()), whole)


def test_only_embeddings_that_are_read_are_loaded(llama, monkeypatch):
    read, read_rows = [], model_tables.read_rows

    def noting(name, info, ranges):
        read.extend(ranges)
        return read_rows(name, info, ranges)

    with StreamedModel(inspect(llama), torch.device("cpu")) as model:
        tables = Tables(model)
        assert tables.found
        embed = model.model.get_input_embeddings()
        with model.outside():
            whole = embed.weight.clone()
        monkeypatch.setattr(model_tables, "read_rows", noting)
        with tables.embeddings({3, 4, 200}):
            assert embed.weight.shape[0] == VOCABULARY
            assert torch.equal(embed(torch.tensor([4, 200])), whole[[4, 200]])
        assert read == [range(3, 5), range(200, 201)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_other_embeddings_are_read_before_the_first_block(dtype, tmp_path, monkeypatch):
    """Neither by what tries blocks, nor by what loads them, nor by what expects the memory."""
    save_model(tmp_path, "llama", dtype, vocab_size=5000)
    read, read_rows = [], model_tables.read_rows

    def noting(name, info, ranges):
        read.extend(ranges)
        return read_rows(name, info, ranges)

    monkeypatch.setattr(model_tables, "read_rows", noting)
    plan_of(tmp_path, some_requests(), Budget(), lambda line: None)
    assert sum(map(len, read)) <= VOCABULARY
    assert max(rows.stop for rows in read) <= VOCABULARY


def test_embeddings_are_read_in_pieces(llama, monkeypatch):
    """Beside the table there is no room for another one."""
    monkeypatch.setattr(model_tables, "PIECE", 4 * 32 * 100)
    read, read_rows = [], model_tables.read_rows
    monkeypatch.setattr(model_tables, "read_rows", lambda *args: read.extend(args[2]) or read_rows(*args))
    with StreamedModel(inspect(llama), torch.device("cpu")) as model:
        embed = model.model.get_input_embeddings()
        with model.outside():
            whole = embed.weight.clone()
        with Tables(model).embeddings(range(VOCABULARY)):
            assert torch.equal(embed.weight, whole)
    assert [len(rows) for rows in read] == [100, 100, 58]


@pytest.mark.parametrize(
    ("look", "rows"),
    [
        (lambda embed: embed(torch.tensor([3, 100])), [3, 100]),
        (lambda embed: embed.weight[[5, 6]], [5, 6]),
        (lambda embed: embed.weight.data[[7]], [7]),
    ],
)
def test_embeddings_of_other_tokens_are_read_when_they_are_looked_up(look, rows, llama):
    """Such as those of a prompt that a model has of its own."""
    with StreamedModel(inspect(llama), torch.device("cpu")) as model:
        embed = model.model.get_input_embeddings()
        with model.outside():
            whole = embed.weight.clone()
        with Tables(model).embeddings({3}):
            assert torch.equal(look(embed), whole[rows])


def test_embeddings_that_are_read_behind_the_last_block(tmp_path):
    """Hidden states alone do not tell what lies there."""
    save_model(tmp_path, "inkling2_text", n_layers_per_attn_res_block=8)
    requests = some_requests()
    with StreamedModel(inspect(tmp_path), torch.device("cpu")) as model:
        assert model.flow.batch_behind
        assert model.flow.by_window
        answers = score_requests(model, requests, Room())
    check_same(answers, answers_of_whole(tmp_path, requests), 1e-3)


def test_nan_in_a_row_of_the_vocabulary_is_refused(tmp_path):
    save_model(tmp_path, "qwen3")
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors.keys() & {"lm_head.weight"}:
            tensors[name][100, 3] = float("nan")
        save_file(tensors, path, {"format": "pt"})
    with StreamedModel(inspect(tmp_path), torch.device("cpu")) as model, pytest.raises(InputError, match="lm_head"):
        score_requests(model, some_requests(), Room())
