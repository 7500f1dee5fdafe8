"""Requests that stream through a model are answered as by the whole model."""

import re

import pytest
import torch
from helpers.families import FAMILIES, HANDING_ON, OTHERS, first_is_fast, save_model
from helpers.ranks import on_ranks
from helpers.requests import REQUESTS, answers, answers_of_whole, check_same
from safetensors.torch import load_file, save_file

from sparsefw.checkpoint.source import inspect
from sparsefw.errors import InputError
from sparsefw.extras.evaluation import streaming
from sparsefw.extras.evaluation.rows import Sharing, request_of, rows_of
from sparsefw.model import StreamedModel

ALONE, CHAINS, TREES = "nothing", "beginnings", "branches"
# Rows of families that take no trees hold position biases, states of recurrent layers, several streams.
NO_TREES = dict.fromkeys(("bloom", "mamba", "qwen3_next", "rwkv", "openai-gpt"), CHAINS)
NO_TREES |= dict.fromkeys(("xlnet", "gemma3n_text"), ALONE)
# With few heads, scores of the index are often zero, and torch may take any of those that are equal.
CHANGES = {"glm_moe_dsa": {"index_n_heads": 32}}
AS_LLAMA = {"llama with biases", "qwen3", "phi3", "gpt_neox", "cohere", "granite", "olmo2", "mixtral", "qwen2_moe"}
LOCAL = {"qwen2", "mistral", "gemma2", "gemma3_text", "gemma4_text", "inkling2_text"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("answers") / "llama", "llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def expected(llama):
    return answers(llama)[0]


@pytest.mark.parametrize(
    "family", first_is_fast(["llama", *sorted({*FAMILIES, *OTHERS, *HANDING_ON} - AS_LLAMA - {"llama"})])
)
def test_answers_are_those_of_the_whole_model(family, tmp_path):
    save_model(tmp_path, family, **CHANGES.get(family, {}))
    found, (shared,) = answers(tmp_path)
    check_same(found, answers_of_whole(tmp_path, attention="eager" if family == "gemma2" else None))
    assert shared == NO_TREES.get(family, CHAINS if family in LOCAL else TREES)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next"])
def test_half_precision_shares_the_same(family, tmp_path):
    save_model(tmp_path, family, torch.bfloat16)
    found, (shared,) = answers(tmp_path)
    assert shared == NO_TREES.get(family, TREES)
    expected = answers_of_whole(tmp_path, dtype=torch.bfloat16)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in expected], abs=0.1)


def test_the_deepest_and_the_largest_tree_are_checked():
    """Attention may be local by the positions of tokens, or by their places in a row."""
    deep = [request_of(range(2, 42), [n], 64) for n in (5, 6)] + [request_of([*range(2, 30), 7, 7], [8], 64)]
    wide = [request_of([*range(100, 112), *[n] * 12], [n], 64) for n in range(3)]
    rows = rows_of([*deep, *wide], Sharing.BRANCHES)
    assert {len(row.tokens) for row in rows} == {42, 48}
    assert [len(check.row.tokens) for check in streaming._checks(rows)] == [42, 48]


def test_local_attention_is_found(tmp_path):
    """The mask of a tree takes the place of the model's own, which knows of the window."""
    kinds = [[["global", "local", "global"], 1]]
    neo = {"model_type": "gpt_neo", "attention_types": kinds, "num_layers": 3, "num_heads": 4, "window_size": 16}
    # The trees have more than 64 tokens.
    save_model(tmp_path, "qwen3", **neo, max_position_embeddings=256)
    found, (shared,) = answers(tmp_path)
    assert shared == CHAINS
    check_same(found, answers_of_whole(tmp_path))


@pytest.mark.parametrize(("family", "expected"), [("llama", [0, 1, 2]), ("rwkv", [0, 0, 1, 2])])
def test_blocks_are_read_once_and_recurrent_layers_cost_one_more(family, expected, tmp_path, monkeypatch):
    save_model(tmp_path, family)
    opened, open_block = [], StreamedModel.open
    monkeypatch.setattr(StreamedModel, "open", lambda self, i, ahead: opened.append(i) or open_block(self, i, ahead))
    answers(tmp_path)
    assert opened == expected


@pytest.mark.parametrize("changes", first_is_fast([{"place": "file", "ahead": False}, {"place": "file"}, {"batch": 1}]))
def test_answers_do_not_depend_on_the_placement(changes, llama, expected, monkeypatch):
    place = streaming.place
    monkeypatch.setattr(streaming, "place", lambda *args, fixed: place(*args, fixed=fixed | changes))
    check_same(answers(llama)[0], expected, 1e-4)


def test_logits_come_in_pieces(llama, expected, monkeypatch):
    monkeypatch.setattr(streaming, "LOGITS", 4 * 258 * 5)
    check_same(answers(llama)[0], expected, 1e-4)


def test_a_limit_that_is_too_low_names_one_that_is_enough(llama, expected):
    with pytest.raises(InputError, match=r"host_memory=0.01: this run needs at least ([\d.]+) GiB") as error:
        answers(llama, host_memory=0.01)
    enough = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
    # The process grows from run to run.
    check_same(answers(llama, host_memory=enough + 0.05)[0], expected, 1e-4)


def test_as_many_tokens_as_a_model_has_positions(tmp_path):
    """A row of 37 tokens would be padded to 38, and there is no position for the last one."""
    save_model(tmp_path, "gpt2", n_positions=37, max_position_embeddings=None)
    assert len(answers(tmp_path, [request_of(range(2, 39), [5], 37)])[0]) == 1


@pytest.mark.slow
def test_as_many_rows_as_tokens(tmp_path):
    """Where hidden states have tokens first, their shape does not show it then."""
    save_model(tmp_path, "xlnet")
    requests = [request_of(range(n, n + 20), [n + 20], 64) for n in range(2, 23)]
    check_same(answers(tmp_path, requests[:20])[0], answers(tmp_path, requests)[0][:20])


def test_a_target_that_the_model_does_not_know_is_refused(llama):
    """No row of the head has it, so nothing else would say so."""
    with pytest.raises(InputError, match=r"^token 258: the model embeds 258 tokens; give those of its own tokenizer"):
        answers(llama, [request_of([5, 6], [258], 64)])


def test_logits_that_overflow_are_refused(tmp_path):
    """Without a word, comparisons of NaN would choose among the answers."""
    save_model(tmp_path, "llama")
    (shard,) = [path for path in tmp_path.glob("*.safetensors") if "model.norm.weight" in load_file(path)]
    save_file(load_file(shard) | {"model.norm.weight": torch.full((32,), 3e38)}, shard, {"format": "pt"})
    with pytest.raises(InputError, match=r"the log-likelihoods of \d+ of 16 requests are NaN"):
        answers(tmp_path)


@pytest.mark.parametrize("requests", first_is_fast([REQUESTS, REQUESTS[:1]]), ids=["many", "fewer than ranks"])
def test_ranks_share_the_requests(requests, llama):
    for of_rank in on_ranks(2, answers_on, llama, requests):
        check_same(of_rank, answers(llama, requests)[0], 1e-4)


def answers_on(ranks, folder, requests):
    return streaming.scores_of(inspect(folder), requests, ranks=ranks)
