"""repeat gives the same bits as step by step, and launches one graph; without a GPU, on a pretended one."""

from contextlib import nullcontext
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from helpers.families import first_is_fast
from helpers.kernel_inputs import needs_gpu
from helpers.pretended_gpu import pretended_gpu
from helpers.problems import make_problem, on_gpu, warm_of

from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.repeat import MIN_RUNS, repeat
from sparsefw.solver import frank_wolfe, paper

REAL = torch.cuda.is_available()
STEP_BY_STEP = SimpleNamespace(**vars(triton_ops) | {"repeat": cpu.repeat})


@pytest.fixture
def gpu():
    """The real GPU, which counts nothing, or a pretended one."""
    with nullcontext() if REAL else pretended_gpu() as gpu:
        yield gpu


def adding():
    """A step that adds the product of its two numbers to a sum, and that sum."""
    total, product = torch.zeros(2, 3, device="cuda"), torch.empty((), device="cuda")

    def step(x, y):
        torch.mul(x, y, out=product)
        total.add_(product)

    return step, total


@pytest.mark.parametrize("runs", [0, 1, 2, MIN_RUNS - 1, MIN_RUNS, 20])
def test_every_run_has_its_own_numbers(runs, gpu):
    step, total = adding()
    seen = [total.tolist()[0][0] for _ in repeat(step, [(i, 0.5) for i in range(runs)], total)]
    assert seen == [sum(range(i + 1)) / 2 for i in range(runs)]
    if not REAL:
        graphs = [(len(graph.launches), graph.replays) for graph in gpu.graphs]
        assert graphs == ([(2, runs - 1)] if runs >= MIN_RUNS else [])


@pytest.mark.parametrize(
    ("sparsity", "alpha", "penalty", "precision", "open_loop"),
    first_is_fast([("3:5", 0.5, 0.0, "bf16", True), ("0.6", 0.5, 0.3, "tf32x3", False)]),
)
def test_a_solve_has_the_bits_of_one_step_by_step(sparsity, alpha, penalty, precision, open_loop, gpu):
    problem = on_gpu(make_problem(5, 40, sparsity, alpha))
    problem = replace(problem, target_gap=problem.W.roll(1, 0) / 8)
    schedule = frank_wolfe.penalty_schedule(8, penalty)
    schedule = paper.open_loop(schedule) if open_loop else schedule
    backends = [Backend(operations, precision) for operations in (triton_ops, STEP_BY_STEP)]
    solved = [frank_wolfe.solve(problem, warm_of(problem), schedule, backend=backend) for backend in backends]
    for field in fields(frank_wolfe.Choice):
        graph, separate = (getattr(solution, field.name) for solution in solved)
        assert graph is separate or torch.equal(graph, separate), field.name
    if not REAL:
        # A graph holds the product and the row step only: it refuses operations that take memory.
        assert [(len(graph.launches), graph.replays) for graph in gpu.graphs] == [(2, 7)]


def test_an_error_while_capturing_leaves_the_gpu_as_it_was(gpu):
    step, total = adding()
    runs = []

    def failing(x, y):
        runs.append(1)
        if len(runs) == 2:
            raise KeyError("captured")
        step(x, y)

    with pytest.raises(KeyError, match="captured"):
        list(repeat(failing, [(1.0, 2.0)] * MIN_RUNS, total))
    assert (total + 1).tolist() == [[3.0] * 3] * 2


@needs_gpu
def test_a_graph_may_go_while_it_runs():
    """The memory of the graph and of its tensors is used again only after the last launch."""
    X = torch.randn(8192, 8192, device="cuda")
    U, last = torch.empty_like(X), []
    for _ in range(20):
        total = torch.zeros_like(X)

        def step(x, total=total):
            torch.mul(X, x, out=U)
            total.add_(U)

        for _ in repeat(step, [(1.0,)] * 8, X):
            pass
        last.append(total.clone())
        del total, step
        torch.full_like(X, torch.nan)
    assert all(torch.equal(x, last[0]) for x in last)
