"""Evaluations on a pretended GPU: the CPU's answers, from every place of the hidden states, in the expected memory."""

from contextlib import suppress

import pytest
import random_checkpoint
import torch
from helpers.families import save_model
from helpers.pretended_gpu import pretended_gpu
from helpers.requests import check_same, some_requests

from sparsefw.evaluation import answers
from sparsefw.evaluation import saved as saving
from sparsefw.evaluation.answers import Budget, scores_of
from sparsefw.evaluation.request import Request
from sparsefw.evaluation.room import LOGITS, Room, memory_of_pass
from sparsefw.evaluation.saved import Saved
from sparsefw.evaluation.streaming import RequestStates
from sparsefw.model.activations import PLACES
from sparsefw.ranks import ALONE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: no need to pretend one"),
]

# A question with four answers, and the shortest request.
REQUESTS = [*some_requests()[:4], some_requests()[-1]]

# Attention with a head that is the embeddings, transposed weights, experts, state spaces, and hidden states of
# (tokens, rows).
FAMILIES = ["llama", "gpt2", "qwen3_moe", "mamba", "xlnet"]


def answered(folder, requests, room):
    """The answers of a checkpoint on a pretended GPU in this room, the GPU, and the work."""
    works = []

    def placed(work, *others):
        works.append(work)
        return room, memory_of_pass(work, room)

    with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patched:
        patched.setattr(answers, "room_for", placed)
        found = scores_of(folder, requests, Budget())
    assert gpu.allocated == 0
    return found, gpu, works[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_as_on_a_cpu(family, tmp_path):
    folder = save_model(tmp_path, family)
    expected = scores_of(folder, REQUESTS, Budget())
    for place in PLACES:
        found, *_ = answered(folder, REQUESTS, Room(64, place))
        check_same(found, expected)


# Experts are most of this model. They are stacked on the GPU while a block is loaded.
OF_EXPERTS = {"num_experts": 16, "moe_intermediate_size": 256, "num_experts_per_tok": 2}
LARGE = {"llama": {}, "qwen3_moe": OF_EXPERTS}


@pytest.fixture(scope="module", params=LARGE)
def large(request, tmp_path_factory):
    """A model that is large enough for its tensors to be more than the allocator's rounding."""
    family, own = request.param, LARGE[request.param]
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "vocab_size": 4096} | own
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
    folder = tmp_path_factory.mktemp("large") / family
    random_checkpoint.generate(folder, family, **sizes)
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_expected_memory_is_enough_and_not_much_more(place, large, monkeypatch):
    # Otherwise the logits of a small model take more than all else.
    monkeypatch.setitem(LOGITS, True, 2**18)
    # Few rows at a time, where experts are to be what takes most.
    rows, together = (20, 2) if large.name == "qwen3_moe" else (100, 10)
    requests = [Request([*range(n, n + 100)], [n + 100]) for n in range(rows)]
    room = Room(100 * together, place)
    _, gpu, work = answered(large, requests, room)
    needs = memory_of_pass(work, room)
    assert needs.gpu / 2 <= gpu.peak <= needs.gpu
    assert gpu.host_peak <= needs.host - work.process


def test_what_the_caller_has_on_the_gpu_is_expected(tmp_path, monkeypatch):
    folder, room_for, expected = save_model(tmp_path / "model", "llama"), answers.room_for, []

    def placed(*args):
        room, needs = room_for(*args)
        expected.append(needs.gpu)
        return room, needs

    monkeypatch.setattr(answers, "room_for", placed)
    for size in (0, 64 << 20):
        with pretended_gpu():
            held = torch.empty(size, dtype=torch.uint8, device="cuda")
            scores_of(folder, REQUESTS, Budget())
            del held
    assert expected[1] - expected[0] == 64 << 20


def test_an_interrupted_pass_goes_on_at_another_place(tmp_path, monkeypatch):
    folder = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr(saving, "SECONDS", 0.0)
    monkeypatch.setattr(saving, "TIMES", 0.0)
    advance, found = RequestStates.advance, []
    for place, last in (("gpu", 1), ("host", 2), ("file", 3)):

        def stopping(self, i, last=last):
            if i == last:
                raise KeyboardInterrupt
            advance(self, i)

        monkeypatch.setattr(RequestStates, "advance", stopping)
        monkeypatch.setattr(
            answers, "room_for", lambda work, *others, place=place: (Room(64, place), memory_of_pass(work, Room(64)))
        )
        saved = Saved(tmp_path / "out", {}, False, lambda line: None, ALONE)
        with pretended_gpu() as gpu, suppress(KeyboardInterrupt), saved:
            assert saved.blocks(0) == last - 1
            found = scores_of(folder, REQUESTS, Budget(), saved=saved)
        assert gpu.allocated == 0
    check_same(found, scores_of(folder, REQUESTS, Budget()))
