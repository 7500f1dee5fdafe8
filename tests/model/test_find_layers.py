"""Products are found in whatever form the forward writes them: Gram matrices, names, and weights that are views."""

import pytest
import torch
from torch import nn

from sparsefw.kernels.backend import TORCH
from sparsefw.model.experts import experts_of
from sparsefw.model.layers import layer_of, not_pruned
from sparsefw.model.measure import capture

E, TOKENS, IN, OUT = 3, 7, 5, 4


class Block(nn.Module):
    """A block with one parameter `w`, a bias (E, OUT), and a forward that is given."""

    def __init__(self, shape, forward):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(E, OUT), requires_grad=False)
        self._forward = forward

    def forward(self, x):
        return self._forward(x, self.w, self.bias)


def inputs(*shape):
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(n)) for n in range(2)]


def captured(block, batches):
    return capture(block, lambda j: block(batches[j]), range(len(batches)), backend=TORCH, experts=experts_of(block))


def gram(*rows):
    X = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]).double()
    return X.T @ X


def assert_gram(G, truth):
    torch.testing.assert_close(G.double(), truth, rtol=1e-5, atol=1e-5)


# By form: shape of the weight, who reads what, and the call. Experts are w[0] to w[2]: each has its input, or all read
# one. A matrix alone is w. The output is x W^T, whatever the order of the axes.
EACH, SAME, ALONE = "each its input", "one input", "alone"
FORMS = {
    "bmm": ((E, IN, OUT), EACH, lambda x, w, b: torch.bmm(x, w)),
    "bmm of a transposed weight": ((E, OUT, IN), EACH, lambda x, w, b: torch.bmm(x, w.transpose(1, 2))),
    "bmm from the left": ((E, OUT, IN), EACH, lambda x, w, b: torch.bmm(w, x.transpose(1, 2)).transpose(1, 2)),
    "baddbmm": ((E, IN, OUT), EACH, lambda x, w, b: torch.baddbmm(b[:, None], x, w)),
    "@ of experts": ((E, IN, OUT), EACH, lambda x, w, b: x @ w),
    "@ of four axes": ((E, IN, OUT), EACH, lambda x, w, b: (x[None] @ w)[0]),
    "@ of an axis of one entry": ((E, IN, OUT), EACH, lambda x, w, b: (x[:, None] @ w[:, None])[:, 0]),
    "matmul of two axes": ((E, IN, OUT), SAME, lambda x, w, b: x @ w),
    "bmm of an expanded input": ((E, IN, OUT), SAME, lambda x, w, b: torch.bmm(x.expand(E, TOKENS, IN), w)),
    "linear": ((OUT, IN), ALONE, lambda x, w, b: nn.functional.linear(x, w)),
    "linear with one output": ((1, IN), ALONE, lambda x, w, b: nn.functional.linear(x, w)),
    "@": ((IN, OUT), ALONE, lambda x, w, b: x @ w),
    "@ with one output": ((IN, 1), ALONE, lambda x, w, b: x @ w),
    "@ of a transposed weight": ((OUT, IN), ALONE, lambda x, w, b: x @ w.t()),
    "addmm": ((IN, OUT), ALONE, lambda x, w, b: torch.addmm(b[0], x, w)),
    "addmm to a matrix": ((IN, OUT), ALONE, lambda x, w, b: torch.addmm(torch.ones(TOKENS, OUT), x, w)),
    "from the left": ((OUT, IN), ALONE, lambda x, w, b: w @ x.T),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_layers_and_their_gram_matrices(form, turned):
    """A parameter may lie in memory in another order than that of its axes."""
    shape, inputs_of, forward = FORMS[form]
    block, each = Block(shape, forward), inputs_of == EACH
    if turned:
        block.w = nn.Parameter(block.w.mT.clone().mT, requires_grad=False)
    batches = inputs(E, TOKENS, IN) if each else inputs(TOKENS, IN)
    found, slices = captured(block, batches), [block.w] if inputs_of == ALONE else [*block.w]
    names = ["w"] if inputs_of == ALONE else [f"w[{e}]" for e in range(E)]
    assert [layer.name for layer in found.layers] == names
    assert [layer.gram for layer in found.layers] == (names if each else names[:1] * len(names))
    assert list(found.grams) == (names if each else names[:1])
    for n, (layer, matrix) in enumerate(zip(found.layers, slices, strict=True)):
        # Writing to the weight changes the block's parameter.
        weight = matrix if shape[-1] == IN else matrix.T
        assert torch.equal(layer.weight, weight)
        assert layer.weight.data_ptr() == matrix.data_ptr()
        assert (layer.at_once, layer.transposed) == (inputs_of != ALONE, shape[-1] != IN)
        assert (layer.bias is None) == (form != "addmm")
        assert_gram(found.grams[layer.gram], gram(*(x[n] if each else x for x in batches)))
        again = layer_of(block, layer.name, layer.gram, weight.shape, layer.transposed)
        assert (again.weight.shape, again.weight.data_ptr()) == (weight.shape, matrix.data_ptr())
    assert not_pruned(block, {layer.name: layer.weight.numel() for layer in found.layers}) == ["bias"]


def test_experts_without_tokens_stay_dense():
    """Rows of zeros stand for tokens that an expert is not sent. They add nothing."""
    block, batches = Block((E, IN, OUT), lambda x, w, b: torch.bmm(x, w)), inputs(E, TOKENS, IN)
    for x in batches:
        x[1] = 0
        x[2, 3:] = 0
    found = captured(block, batches)
    assert [layer.name for layer in found.layers] == ["w[0]", "w[2]"]
    assert set(found.grams) == {"w[0]", "w[2]"}
    assert_gram(found.grams["w[2]"], gram(*(x[2, :3] for x in batches)))
    assert not_pruned(block, dict.fromkeys(found.grams, OUT * IN)) == ["w[1]", "bias"]


def test_parts_of_one_matrix():
    """As in DBRX, where the experts lie one below the other. They are used in another order, and one is not used."""
    block, batches = Block((E * OUT, IN), lambda x, w, b: (x[0] @ w[8:].T) + (x[1] @ w[:4].T)), inputs(2, TOKENS, IN)
    found = captured(block, batches)
    assert [layer.name for layer in found.layers] == ["w[2]", "w[0]"]
    for n, (layer, rows) in enumerate(zip(found.layers, (slice(8, 12), slice(4)), strict=True)):
        assert torch.equal(layer.weight, block.w[rows])
        assert layer.weight.data_ptr() == block.w[rows].data_ptr()
        assert_gram(found.grams[layer.gram], gram(*(x[n] for x in batches)))
    assert not_pruned(block, dict.fromkeys(found.grams, OUT * IN)) == ["w[1]", "bias"]


NO_LAYERS = {
    "two weights": ((OUT, IN), lambda x, w, b: w @ w.T),
    "a part of the experts' inputs": (
        (E, IN, OUT),
        lambda x, w, b: torch.bmm(x[None, :, :3].expand(E, -1, -1), w[:, :3]),
    ),
    "a scaled product": ((IN, OUT), lambda x, w, b: torch.addmm(b[0], x, w, alpha=2)),
    "a reshaped weight": ((IN, OUT), lambda x, w, b: x @ w.view(OUT, IN).T),
    "an einsum": ((IN, OUT), lambda x, w, b: torch.einsum("td,do->to", x, w)),
    # Only parts of one size, one below the other, can be told by an index.
    "most rows": ((6, IN), lambda x, w, b: x @ w[:4].T),
    "rows by a list": ((6, IN), lambda x, w, b: x @ w[[0, 1, 2]].T),
}


@pytest.mark.parametrize("form", NO_LAYERS)
def test_what_is_no_layer_stays_dense_and_is_named(form):
    shape, forward = NO_LAYERS[form]
    block = Block(shape, forward)
    found = captured(block, inputs(TOKENS, IN))
    assert found.layers == found.ignored == []
    assert found.grams == {}
    assert "w" in not_pruned(block, {})
