"""Products that follow the changes of a vertex, against float64 and products from scratch."""

import pytest
import torch
from helpers.kernel_inputs import PRODUCT_ERROR, garbage, gram, normal, uniform

from sparsefw.kernels import cpu, vertex_products
from sparsefw.kernels.vertex_products import FIRST, REFRESH, VertexProducts

ROWS, D = 37, 131


def inputs(rows=ROWS, d=D, dtype=torch.float32):
    """W, G, and vertices: of a row some, all, one or none of the entries change, and for long enough for a refresh."""
    W, G, V = normal(rows, d, dtype=dtype).cpu(), gram(d).cpu(), uniform(rows, d).cpu() < 0.4
    one = torch.zeros_like(V)
    one[:, d // 2] = True
    shares = (*FIRST * [0.3], 0.1, 1.1, 0.05, 0.0, 0.01, *2 * REFRESH * [0.1])
    vertices = []
    for flip in (*(uniform(rows, d, seed=seed).cpu() < share for seed, share in enumerate(shares)), one, one):
        V = V ^ flip
        vertices.append(V)
    return W, G, vertices


def follow(W, G, vertices, lacks=None, precision="ieee"):
    """Their products; what the caller does to V and `out` in between is no concern of the next one."""
    products = VertexProducts(W, G, lacks, precision=precision)
    found, out = [], garbage(*W.shape).cpu()
    for vertex in vertices:
        given = vertex.clone()
        assert products(given, out=out) is out
        assert torch.equal(given, vertex)
        found.append(out.clone())
        out.fill_(torch.nan)
        given.fill_(True)
    return found


def assert_near(found, W, G, vertices, lacks=0.0):
    """Within 16 roundings of what float64 adds up, where one product from scratch takes 3 of them."""
    operands = [lacks + W.double() * ~V for V in vertices]
    bound = 2.0**-20 * torch.stack([E.abs() @ G.double().abs() for E in operands]).amax(0)
    for U, E in zip(found, operands, strict=True):
        assert ((U - E @ G.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 131), (37, 131), (150, 260)], ids=str)
def test_against_float64(shape, dtype):
    W, G, vertices = inputs(*shape, dtype=dtype)
    assert_near(follow(W, G, vertices), W, G, vertices)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_operands_are_rounded(precision):
    W, G, vertices = inputs()
    found = follow(W, G, vertices, precision=precision)
    assert_near(found, *(cpu.round_operand(X, precision) for X in (W, G)), vertices)
    exact = follow(W, G, vertices)
    assert all((a - b).abs().max() > PRODUCT_ERROR["ieee"] * b.abs().max() for a, b in zip(found, exact, strict=True))


def test_what_vertices_have_no_part_in():
    W, G, vertices = inputs()
    lacks = normal(ROWS, D, seed=9).cpu()
    before = lacks.clone()
    assert_near(follow(W, G, vertices, lacks), W, G, vertices, lacks)
    assert torch.equal(lacks, before)


def test_roundings_do_not_add_up():
    """After a thousand vertices as after ten."""
    W, G, _ = inputs()
    vertices = [uniform(ROWS, D, seed=seed).cpu() < 0.4 for seed in range(1000)]
    assert_near(follow(W, G, vertices)[-1:], W, G, vertices[-1:])


def test_most_products_are_made_of_changes(monkeypatch):
    W, G, vertices = inputs()
    made, product = [], vertex_products.product
    monkeypatch.setattr(
        vertex_products, "product", lambda *args, **options: made.append(1) or product(*args, **options)
    )
    follow(W, G, vertices)
    assert len(made) == FIRST + (len(vertices) - 1) // REFRESH


def test_the_way_back_costs_nothing(monkeypatch):
    """Vertices that zigzag between two change once."""
    W, G, vertices = inputs()
    first, second = vertices[FIRST - 1 : FIRST + 1]
    read, bag = [], vertex_products.embedding_bag
    monkeypatch.setattr(
        vertex_products, "embedding_bag", lambda at, *rest, **o: read.append(len(at)) or bag(at, *rest, **o)
    )
    follow(W, G, [*vertices[:FIRST], second, first, second, first])
    assert read == [int((first ^ second).sum()), 0, 0, 0]


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_panels_and_threads_change_nothing(threads, set_threads, monkeypatch):
    """Not a bit of a row depends on the rows beside it; products from scratch want multiples of 64 for that."""
    W, G, vertices = inputs(192, 260)

    def run(rows):
        return torch.stack(follow(W[rows], G, [vertex[rows] for vertex in vertices]))

    set_threads(1)
    expected = run(slice(None))
    set_threads(threads)
    monkeypatch.setattr(vertex_products, "PANEL", 260 * 64)
    assert torch.equal(torch.cat([run(slice(0, 64)), run(slice(64, 192))], 1), expected)


def test_no_rows():
    assert follow(torch.empty(0, D), gram(D).cpu(), 2 * [torch.empty(0, D, dtype=torch.bool)])[1].shape == (0, D)


def test_not_finite_stays():
    """Until the entry that is not finite is kept, and the next product from scratch."""
    W, G, _ = inputs()
    G[5, 7] = torch.inf
    kept = torch.ones(ROWS, D, dtype=torch.bool)
    removed = kept.clone()
    removed[:, 5] = False
    for U in follow(W, G, [*FIRST * [kept], removed, kept, kept])[FIRST::2]:
        assert not U[:, 7].isfinite().any()
        assert U[:, :7].isfinite().all()
