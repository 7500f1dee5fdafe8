"""Requests and windows that stream through a model are answered as by the whole model."""

import re

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import TOKENS, VOCABULARY, first_is_fast, save_model
from helpers.ranks import on_ranks
from helpers.requests import REQUESTS, answers, answers_of_whole, check_same
from safetensors.torch import load_file, save_file

from sparsefw.checkpoint.source import inspect
from sparsefw.data.windows import windows_of
from sparsefw.extras.evaluation import streaming
from sparsefw.extras.evaluation.batching import request_of
from sparsefw.extras.evaluation.streaming import scores_of, window_losses_of
from sparsefw.model.streamed import StreamedModel

# Rows of the drawn requests.
TREES, ALONE = 5, 15
# Families that take no trees: with position biases, recurrent layers, several streams, or local attention. Others of
# them are in test_harness.py, or below.
NO_TREES = [
    "bloom",
    "mamba",
    "rwkv",
    "openai-gpt",
    "xlnet",
    "gemma3n_text",
    "gemma3_text",
    "gemma4_text",
    "inkling2_text",
]
TAKE_TREES = ["llama", "opt", "qwen3_moe", "gpt2", "gptj", "glm_moe_dsa"]
# With few heads, scores of the index are often zero, and torch may take any of those that are equal.
CHANGES = {"glm_moe_dsa": {"index_n_heads": 32}}
WINDOWS = windows_of(TOKENS[:5], "drawn")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("answers") / "llama", "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def expected(llama):
    return answers(llama)[0]


FP32 = [(family, torch.float32) for family in TAKE_TREES + NO_TREES]


@pytest.mark.parametrize(("family", "dtype"), first_is_fast([*FP32, ("qwen3_moe", torch.bfloat16)]))
def test_answers_are_those_of_the_whole_model(family, dtype, tmp_path):
    save_model(tmp_path, family, dtype, **CHANGES.get(family, {}))
    found, rows = answers(tmp_path)
    assert rows == (ALONE if family in NO_TREES else TREES)
    expected = answers_of_whole(tmp_path, dtype=dtype)
    if dtype == torch.float32:
        check_same(found, expected)
    else:
        assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=0.1)


def test_attention_that_is_local_by_places_in_a_row_is_found(tmp_path):
    """The mask of a tree takes the place of the model's own, which knows of the window."""
    kinds = [[["global", "local", "global"], 1]]
    neo = {"model_type": "gpt_neo", "attention_types": kinds, "num_layers": 3, "num_heads": 4, "window_size": 16}
    # The trees have more than 64 tokens.
    save_model(tmp_path, "qwen3", **neo, max_position_embeddings=256)
    found, rows = answers(tmp_path)
    assert rows == ALONE
    check_same(found, answers_of_whole(tmp_path))


def test_attention_that_is_local_by_positions_is_found(tmp_path):
    """Requests of the largest tree are shorter than the window, and those of another tree are longer."""
    save_model(tmp_path, "mistral", sliding_window=30)
    requests = [request_of(range(2, 42), [n, n], 64) for n in (50, 51)]
    requests += [request_of([*range(100, 112), *[n] * 12], [n], 64) for n in (120, 121, 122)]
    found, rows = answers(tmp_path, requests)
    assert rows == len(requests)
    check_same(found, answers_of_whole(tmp_path, requests))


@pytest.mark.parametrize(("family", "expected"), [("llama", [0, 1, 2]), ("rwkv", [0, 0, 1, 2])])
def test_blocks_are_read_once_and_recurrent_layers_cost_one_more(family, expected, tmp_path, monkeypatch):
    save_model(tmp_path, family)
    opened, open_block = [], StreamedModel.open
    monkeypatch.setattr(StreamedModel, "open", lambda self, i, ahead: opened.append(i) or open_block(self, i, ahead))
    answers(tmp_path)
    assert opened == expected


@pytest.mark.parametrize("changes", first_is_fast([{"place": "file", "ahead": False}, {"batch": 1}]))
def test_answers_do_not_depend_on_the_placement(changes, llama, expected, monkeypatch):
    place = streaming.place
    monkeypatch.setattr(streaming, "place", lambda *args, fixed: place(*args, fixed=fixed | changes))
    check_same(answers(llama)[0], expected, 1e-4)


@pytest.mark.parametrize(("size", "products"), [(streaming.LOGIT_BYTES, 5), (4 * VOCABULARY * 7, 14)])
def test_predictions_of_requests_share_products_with_the_head(size, products, llama, expected, monkeypatch):
    """Each product reads the whole head: as few as the bytes allow, and requests may be cut between two."""
    made, logits = [], streaming.logits
    monkeypatch.setattr(streaming, "logits", lambda *args: made.append(args) or logits(*args))
    monkeypatch.setattr(streaming, "LOGIT_BYTES", size)
    check_same(answers(llama)[0], expected)
    assert len(made) == products


def test_a_limit_that_is_too_low_names_one_that_is_enough(llama, expected):
    with refused(r"host_memory=0.01: this run needs at least ([\d.]+) GiB") as error:
        answers(llama, host_memory=0.01)
    enough = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
    # The process grows from run to run.
    check_same(answers(llama, host_memory=enough + 0.05)[0], expected, 1e-4)


def test_as_many_tokens_as_a_model_has_positions(tmp_path):
    """A row that was padded would need a position that is not there."""
    save_model(tmp_path, "gpt2", n_positions=37, max_position_embeddings=None)
    requests = [request_of([*range(2, 34), n], [5, 6, 7, 8, 9], 37) for n in range(40, 44)]
    check_same(answers(tmp_path, requests)[0], answers_of_whole(tmp_path, requests))


def test_a_target_that_the_model_does_not_know_is_refused(llama):
    """No row of the head has it, so nothing else would say so."""
    with refused(r"^token 258: the model embeds 258 tokens; give tokens of the model's own"):
        answers(llama, [request_of([5, 6], [258], 64)])


def test_logits_that_overflow_are_refused(tmp_path):
    """Without a word, comparisons of NaN would choose among the answers."""
    save_model(tmp_path, "llama")
    (shard,) = [path for path in tmp_path.glob("*.safetensors") if "model.norm.weight" in load_file(path)]
    save_file(load_file(shard) | {"model.norm.weight": torch.full((32,), 3e38)}, shard, {"format": "pt"})
    with refused(r"the log-likelihoods of \d+ of 16 requests are NaN"):
        answers(tmp_path)
    with refused(r"the log-likelihoods of \d+ of 5 windows are NaN"):
        window_losses_of(inspect(tmp_path), WINDOWS)


@pytest.mark.parametrize("count", first_is_fast([len(REQUESTS), 1]), ids=["many", "fewer than ranks"])
def test_ranks_share_the_work(count, llama):
    windows = WINDOWS.shard(slice(count))
    for scores, losses in on_ranks(2, found_on, llama, REQUESTS[:count], windows):
        check_same(scores, answers(llama, REQUESTS[:count])[0], 1e-4)
        assert losses == pytest.approx(window_losses_of(inspect(llama), windows), rel=1e-5)


def found_on(ranks, folder, requests, windows):
    return scores_of(inspect(folder), requests, ranks), window_losses_of(inspect(folder), windows, ranks)
