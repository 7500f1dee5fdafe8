"""The pretended GPU refuses and counts as CUDA would; and solves on it wait for nothing but their end."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pretended_gpu import NAME, pretended_gpu
from helpers.problems import damped_problem, make_problem
from helpers.problems import on_gpu as problem_on_gpu
from torch import nn

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
        "operate",
        [
            lambda x, host: x + host,
            lambda x, host: host @ x,
            lambda x, host: host.add_(x),
            lambda x, host: torch.cat([x, host]),
            lambda x, host: torch.where(host > 0, x, x),
            lambda x, host: torch.mul(x, 2, out=host),
            lambda x, host: torch.equal(x, host),
            lambda x, host: host[x.long()],
            lambda x, host: x.index_put_((x[0].long(),), host),
        ],
    )
    def test_operands_on_two_devices_are_refused(self, operate, gpu):
        with pytest.raises(RuntimeError, match=r"same device, but found .*cuda:0.*cpu|found .*cpu.*cuda:0"):
            operate(on_gpu(3, 3), torch.ones(3, 3))

    def test_numbers_and_indices_of_the_host_are_not(self, gpu):
        x = on_gpu(3, 3)
        for y in (x * torch.tensor(2.0), x[torch.tensor([2, 0])], torch.where(x > 1, x, 0.0)):
            assert y.device == torch.device("cuda", 0)
        x[1:] = 5
        x[x > 4] = -1
        assert x.tolist() == [[0, 1, 2], [-1] * 3, [-1] * 3]

    @pytest.mark.parametrize("convert", [lambda x: x.numpy(), np.asarray])
    def test_numpy_is_refused(self, convert, gpu):
        with pytest.raises(RuntimeError, match=r"numpy\(\) is not supported"):
            convert(on_gpu(3))
        assert convert(on_gpu(3).cpu()).tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.empty(2, device="cuda"),
            lambda: torch.as_tensor(5, device=torch.device("cuda", 0)),
            lambda: torch.ones(2).to("cuda", torch.float64),
            lambda: torch.ones(2).to("cuda").double(),
            lambda: torch.zeros_like(on_gpu(2)),
            lambda: on_gpu(2).type_as(on_gpu(2).double()),
            lambda: torch.softmax(on_gpu(2).bfloat16(), 0, dtype=torch.float32),
            lambda: nn.functional.one_hot(on_gpu(3).long(), 4),
            lambda: nn.Parameter(on_gpu(2)),
            lambda: ThreadPoolExecutor(1).submit(lambda: torch.ones(2).to("cuda")).result(),
        ],
    )
    def test_made_there_and_nowhere_else(self, make, gpu):
        assert make().device == torch.device("cuda", 0)
        assert gpu.allocated == 0

    def test_data_moves_there(self, gpu):
        buffer = nn.BatchNorm1d(3).running_mean
        buffer.data = buffer.data.to("cuda")
        assert buffer.is_cuda
        assert buffer.tolist() == [0, 0, 0]

    def test_bytes_of_a_storage_count_once_and_as_long_as_it_lives(self, gpu):
        x = torch.empty(3, 100, device="cuda")
        assert gpu.allocated == 1536
        view = x[1:].T
        y = x + 1
        y.mul_(2)
        assert gpu.allocated == 2 * 1536
        del x
        assert gpu.allocated == 2 * 1536
        del view
        assert gpu.allocated == 1536
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 1536
        del y
        assert gpu.allocated == 0
        assert gpu.peak == 2 * 1536
        assert torch.cuda.mem_get_info() == (80 << 30, 80 << 30)

    @pytest.mark.parametrize(
        ("operate", "waits"),
        [
            (lambda x: x[0, 0].item(), 1),
            (lambda x: bool((x > 0).all()), 1),
            (lambda x: x.tolist(), 1),
            (lambda x: x.cpu(), 1),
            (lambda x: torch.empty(3, 4).copy_(x), 1),
            (lambda x: x.copy_(torch.empty(3, 4)), 1),
            (lambda x: torch.ones(3).to("cuda"), 1),
            (lambda x: x.nonzero(), 1),
            (lambda x: x[x > 0], 1),
            (lambda x: x[torch.tensor([0, 1])], 1),
            (lambda x: torch.equal(x, x), 1),
            (lambda x: x.unique(), 1),
            (lambda x: torch.cuda.synchronize(), 1),
            (lambda x: [x[0, 0].item() for _ in range(3)], 3),
            (lambda x: torch.empty(3, 4).copy_(x, non_blocking=True), 0),
            (lambda x: torch.ones(3).to("cuda", non_blocking=True), 1),
            (lambda x: torch.empty(3, pin_memory=True).to("cuda", non_blocking=True), 0),
            (lambda x: x[x[0].long() % 3], 0),
            (lambda x: x.masked_fill_(x > 0, 1), 0),
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

    def test_a_captured_launch_runs_when_it_is_replayed(self, gpu):
        x, graph = on_gpu(3).fill_(1), torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        x[1:].mul_(2)
        graph.capture_end()
        assert x.tolist() == [1, 1, 1]
        x += 1
        graph.replay()
        graph.replay()
        assert x.tolist() == [2, 8, 8]

    @pytest.mark.parametrize(
        ("operate", "match"),
        [
            (lambda x: x.sum().item(), "takes memory"),
            (lambda x: x[0].item(), "not permitted when stream is capturing"),
            (lambda x: x + 1, "takes memory"),
            (lambda x: torch.empty(3, device="cuda"), "takes memory"),
        ],
    )
    def test_waits_and_memory_are_refused_while_capturing(self, operate, match, gpu):
        x, graph = on_gpu(3).fill_(1), torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        with pytest.raises(RuntimeError, match=match):
            operate(x)
        graph.capture_end()
        assert operate(x) is not None

    def test_nothing_is_left_of_it(self):
        def patched():
            of_tensors = {"to", "data"} & vars(torch.Tensor).keys()
            return torch.empty, torch.cuda.Stream, nn.functional.one_hot, of_tensors, torch._C._only_lift_cpu_tensors()

        before = patched()
        with pretended_gpu() as gpu:
            assert torch.cuda.is_available()
            assert torch.cuda.get_device_name() == NAME
            assert patched() != before
        assert not torch.cuda.is_available()
        assert patched() == before
        assert gpu.allocated == 0

    def test_models_on_the_meta_device_take_no_memory(self):
        # As in a process where nothing has used `with torch.device(...)` yet.
        torch.utils._device._device_constructors.cache_clear()
        with pretended_gpu(), torch.device("meta"):
            assert nn.Linear(2, 3).weight.is_meta
        with torch.device("meta"):
            assert nn.Linear(2, 3).weight.is_meta


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
