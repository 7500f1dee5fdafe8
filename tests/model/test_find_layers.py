"""Products are found in whatever form the forward writes them: Gram matrices, names, and weights that are views."""

import pytest
import torch
from torch import nn

from sparsefw.kernels.backend import TORCH
from sparsefw.model.layers import not_pruned
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


def inputs(*shape, count=2):
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(n)) for n in range(count)]


def captured(block, batches):
    return capture(block, lambda j: block(batches[j]), range(len(batches)), backend=TORCH)


def gram(*rows):
    X = torch.cat([x.reshape(-1, x.shape[-1]) for x in rows]).double()
    return X.T @ X


def assert_gram(G, truth):
    torch.testing.assert_close(G.double(), truth, rtol=1e-5, atol=1e-5)


# Form of the weight, of the input, and the call. The output of an expert is x W^T, whatever the order of the axes.
AT_ONCE = {
    "bmm": ((E, IN, OUT), lambda x, w, b: torch.bmm(x, w)),
    "bmm of a transposed weight": ((E, OUT, IN), lambda x, w, b: torch.bmm(x, w.transpose(1, 2))),
    "bmm from the left": ((E, OUT, IN), lambda x, w, b: torch.bmm(w, x.transpose(1, 2)).transpose(1, 2)),
    "baddbmm": ((E, IN, OUT), lambda x, w, b: torch.baddbmm(b[:, None], x, w)),
    "@": ((E, IN, OUT), lambda x, w, b: x @ w),
    "@ of four axes": ((E, IN, OUT), lambda x, w, b: (x[None] @ w)[0]),
    "@ of a weight with an axis of one entry": ((E, IN, OUT), lambda x, w, b: (x[:, None] @ w[:, None])[:, 0]),
}


@pytest.mark.parametrize("form", AT_ONCE)
def test_experts_that_are_multiplied_at_once(form):
    shape, forward = AT_ONCE[form]
    block, batches = Block(shape, forward), inputs(E, TOKENS, IN)
    found = captured(block, batches)
    assert [layer.name for layer in found.layers] == [f"w[{e}]" for e in range(E)]
    assert list(found.grams) == [layer.gram for layer in found.layers] == [f"w[{e}]" for e in range(E)]
    for e, layer in enumerate(found.layers):
        assert layer.weight.shape == (OUT, IN)
        assert layer.at_once
        assert_gram(found.grams[layer.gram], gram(*(x[e] for x in batches)))
    assert not_pruned(block, dict.fromkeys(found.grams, OUT * IN)) == ["bias"]


ONE_INPUT = {
    "matmul of two axes": ((E, IN, OUT), lambda x, w, b: x @ w),
    "bmm of an expanded input": ((E, IN, OUT), lambda x, w, b: torch.bmm(x.expand(E, TOKENS, IN), w)),
}


@pytest.mark.parametrize("form", ONE_INPUT)
def test_experts_that_read_the_same_input_share_a_gram(form):
    shape, forward = ONE_INPUT[form]
    block, batches = Block(shape, forward), inputs(TOKENS, IN)
    found = captured(block, batches)
    assert [layer.name for layer in found.layers] == [f"w[{e}]" for e in range(E)]
    assert {layer.gram for layer in found.layers} == set(found.grams) == {"w[0]"}
    assert all(layer.weight.shape == (OUT, IN) for layer in found.layers)
    assert_gram(found.grams["w[0]"], gram(*batches))
    for e, layer in enumerate(found.layers):
        assert layer.weight.data_ptr() == block.w[e].data_ptr()


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
    assert not_pruned(block, {"w[0]": OUT * IN, "w[2]": OUT * IN}) == ["w[1]", "bias"]


ALONE = {
    "linear": ((OUT, IN), lambda x, w, b: nn.functional.linear(x, w)),
    "@": ((IN, OUT), lambda x, w, b: x @ w),
    "@ of a transposed weight": ((OUT, IN), lambda x, w, b: x @ w.t()),
    "addmm": ((IN, OUT), lambda x, w, b: torch.addmm(b[0], x, w)),
    "addmm to a matrix": ((IN, OUT), lambda x, w, b: torch.addmm(torch.ones(TOKENS, OUT), x, w)),
    "from the left": ((OUT, IN), lambda x, w, b: w @ x.T),
}


@pytest.mark.parametrize("form", ALONE)
def test_products_with_one_matrix(form):
    shape, forward = ALONE[form]
    block, batches = Block(shape, forward), inputs(TOKENS, IN)
    (layer,) = captured(block, batches).layers
    assert (layer.name, layer.weight.shape, layer.at_once) == ("w", (OUT, IN), False)
    assert layer.weight.data_ptr() == block.w.data_ptr()
    assert (layer.bias is None) == (form != "addmm")
    assert_gram(captured(block, batches).grams["w"], gram(*batches))


NO_LAYERS = {
    "two weights": ((OUT, IN), lambda x, w, b: w @ w.T),
    "a part of the experts' inputs": (
        (E, IN, OUT),
        lambda x, w, b: torch.bmm(x[None, :, :3].expand(E, -1, -1), w[:, :3]),
    ),
    "a scaled product": ((IN, OUT), lambda x, w, b: torch.addmm(b[0], x, w, alpha=2)),
    "a reshaped weight": ((IN, OUT), lambda x, w, b: x @ w.view(OUT, IN).T),
    "an einsum": ((IN, OUT), lambda x, w, b: torch.einsum("td,do->to", x, w)),
}


@pytest.mark.parametrize("form", NO_LAYERS)
def test_what_is_no_layer_stays_dense_and_is_named(form):
    shape, forward = NO_LAYERS[form]
    block, batches = Block(shape, forward), inputs(TOKENS, IN)
    found = captured(block, batches)
    assert found.layers == found.ignored == []
    assert found.grams == {}
    assert "w" in not_pruned(block, {})
