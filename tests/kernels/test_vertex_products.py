"""Products that follow the changes of a vertex, against float64 and products from scratch."""

import pytest
import torch
from helpers.kernel_inputs import DTYPES, PRODUCT_ERROR, garbage, gram, normal, shapes, uniform

from sparsefw.kernels.cpu import vertex_products
from sparsefw.kernels.cpu.vertex_products import FIRST, REFRESH, VertexProducts
from sparsefw.kernels.definitions import round_operand

ROWS, D = 37, 131


def inputs(rows=ROWS, d=D, dtype=torch.float32):
    """W, G, and vertices in which some, all, one or no entry of a row changes, more vertices than a refresh takes."""
    W, G, V = normal(rows, d, dtype=dtype).cpu(), gram(d).cpu(), uniform(rows, d).cpu() < 0.4
    single = torch.zeros_like(V)
    single[:, d // 2] = True
    shares = (*FIRST * [0.3], 0.1, 1.1, 0.05, 0.0, 0.01, *2 * REFRESH * [0.1])
    vertices = []
    for flip in (*(uniform(rows, d, seed=seed).cpu() < share for seed, share in enumerate(shares)), single, single):
        V = V ^ flip
        vertices.append(V)
    return W, G, vertices


def follow(W, G, vertices, target_gap=None, precision="ieee"):
    """The products of the vertices. V and `out` are overwritten in between, which must not matter."""
    follower = VertexProducts(W, G, target_gap, precision=precision)
    products, out = [], garbage(*W.shape).cpu()
    for vertex in vertices:
        given = vertex.clone()
        assert follower(given, out=out) is out
        assert torch.equal(given, vertex)
        products.append(out.clone())
        out.fill_(torch.nan)
        given.fill_(True)
    return products


def assert_near(products, W, G, vertices, target_gap=0.0):
    """Assert products within 16 roundings of the float64 sums; one product from scratch takes 3 roundings."""
    operands = [target_gap + W.double() * ~V for V in vertices]
    bound = 2.0**-20 * torch.stack([E.abs() @ G.double().abs() for E in operands]).amax(0)
    for U, E in zip(products, operands, strict=True):
        assert ((U - E @ G.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@shapes
def test_against_float64(shape, dtype):
    W, G, vertices = inputs(*shape, dtype=dtype)
    target_gap = normal(*shape, seed=9).cpu()
    for gap in (None, target_gap):
        assert_near(follow(W, G, vertices, gap), W, G, vertices, 0.0 if gap is None else gap)
    assert torch.equal(target_gap, normal(*shape, seed=9).cpu())


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_operands_are_rounded(precision):
    W, G, vertices = inputs()
    products, exact = follow(W, G, vertices, precision=precision), follow(W, G, vertices)
    assert_near(products, *(round_operand(X, precision) for X in (W, G)), vertices)
    assert all(
        (a - b).abs().max() > PRODUCT_ERROR["ieee"] * b.abs().max() for a, b in zip(products, exact, strict=True)
    )


def test_roundings_do_not_add_up():
    """The error after a thousand vertices is that after ten."""
    W, G, _ = inputs()
    vertices = [uniform(ROWS, D, seed=seed).cpu() < 0.4 for seed in range(1000)]
    assert_near(follow(W, G, vertices)[-1:], W, G, vertices[-1:])


def test_most_products_are_made_of_changes_and_the_way_back_costs_nothing(monkeypatch):
    """Vertices that alternate between two cost one change."""
    W, G, vertices = inputs()
    made, read, product, bag = [], [], vertex_products.product, vertex_products.embedding_bag
    monkeypatch.setattr(vertex_products, "product", lambda *a, **o: made.append(1) or product(*a, **o))
    monkeypatch.setattr(vertex_products, "embedding_bag", lambda at, *a, **o: read.append(len(at)) or bag(at, *a, **o))
    follow(W, G, vertices)
    assert len(made) == FIRST + (len(vertices) - 1) // REFRESH
    read.clear()
    first, second = vertices[FIRST - 1 : FIRST + 1]
    follow(W, G, [*vertices[:FIRST], second, first, second, first])
    assert read == [int((first ^ second).sum()), 0, 0, 0]


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_panels_and_threads_change_nothing(threads, set_threads, monkeypatch):
    """No bit of a row depends on other rows; products from scratch need multiples of 64 rows for that."""
    W, G, vertices = inputs(192, 260)

    def run(rows):
        return torch.stack(follow(W[rows], G, [vertex[rows] for vertex in vertices]))

    set_threads(1)
    expected = run(slice(None))
    set_threads(threads)
    monkeypatch.setattr(vertex_products, "PANEL", 260 * 64)
    assert torch.equal(torch.cat([run(slice(0, 64)), run(slice(64, 192))], 1), expected)


def test_not_finite_stays():
    """A product is not finite until the entry is kept and the next product is made from scratch."""
    W, G, _ = inputs()
    G[5, 7] = torch.inf
    kept = torch.ones(ROWS, D, dtype=torch.bool)
    removed = kept.clone()
    removed[:, 5] = False
    for U in follow(W, G, [*FIRST * [kept], removed, kept, kept])[FIRST::2]:
        assert not U[:, 7].isfinite().any()
        assert U[:, :7].isfinite().all()
