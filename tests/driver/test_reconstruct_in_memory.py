"""A model in memory whose blocks are reconstructed, on a caller's batches."""

from collections.abc import Iterable

import pytest
import torch
from helpers.checkpoints import refused
from helpers.families import first_is_fast
from helpers.ranks import on_ranks
from helpers.stacks import STACKS, Block, check_pruned, drawn, small, small_batches, weights_of
from helpers.tensors import assert_equal

from sparsefw import prune
from sparsefw.driver import prune as driver
from sparsefw.driver import reconstruct

pytestmark = pytest.mark.usefixtures("constants")


class TestModelInMemory:
    # Behind an encoder, or a tower, other hidden states begin. Streams in another order are compared.
    COMPARED = {name: [True] * 2 for name in STACKS} | dict(
        whisper=[True, False, True, True], clip=[True, False, True, True], diffusion=[True] * 4
    )

    @pytest.mark.parametrize(
        ("name", "method"), first_is_fast([*((name, "wanda") for name in STACKS), ("whisper", "sparsefw")])
    )
    def test_on_batches(self, name, method):
        """The model asks for no less gradients than before."""
        model, batches = drawn(name, 4)
        needed = [x.requires_grad for x in model.parameters()]
        masks = dict(steps=2, refit=0, target="dense") if method == "sparsefw" else {}
        result = check_pruned(model, batches, method, reconstruct=8, **masks)
        found = [block.reconstruction for block in result.report.blocks]
        assert [bool(x) for x in found] == self.COMPARED[name]
        assert [x.steps for x in found if x] == [8 * 3] * sum(self.COMPARED[name])
        assert method != "wanda" or any(x.after < x.before for x in found if x)
        assert [x.requires_grad for x in model.parameters()] == needed
        assert all(x.grad is None for x in model.parameters())

    def test_weights_outside_of_the_blocks_gather_no_gradients(self):
        """Though blocks are given them, and the model asks for their gradients."""

        class Scaled(_Stack):
            def forward(self, x):
                for block in self.blocks:
                    # A call between two blocks that uses it, too.
                    x = block(x * self.scale, self.scale)
                return x

        torch.manual_seed(0)
        model, batches = Scaled(Block() for _ in range(3)).eval(), [torch.randn(4, 6, 8) for _ in range(4)]
        model.scale = torch.nn.Parameter(torch.ones(8))
        result = prune(model, calibration=batches, method="wanda", kernel="torch", sparsity="0.5", reconstruct=4)
        assert all(block.reconstruction.after < block.reconstruction.before for block in result.report.blocks)
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# No output is written.


class _Stack(torch.nn.Module):
    def __init__(self, blocks: Iterable[torch.nn.Module]) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_blocks_without_gradients_are_refused_in_one_line(monkeypatch):
    """The model stays as it was."""
    forward, model, options = Block.forward, small(), dict(calibration=small_batches(), method="wanda", kernel="torch")
    monkeypatch.setattr(Block, "forward", lambda *args, **kwargs: forward(*args, **kwargs).detach())
    before = weights_of(model)
    with refused(r"^blocks\.0: unsupported model: its output has no gradients; "):
        prune(model, reconstruct=1, **options)
    assert_equal(weights_of(model), before)
    prune(model, reconstruct=0, **options)


class _Mixture(torch.nn.Module):
    """A block whose experts take whole windows: that which the window's first entry says."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = x[:, 0, 0].round().int() % 3
        out = torch.zeros_like(x)
        for n, expert in enumerate(self.experts):
            if (chosen == n).any():
                out[chosen == n] = expert(x[chosen == n]).tanh() / 4
        # The entry that chooses stays as it is.
        out[:, 0, 0] = 0
        return x + out


def prune_mixtures(ranks, chosen):
    """Prune two experts of three, on windows that reach these; what was found of each block, and the weights."""
    torch.manual_seed(0)
    model = _Stack(_Mixture() for _ in range(2)).eval()
    # Much alike, so that what is learned from some is of use for others.
    windows = torch.randn(1, 1, 6, 8) + 0.1 * torch.randn(len(chosen), 1, 6, 8)
    windows[:, 0, 0, 0] = torch.tensor(chosen)
    options = dict(method="wanda", kernel="torch", precision="ieee", sparsity="0.5", reconstruct=8)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        made = reconstruct.reconstruct
        patch.setattr(driver, "reconstruct", lambda *args: found.append(made(*args)) or found[-1])
        prune(model, calibration=[*windows], include=("experts.0", "experts.1"), **options)
    return found, [parameter.detach() for parameter in model.parameters()]


def test_a_rank_that_reaches_no_pruned_weight_learns_from_the_others():
    """Ranks have 4 and 5 windows, and learn from 3 and 4. Both make the steps of the one with more."""
    (found, weights), (other, same) = on_ranks(2, prune_mixtures, [2, 2, 2, 2, 0, 1, 0, 1, 0])
    assert found == other
    assert [x.steps for x in found] == [8 * 4] * 2
    assert all(x.after < x.before for x in found)
    assert_equal(weights, same)
