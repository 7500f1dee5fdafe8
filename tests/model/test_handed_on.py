"""Tensors that blocks hand on besides hidden states reach later blocks as in the whole model, each stream by itself."""

import copy

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import HANDING_ON, TOKENS, first_is_fast, save_model
from helpers.whole import BATCH, CPU, all_logits, plain_logits, run_blocks, streamed, whole_model
from torch import nn

from sparsefw.checkpoint.source import inspect
from sparsefw.data.windows import windows_of
from sparsefw.estimate.profile import shape_of
from sparsefw.model.activations import Store
from sparsefw.model.forward import embed
from sparsefw.model.head import perplexity
from sparsefw.model.streamed import StreamedModel


def prune(module):
    """Change the matrices of a module, its experts' as well."""
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            parameter.data[..., ::3] = 0


STREAMS = [(family, torch.float32, "gpu") for family in HANDING_ON] + [("gemma4_text", torch.float32, "file")]


@pytest.mark.parametrize(
    ("family", "dtype", "place"),
    first_is_fast(
        [*STREAMS, *((family, torch.bfloat16, "gpu") for family in ("llama", "gemma2", "gpt_neox", "mixtral"))]
    ),
    ids=str,
)
def test_streams_equal_the_whole_models(family, dtype, place, tmp_path):
    """A dense stream and two pruned ones, which take turns; four windows in a micro-batch, and two."""
    folder = save_model(tmp_path, family, dtype)
    with streamed(folder) as model:
        dense = embed(model, TOKENS, BATCH, Store(CPU, place))
        pruned, other = dense.fork(), dense.fork()
        for i in range(len(model.blocks)):
            block = copy.deepcopy(model.open(i))
            dense.advance(i)
            # The first run of a stream is not what counts.
            for j in range(len(pruned)):
                pruned.output(i, j)
            prune(model.blocks[i])
            pruned.advance(i)
            prune(block)
            other.advance(i, block)
            model.close(i)
        whole = whole_model(model, folder)
        expected = plain_logits(whole)
        prune(whole.get_submodule(model.names[0].rpartition(".")[0]))
        expected_pruned = plain_logits(whole)
        assert (expected - expected_pruned).abs().max() > 0.1
        assert torch.equal(all_logits(model, dense), expected)
        assert torch.equal(all_logits(model, pruned), expected_pruned)
        assert torch.equal(all_logits(model, other), expected_pruned)
        loss = nn.functional.cross_entropy(expected[:, :-1].double().flatten(0, 1), TOKENS[:, 1:].flatten())
        assert perplexity(dense, windows_of(TOKENS, "")) == pytest.approx(loss.exp().item(), rel=1e-5)
        for states in (dense, pruned, other):
            states.close()


def test_perplexity_of_as_many_windows_as_tokens(tmp_path):
    """Where hidden states have tokens first, their shape does not show it then."""
    folder, ids = save_model(tmp_path, "xlnet"), TOKENS[:, : len(TOKENS)]
    with streamed(folder) as model:
        together, apart = embed(model, ids, len(ids)), embed(model, ids, 1)
        for states in (together, apart):
            run_blocks(model, states)
        assert together.hidden[0].shape[:2] == ids.shape
        windows = windows_of(ids, "")
        assert perplexity(together, windows) == pytest.approx(perplexity(apart, windows), rel=1e-5)


@pytest.mark.parametrize("family", first_is_fast(HANDING_ON))
def test_expected_size_is_what_lies_between_blocks(family, tmp_path):
    """Bytes of a window, from windows of other lengths."""
    source, seqlen = inspect(save_model(tmp_path, family)), TOKENS.shape[1]
    shape, most = shape_of(source), 0
    with StreamedModel(source, CPU) as model:
        # Windows of one micro-batch each, so that what differs between them shows.
        states = embed(model, TOKENS, 1)
        for i in range(len(model.blocks)):
            model.open(i)
            for j in range(len(states)):
                states.leave(i, j, states.output(i, j))
            most = max(most, sum(x.nbytes for x in states.between()))
            states.arrive(states.position)
        differing = {*states.batches[0].constants.values()} - {*states.batches[1].constants.values()}
        assert {x.read().data_ptr() for x in differing} <= {x.data_ptr() for x in states.between()}
    expected = shape.window_bytes(seqlen)
    # Indices are as many as there are tokens, up to a limit that few tokens do not reach.
    assert expected[0] == states.hidden[0].nbytes
    assert most <= sum(expected) <= (4 if family == "glm_moe_dsa" else 1) * most


def test_a_block_that_returns_more_than_others_is_refused(tmp_path):
    model = streamed(save_model(tmp_path, "llama"))
    states, block = embed(model, TOKENS, BATCH), model.open(0)
    run = block.forward
    block.forward = lambda *args, **kwargs: (run(*args, **kwargs), torch.ones(1))
    with refused(r"model\.layers\.0: .* does not return the same as other blocks of its class"):
        states.advance(0)
