"""lmo against brute force and the specification, entry by entry."""

import itertools

import counts
import pytest
import torch
from helpers.kernel_inputs import DEVICE, garbage, hard_scores, normal, strided, uniform

from sparsefw.kernels import cpu, naive, topk, triton_ops
from sparsefw.kernels import lmo as lmo_module
from sparsefw.kernels.launch import INTERPRET
from sparsefw.kernels.lmo import lmo

GROUPS = [(2, 4), (1, 3), (3, 5), (4, 8), (16, 32), (31, 32), (0, 4), (3, 4), (1, 2), (5, 6)]


# Tiles of the Triton kernel; None: its own choice.
TILES = {
    "one chunk": None,
    "chunks": dict(BLOCK_R=32, BLOCK_D=32, SEARCH_D=64),
    "all keys in registers": dict(BLOCK_R=32, BLOCK_D=32, SEARCH_D=256),
}


@pytest.fixture(params=["cpu", *TILES])
def backend(request, monkeypatch):
    """cpu.py; and the Triton kernel with rows in one chunk, and in chunks of 32 columns."""
    if request.param == "cpu":
        return cpu
    if TILES[request.param]:
        monkeypatch.setattr(lmo_module, "configuration", lambda rows, d, group: TILES[request.param])
    return triton_ops


def assert_equal_to_naive(backend, score, k, **options):
    expected = naive.lmo(score, k, **options)
    out = garbage(*score.shape, dtype=torch.bool)
    assert backend.lmo(score, k, out=out, **options) is out
    assert torch.equal(out, expected)
    return out


def tied(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    """Scores with few distinct values, so that the k-th is always one of many equal ones."""
    return (2 * normal(rows, d, seed=seed)).round()


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, 2, 7])
def test_lmo_is_the_best_of_all_vertices(backend, d):
    for seed, k in itertools.product(range(3), range(d + 1)):
        score = tied(1, d, seed)
        # combinations come in lexicographic order: the first of the best has its ties at the lowest indices.
        best = max(itertools.combinations(range(d), k), key=lambda chosen: sum(score[0, list(chosen)].tolist()))
        expected = torch.zeros(1, d, dtype=torch.bool, device=DEVICE)
        expected[0, list(best)] = True
        assert torch.equal(backend.lmo(score, k), expected)


@pytest.mark.parametrize("score", [normal(37, 131), tied(37, 131), torch.zeros(37, 131, device=DEVICE)])
@pytest.mark.parametrize("k", [0, 1, 64, 130, 131])
def test_lmo_equals_naive(backend, score, k):
    V = assert_equal_to_naive(backend, score, k)
    assert (V.sum(1) == k).all()


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="calls are counted in the interpreter, which runs where no GPU is")
@pytest.mark.parametrize("name", hard_scores(1, 1))
def test_the_search_takes_as_many_passes_as_are_said_and_never_many(name, monkeypatch):
    """The passes are those of bench/counts.py, which searches each row alone."""
    score, calls = hard_scores(1, 4000)[name], []
    for function in ("count_reaching", "highest_below"):
        counted = getattr(topk, function)
        monkeypatch.setattr(topk, function, lambda *args, counted=counted: calls.append(1) or counted(*args))
    for k in (1, 20, 1600, 3998):
        calls.clear()
        lmo(score, k)
        passes, _ = counts.anew(counts.order_key(score), k)
        assert len(calls) == passes.item() - 1
        assert len(calls) < 50


@pytest.mark.slow
@pytest.mark.parametrize("name", hard_scores(1, 1))
def test_no_spread_of_the_scores_misleads_the_search(backend, name):
    # Budgets by row: what takes time in the interpreter is the number of launches.
    score, k = hard_scores(35, 200)[name], torch.tensor((1, 2, 10, 80, 199), device=DEVICE).repeat(7)
    for positive in (False, True):
        assert_equal_to_naive(backend, score, k, positive=positive)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "positive"), [(torch.int32, False), (torch.int64, True)])
def test_k_may_differ_by_row(backend, dtype, positive):
    k = torch.randint(0, 132, (37,), generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    k[:2] = torch.tensor([0, 131])
    V = assert_equal_to_naive(backend, tied(37, 131), k, positive=positive)
    assert (V.sum(1) <= k).all()
    assert_equal_to_naive(backend, tied(37, 131), k.repeat_interleave(2)[::2], positive=positive)


@pytest.mark.parametrize("k", [20, 60, 131])
def test_positive_takes_nothing_else(backend, k):
    score = tied(37, 131) - 1
    V = assert_equal_to_naive(backend, score, k, positive=True)
    assert torch.equal(V.sum(1), (score > 0).sum(1).clamp(max=k))


@pytest.mark.slow
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("k", [20, 60])
def test_fixed_entries_are_kept(backend, k, positive):
    fixed = uniform(37, 131) < 0.1
    V = assert_equal_to_naive(backend, tied(37, 131) - 1, k, fixed=fixed, positive=positive)
    assert (V | ~fixed)[fixed.sum(1) <= k].all()


def test_ties_go_to_the_lower_index_across_chunks(backend):
    score = torch.ones(3, 131, device=DEVICE)
    score[1, :40] = 2
    score[2, 100:] = 2
    V = assert_equal_to_naive(backend, score, 70)
    assert V[0].nonzero().flatten().tolist() == list(range(70))
    assert V[1].nonzero().flatten().tolist() == list(range(70))
    assert V[2].nonzero().flatten().tolist() == [*range(39), *range(100, 131)]


@pytest.mark.slow
@pytest.mark.parametrize("positive", [False, True])
def test_signed_zeros_tie_and_infinities_are_scores(backend, positive):
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45, 3.4e38, -3.4e38], device=DEVICE)
    score = values.repeat(17)[:131].repeat(2, 1)
    score[1] = score[1].flip(0)
    for k in (1, 20, 60, 100, 131):
        assert_equal_to_naive(backend, score, k, positive=positive)


def test_zeros_of_either_sign_tie(backend):
    assert backend.lmo(torch.tensor([[-0.0, 0.0, -0.0, 0.0]], device=DEVICE), 2).tolist() == [
        [True, True, False, False]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_n_of_m_equals_naive(backend, n, m, positive):
    for score in (normal(37, 6 * m), tied(37, 6 * m)):
        V = assert_equal_to_naive(backend, score, n, group=m, positive=positive)
        if not positive:
            assert (V.view(37, 6, m).sum(2) == n).all()


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), GROUPS)
def test_n_of_m_in_chunks_with_fixed_entries(monkeypatch, n, m):
    config = dict(BLOCK_R=8, BLOCK_D=64, SEARCH_D=64)
    monkeypatch.setattr(lmo_module, "configuration", lambda rows, d, group: config)
    fixed = naive.lmo(normal(9, 10 * m, seed=7), n // 2, group=m)
    V = assert_equal_to_naive(triton_ops, tied(9, 10 * m), n, group=m, fixed=fixed)
    assert (V | ~fixed).all()


def test_n_of_m_is_the_best_of_every_group(backend):
    score = tied(1, 5)
    for n in range(6):
        best = max(itertools.combinations(range(5), n), key=lambda chosen: sum(score[0, list(chosen)].tolist()))
        assert backend.lmo(score, n, group=5)[0].nonzero().flatten().tolist() == list(best)


@pytest.mark.parametrize("score", [normal(2, 65536), tied(2, 65536)])
def test_lmo_of_the_longest_row(score):
    assert_equal_to_naive(triton_ops, score, 30000)


@pytest.mark.slow
def test_lmo_of_the_longest_row_in_chunks(monkeypatch):
    config = dict(BLOCK_R=2, BLOCK_D=4096, SEARCH_D=16384)
    monkeypatch.setattr(lmo_module, "configuration", lambda rows, d, group: config)
    assert_equal_to_naive(triton_ops, tied(2, 65536), 30000)


@pytest.mark.slow
def test_lmo_of_strided_scores(backend):
    score, fixed, out = tied(37, 131), uniform(37, 131) < 0.1, strided(garbage(37, 131, dtype=torch.bool))
    backend.lmo(strided(score), 60, fixed=strided(fixed), out=out)
    assert torch.equal(out, naive.lmo(score, 60, fixed=fixed))


@pytest.mark.parametrize("group", [0, 3])
def test_lmo_of_no_rows(backend, group):
    assert backend.lmo(torch.empty(0, 132, device=DEVICE), 2, group=group).shape == (0, 132)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("options", [dict(), dict(positive=True), dict(fixed=True)])
@pytest.mark.parametrize("d", [1, 60, 99, 131])
def test_nan_is_an_error(backend, d, options, sign):
    score = normal(20, 132)
    score[17, d] = torch.nan
    score[17, d] *= sign
    if "fixed" in options:
        options = dict(fixed=torch.ones_like(score, dtype=torch.bool))
    with pytest.raises(ValueError, match="score: NaN is no choice"):
        backend.lmo(score, 60, **options)


def test_nan_in_a_group_is_an_error(backend):
    score = normal(20, 132)
    score[17, 70] = torch.nan
    with pytest.raises(ValueError, match="score: NaN is no choice"):
        backend.lmo(score, 1, group=3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(score=torch.zeros(3, 4, dtype=torch.float16)), TypeError, "score: expected torch.float32"),
        (dict(score=torch.zeros(4)), ValueError, "score: expected two dimensions"),
        (dict(k=5), ValueError, "k: expected 0 to 4, got 5"),
        (dict(k=-1), ValueError, "k: expected 0 to 4, got -1"),
        (dict(k=3, group=2), ValueError, "k: expected 0 to 2, got 3"),
        (dict(group=3), ValueError, "group: expected a divisor of d = 4, got 3"),
        (dict(k=torch.ones(4, dtype=torch.int32)), ValueError, "k: expected an int, or 3 integers"),
        (dict(k=torch.ones(3)), ValueError, "k: expected an int, or 3 integers"),
        (dict(k=torch.ones(3, dtype=torch.int32), group=2), ValueError, "k: expected an int"),
        (dict(score=torch.zeros(3, 64), group=64), ValueError, "group: expected at most 32"),
        (dict(fixed=torch.zeros(3, 5, dtype=torch.bool)), ValueError, "fixed: expected shape"),
        (dict(fixed=torch.zeros(3, 4)), TypeError, "fixed: expected torch.bool"),
        (dict(out=torch.zeros(3, 4)), TypeError, "out: expected torch.bool"),
    ],
)
def test_lmo_refuses_bad_input(change, error, match):
    arguments = dict(score=torch.zeros(3, 4), k=2) | change
    moved = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    with pytest.raises(error, match=match):
        lmo(moved.pop("score"), moved.pop("k"), **moved)
