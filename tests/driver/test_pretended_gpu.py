"""The pretended GPU refuses and counts as CUDA would; and solves on it wait for nothing but their end."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pretended_gpu import pretended_gpu
from helpers.problems import damped_problem, make_problem
from helpers.problems import on_gpu as problem_on_gpu

from sparsefw.finite import OnItsWay, all_finite
from sparsefw.kernels import triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.repeat import LEAST, repeat
from sparsefw.model.activations import Activations, Store
from sparsefw.solver import frank_wolfe, paper
from sparsefw.solver.refit import reselect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: no need to pretend one"),
]


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


def on_gpu(*shape):
    return torch.arange(float(np.prod(shape)), device="cuda").view(shape)


class TestPretence:
    @pytest.mark.parametrize(
        ("operate", "waits"),
        [
            (lambda x: x[0, 0].item(), 1),
            (lambda x: torch.empty(3, 4).copy_(x), 1),
            (lambda x: torch.ones(3).to("cuda", non_blocking=True), 1),
            (lambda x: x[x > 0], 1),
            (lambda x: torch.cuda.synchronize(), 1),
            (lambda x: torch.empty(3, 4).copy_(x, non_blocking=True), 0),
            (lambda x: torch.empty(3, pin_memory=True).to("cuda", non_blocking=True), 0),
            (lambda x: x.__setitem__(x > 0, 1.0), 0),
            (lambda x: (x @ x.T).kthvalue(2).values.sum() + 1, 0),
        ],
    )
    def test_waits_of_the_host_are_counted_by_line(self, operate, waits, gpu):
        x = on_gpu(3, 4)
        operate(x)
        line = f"tests/driver/{Path(__file__).name}:{operate.__code__.co_firstlineno} "
        assert gpu.waits.total() == waits
        assert all(where.startswith(line) for where in gpu.waits)

    @pytest.mark.parametrize("finite", [True, False])
    def test_a_bool_on_its_way_waits_for_its_copy_alone(self, finite, gpu):
        """To read the bool of the GPU itself waits for all that was launched."""
        flag = all_finite(on_gpu(3, 4) / finite)
        gpu.waits.clear()
        on_its_way = OnItsWay(flag)
        assert not gpu.waits
        assert bool(on_its_way) == finite
        assert [where.rpartition(" ")[2] for where in gpu.waits] == ["synchronize"]
        assert bool(OnItsWay(all_finite(torch.ones(3) / finite))) == finite


@pytest.mark.parametrize(
    ("sparsity", "alpha", "precision", "penalty"),
    [("0.6", 0.0, "tf32", 1.0), ("layer:0.6", 0.5, "bf16", 1.0), ("2:4", 0.0, "ieee", 0.0)],
)
def test_a_solve_waits_once_in_the_end(sparsity, alpha, precision, penalty, gpu, monkeypatch):
    """Everything is launched before the host checks that the errors are finite: no step waits."""
    problem = problem_on_gpu(make_problem(5, 24, sparsity, alpha))
    problem = replace(damped_problem(problem, problem.H * 1.5), target_gap=problem.W / 2)
    backend, schedule = Backend(triton_ops, precision), frank_wolfe.line_search(3, penalty)
    schedule = paper.open_loop(schedule) if alpha else schedule
    gpu.waits.clear()
    assert len([state.error for state in frank_wolfe.iterate(problem, schedule, backend=backend)]) == 3
    assert not gpu.waits
    frank_wolfe.solve(problem, schedule, swaps=2, backend=backend)
    assert gpu.waits.total() == 1
    gpu.waits.clear()
    monkeypatch.setattr(frank_wolfe, "check_errors", lambda errors: None)
    frank_wolfe.solve(problem, schedule, swaps=2, backend=backend)
    assert not gpu.waits


def test_steps_that_are_repeated_wait_for_nothing(gpu):
    total = on_gpu(2, 3)
    gpu.waits.clear()
    for _ in repeat(lambda x: total.add_(x), [(1.0,)] * LEAST, total):
        pass
    assert not gpu.waits


@pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
def test_refits_wait_for_nothing(sparsity, gpu):
    problem = problem_on_gpu(make_problem(5, 24, sparsity))
    gpu.waits.clear()
    options = {"steps": 3, "penalty": 1.0, "refit_steps": 2, "rounds": 2, "backend": Backend(triton_ops, "bf16")}
    assert reselect(problem, problem.warm, **options).error.is_cuda
    assert not gpu.waits


@pytest.mark.parametrize("place", ["host", "file"])
def test_the_host_is_no_more_than_one_micro_batch_ahead(place, gpu, tmp_path):
    """A micro-batch takes memory on the GPU as soon as it is launched, or page-locked memory."""
    activations = Activations(Store(torch.device("cuda"), place, tmp_path))
    for n in range(4):
        activations.append(torch.full((1, 2, 3), float(n), device="cuda"))
    gpu.waits.clear()
    for n in range(4):
        assert activations[n].tolist() == [2 * [3 * [n]]]
    waits = {where.split()[0].rpartition("/")[2].partition(":")[0]: times for where, times in gpu.waits.items()}
    assert waits["activations.py"] == 3
