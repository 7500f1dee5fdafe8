"""SparseGPT against a slow float64 transcription of optimal brain surgery, and its budgets."""

from fractions import Fraction

import pytest
import torch
from helpers.families import first_is_fast
from helpers.kernel_inputs import DEVICE, gram, normal, strided, uniform
from helpers.problems import error
from helpers.tensors import assert_equal

from sparsefw.solver import patterns
from sparsefw.solver.methods import inverse_factor, sparsegpt

PATTERNS = ("0.6", "0.29", "layer:0.6", "2:4", "1:3", "5:24")


def brain_surgeon(W, G, text, damp, blocksize, support):
    """SparseGPT's sweep from its definition: every column inverts the Hessian of the columns not yet settled."""
    support = torch.ones(W.shape, dtype=torch.bool) if support is None else support.cpu()
    pattern = patterns.parse(text)
    W, H = W.double().cpu().clone(), G.double().cpu().clone()
    rows, d = W.shape
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H += damp * H.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(d)]
    mask = torch.zeros(rows, d, dtype=torch.bool)

    def keep_best(rows, columns, k):
        cost = {(i, j): float(W[i, j] ** 2 / inverses[j][0, 0]) for i in rows for j in columns if support[i, j]}
        for i, j in sorted(cost, key=lambda entry: (-cost[entry], entry))[:k]:
            mask[i, j] = True

    kept = 0
    for j in range(d):
        if pattern.group:
            if j % pattern.group == 0:
                for i in range(rows):
                    keep_best([i], range(j, j + pattern.group), pattern.kept(pattern.group))
        elif j % blocksize == 0:
            end = min(j + blocksize, d)
            total = rows * end - int(Fraction(text.removeprefix("layer:")) * rows * end)
            keep_best(range(rows), range(j, end), total - kept)
            kept = total
        removed = torch.where(mask[:, j], 0, W[:, j])
        W[:, j:] -= removed[:, None] / inverses[j][0, 0] * inverses[j][0]
        W[~mask[:, j], j] = 0
    return mask, W


def check(W, G, text, damp=0.01, blocksize=128, support=None):
    mask, Z = sparsegpt(W, G, patterns.parse(text), damp=damp, blocksize=blocksize, support=support)
    true_mask, true_Z = brain_surgeon(W, G, text, damp, blocksize, support)
    assert torch.equal(mask.cpu(), true_mask)
    torch.testing.assert_close(Z.double().cpu(), true_Z, rtol=1e-4, atol=1e-4)
    assert (mask.dtype, Z.dtype) == (torch.bool, torch.float32)
    return mask, Z


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("blocksize", first_is_fast([48, 16, 128]))
def test_mask_and_weights_by_definition(text, blocksize):
    """Blocks are narrower than a group, no multiple of it, or wider than the layer. Inputs stay, whatever strides."""
    W, G = normal(5, 72), gram(72)
    before = W.clone(), G.clone()
    check(strided(W), G, text, blocksize=blocksize)
    assert_equal((W, G), before)


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_the_last_block_is_narrower_and_damping_counts(damp):
    G = gram(37)
    check(normal(4, 37), G, "0.5", damp, blocksize=16)
    C, H = inverse_factor(G, damp).double(), G.double()
    H = H + damp * H.diagonal().mean() * torch.eye(37, device=DEVICE)
    assert torch.equal(C, C.triu())
    torch.testing.assert_close(C.T @ C, torch.linalg.inv(H), rtol=1e-3, atol=1e-6)


def test_weights_of_dead_inputs_become_zero_and_change_nothing_else():
    W, G = normal(4, 24), gram(24) / 300
    dead = [0, 7, 16, 23]
    G[dead], G[:, dead] = 0, 0
    for text in ("0.5", "2:4"):
        _, Z = check(W, G, text, 0.5, blocksize=8)
        assert (Z[:, dead] == 0).all()
    mask, Z = sparsegpt(W, torch.zeros_like(G), patterns.parse("0.5"))
    assert mask.sum() == 48
    assert (Z == 0).all()


def test_ties_go_to_the_lower_index():
    """All entries cost the same, so a threshold would prune everything."""
    ones = torch.ones(3, 12, device=DEVICE)
    mask, Z = sparsegpt(ones, torch.eye(12, device=DEVICE), patterns.parse("0.5"))
    assert torch.equal(mask.view(-1), torch.arange(36, device=DEVICE) < 18)
    assert torch.equal(Z, mask.float())
    mask, _ = sparsegpt(ones, torch.eye(12, device=DEVICE), patterns.parse("2:4"), blocksize=10)
    assert torch.equal(mask.view(3, 3, 4), (torch.arange(4, device=DEVICE) < 2).expand(3, 3, 4))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("blocksize", first_is_fast([16, 128]))
def test_nothing_revives_outside_of_the_support(text, blocksize):
    """Inputs mix a few sources, so that each weight can make up for many others."""
    W = normal(5, 72).masked_fill(uniform(5, 72, seed=4) < 0.4, 0)
    X = normal(300, 12, seed=5) @ normal(12, 72, seed=6) + 0.3 * normal(300, 72, seed=7)
    support, G = W != 0, X.T @ X
    mask, Z = check(W, G, text, blocksize=blocksize, support=support)
    assert not (mask & ~support).any()
    assert torch.equal(Z != 0, mask)
    plain, all_of_them = (sparsegpt(W, G, patterns.parse(text), support=s) for s in (None, torch.ones_like(support)))
    assert torch.equal(plain[1], all_of_them[1])


def test_nearly_singular_and_not_positive_definite():
    """With two tokens for 64 inputs, damping makes the problem solvable, and the update still pays."""
    W, X = normal(8, 64), normal(2, 64, seed=1)
    G = X.T @ X
    mask, Z = sparsegpt(W, G, patterns.parse("0.5"), blocksize=16)
    assert error(W, Z, G).sum() < 0.01 * error(W, W * mask, G).sum()
    with pytest.raises(FloatingPointError, match="not positive definite"):
        sparsegpt(W, G, patterns.parse("0.5"), damp=0.0)
    # A Gram matrix cannot correlate two inputs by more than 1.
    G = torch.eye(8, device=DEVICE)
    G[2, 5] = G[5, 2] = 2
    with pytest.raises(FloatingPointError, match=r"not positive definite, even with a damping of 0\.01"):
        sparsegpt(normal(3, 8), G, patterns.parse("0.5"))
