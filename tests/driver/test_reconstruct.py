"""A reconstruction fits the kept weights of a block together to the dense block's output."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import make_place, tensors_of
from helpers.families import first_is_fast
from helpers.reconstructed import METHODS, SEQLEN, WINDOWS, run
from helpers.texts import calibration_windows
from helpers.verifying import passed
from helpers.whole import streamed
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsefw.data.batches import token_batch
from sparsefw.driver import reconstruct
from sparsefw.driver.reconstruct import BlockFit
from sparsefw.model.activations import HELD_OUT, split_batches
from sparsefw.model.forward import embed_batches
from sparsefw.ranks import ALONE
from sparsefw.report import log
from sparsefw.solver.kept_weights import KeptWeights

pytestmark = pytest.mark.usefixtures("constants")


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def windows_of(folder: Path) -> torch.Tensor:
    tokenizer, text = AutoTokenizer.from_pretrained(folder / "model"), str(folder / "text.txt")
    return calibration_windows(tokenizer, text, nsamples=WINDOWS, seqlen=SEQLEN, seed=1).ids


@torch.no_grad()
def behind_blocks(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states after each block, by the model's own forward, in double."""
    found = []
    hooks = [x.register_forward_hook(lambda block, args, out: found.append(out.double())) for x in model.model.layers]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def loss(out: torch.Tensor, target: torch.Tensor) -> float:
    """The mean over tokens of the squared distance, relative to the square of the target; above 1 of 1 + its log."""
    found = ((out - target).square().sum(-1) / target.square().sum(-1)).flatten().tolist()
    return sum(e if e < 1 else 1 + math.log(e) for e in found) / len(found)


# A budget of each kind.
SPARSITY = {"dense targets": "0.6", "masks only": "layer:0.5", "sparsegpt": "2:4", "compared with sparsefw": "0.7"}
# The last column of its table.
DONE = {
    "dense targets": ["mask, refit, reconstruction"],
    "masks only": ["mask, reconstruction"],
    "sparsegpt": ["mask, weight updates, reconstruction"],
    "compared with sparsefw": ["mask, refit", "mask, reconstruction"],
}


@pytest.fixture(scope="module", params=first_is_fast(SPARSITY))
def reconstructed(request, llama, constants):
    """The output of a run, its report, and what was seen of it."""
    method, output = request.param, llama / request.param
    return output, *run(llama, output, *METHODS[method], "--reconstruct", "2", "--sparsity", SPARSITY[method])


def test_losses_are_those_of_their_definition(reconstructed, llama):
    """On the held-out windows, after reconstructed blocks, by the forward of transformers."""
    output, report, seen = reconstructed
    learned, held_out = split_batches(WINDOWS)
    ids = windows_of(llama)[held_out]
    dense, sparse = behind_blocks(loaded(llama / "model"), ids), loaded(output)
    after = behind_blocks(sparse, ids)
    assert len(report.blocks) == 2
    assert [cells[-1] for _, cells in log.result_rows(report)] == DONE[output.name]
    for i, block in enumerate(report.blocks):
        found = block.reconstruction
        assert found.steps == 2 * len(learned)
        written = {name: x.clone() for name, x in sparse.model.layers[i].state_dict().items()}
        sparse.model.layers[i].load_state_dict(seen.weights[i])
        behind = behind_blocks(sparse, ids)[i]
        sparse.model.layers[i].load_state_dict(written)
        before, expected = loss(behind, dense[i]), loss(after[i], dense[i])
        assert found.before == pytest.approx(before, rel=1e-4)
        assert found.put_back == (not found.after < found.before)
        assert (found.before if found.put_back else found.after) == pytest.approx(expected, rel=1e-4)
        rates = [reconstruct.RATE * (1 + math.cos(math.pi * n / found.steps)) / 2 for n in range(found.steps)]
        assert seen.rates[i * found.steps :][: found.steps] == pytest.approx(rates)
    # It is of use, or this would not show much.
    assert report.blocks[0].reconstruction.after < 0.99 * report.blocks[0].reconstruction.before


def test_zeros_stay_and_all_else_is_the_dense_models(reconstructed, llama, capsys):
    output, report, seen = reconstructed
    source, written = tensors_of(llama / "model"), tensors_of(output)
    layers = {layer.name for layer in report.layers}
    for name, tensor in written.items():
        if name not in layers:
            assert torch.equal(tensor, source[name]), name
            continue
        i = int(name.split(".")[2])
        before = seen.weights[i][name.removeprefix(f"model.layers.{i}.")]
        assert torch.equal(tensor != 0, before != 0)
        if not report.blocks[i].reconstruction.put_back:
            assert (tensor != before).sum() > 0.9 * (before != 0).sum()
    passed(capsys, output, summed=False)


@pytest.mark.parametrize(
    ("family", "dtype"),
    first_is_fast(
        [
            ("llama", torch.bfloat16),
            ("gpt2", torch.float16),
            ("mixtral", torch.float32),
            ("gemma3n_text", torch.float32),
        ]
    ),
)
def test_families(family, dtype, tmp_path, out, capsys):
    """Blocks of all kinds get better on held-out windows, and keep to their budgets."""
    make_place(tmp_path, family, dtype)
    report, _ = run(tmp_path, out, "--method", "wanda", "--reconstruct", "2")
    found = [block.reconstruction for block in report.blocks]
    assert all(found)
    assert not all(x.put_back for x in found)
    assert all(x.after < x.before for x in found if not x.put_back)
    passed(capsys, out)


def test_gradients_that_fp16_has_no_room_for_as_sums(tmp_path, monkeypatch):
    """Those of a mean over tokens have room. One that has none would put the whole round back."""
    largest, gradients, loss = [0.0], KeptWeights.gradients, reconstruct.relative_loss

    def spy(weights):
        found = gradients(weights)
        largest[0] = max(largest[0], *(g.abs().max().item() for g in found))
        return found

    monkeypatch.setattr(KeptWeights, "gradients", spy)
    few = ["--method", "wanda", "--reconstruct", "1", "--include", "layers.0"]
    for dtype in (torch.float32, torch.float16):
        make_place(tmp_path / str(dtype), "llama", dtype, num_hidden_layers=1)
    run(tmp_path / "torch.float32", tmp_path / "out", *few)
    factor = 2 * torch.finfo(torch.float16).max / largest[0]
    monkeypatch.setattr(reconstruct, "relative_loss", lambda out, target: factor * loss(out, target))
    largest[0] = 0.0
    report, _ = run(tmp_path / "torch.float16", tmp_path / "again", *few)
    assert math.isfinite(largest[0])
    assert not report.blocks[0].reconstruction.put_back


def test_a_token_without_a_target_does_not_count():
    out, target = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    target[1] = 0
    total = reconstruct.relative_loss(out, target)
    total.backward()
    assert total.item() == pytest.approx(reconstruct.relative_loss(out[[0, 2]], target[[0, 2]]).item())
    assert not out.grad[1].any()
    assert out.grad[0].all()


def test_one_token_does_not_outweigh_others():
    """One whose state the pruned model makes thirty times too large pulls less than one that is a bit off."""
    target = torch.randn(2, 64)
    out = (target * torch.tensor([[1.3], [30.0]])).requires_grad_()
    reconstruct.relative_loss(out, target).backward()
    assert out.grad[1].norm() < out.grad[0].norm() / 4


@pytest.mark.parametrize("count", range(40))
def test_micro_batches_that_are_held_out(count):
    """One of sixteen, spread over the text, and one at least where something is left to learn from."""
    learned, held_out = split_batches(count)
    assert sorted(learned + held_out) == [*range(count)]
    assert len(held_out) == max(count // HELD_OUT, int(count > 1))
    assert len(learned) >= min(count, 1)


@pytest.mark.parametrize("i", [0, 1])
def test_steps_on_pieces_are_those_on_micro_batches_of_their_own(i, llama):
    """The same gradients, and the same loss of what is held out."""
    ids, found = windows_of(llama), []
    with streamed(llama / "model") as model:
        for size, learned, held_out in ((1, [4, 5, 6, 7], [0, 1, 2, 3]), (4, [1], [0])):
            pieces = [token_batch(ids[:1])] if size > 1 else []
            states = embed_batches(model, map(token_batch, ids.split(size)), pieces=pieces)
            block, dense = model.open(i), states.fork()
            with torch.no_grad():
                dense.advance(i)
                block.mlp.down_proj.weight[:, ::2] = 0
            weight = block.mlp.down_proj.weight.requires_grad_()
            run = SimpleNamespace(model=model, ranks=ALONE, rounded=False)
            fit = BlockFit(run, i, states, dense, learned, held_out)
            assert (len(fit.steps[0]), len(fit.steps[1])) == (4, 4)
            assert torch.equal(torch.cat([*fit.steps[0].hidden]), torch.cat([states.hidden[j] for j in learned]))
            found.append([torch.tensor(fit.loss())])
            for n in range(4):
                fit.add_gradients(n, [weight])
                found[-1].append(weight.grad)
                weight.grad = None
            weight.requires_grad_(False)
            model.close(i)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)
