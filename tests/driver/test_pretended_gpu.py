"""On a pretended GPU: solves wait for nothing but their end; results, placements and memory of whole runs."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import TEXT, report_of, shards
from helpers.families import experts_like, save_model
from helpers.pretended_gpu import DEVICE, NAME, SEGMENT, late_copies, pretended_gpu
from helpers.problems import make_problem, warm_of
from helpers.problems import on_gpu as problem_on_gpu
from helpers.stacks import drawn
from helpers.verifying import passed

from sparsefw import prune as prune_in_memory
from sparsefw import run
from sparsefw.arithmetic import AsyncBool, all_finite
from sparsefw.driver import run as driver_run
from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.model.activations import PLACES, Activations, Store, split_batches
from sparsefw.model.settings import ONE_BY_ONE
from sparsefw.solver import frank_wolfe, paper
from sparsefw.solver.refit import reselect

pytestmark = pytest.mark.slow


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


def on_gpu(*shape):
    return torch.arange(float(np.prod(shape)), device="cuda").view(shape)


@pytest.mark.parametrize("finite", [True, False])
def test_a_bool_on_its_way_waits_for_its_copy_alone(finite, gpu):
    """To read the bool of the GPU itself waits for all that was launched."""
    flag = all_finite(on_gpu(3, 4) / finite)
    gpu.waits.clear()
    on_its_way = AsyncBool(flag)
    assert not gpu.waits
    assert bool(on_its_way) == finite
    assert [where.rpartition(" ")[2] for where in gpu.waits] == ["synchronize"]
    assert bool(AsyncBool(all_finite(torch.ones(3) / finite))) == finite


@pytest.mark.parametrize(
    ("sparsity", "alpha", "precision", "penalty"),
    [("0.6", 0.0, "tf32", 1.0), ("layer:0.6", 0.5, "bf16", 1.0), ("2:4", 0.0, "ieee", 0.0)],
)
def test_a_solve_waits_once_in_the_end(sparsity, alpha, precision, penalty, gpu, monkeypatch):
    """Everything is launched before the host checks that the errors are finite: no step waits."""
    problem = problem_on_gpu(make_problem(5, 24, sparsity, alpha))
    problem, warm = replace(problem, H=problem.G * 1.5, target_gap=problem.W / 2), warm_of(problem)
    backend, schedule = Backend(triton_ops, precision), frank_wolfe.penalty_schedule(3, penalty)
    schedule = paper.open_loop(schedule) if alpha else schedule
    gpu.waits.clear()
    assert len([state.error for state in frank_wolfe.iterate(problem, warm, schedule, backend=backend)]) == 3
    assert not gpu.waits
    frank_wolfe.solve(problem, warm, schedule, swaps=2, backend=backend)
    assert gpu.waits.total() == 1
    gpu.waits.clear()
    monkeypatch.setattr(frank_wolfe, "check_errors", lambda errors: None)
    frank_wolfe.solve(problem, warm, schedule, swaps=2, backend=backend)
    assert not gpu.waits


@pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
def test_refits_wait_for_nothing(sparsity, gpu):
    problem = problem_on_gpu(make_problem(5, 24, sparsity))
    warm = warm_of(problem)
    gpu.waits.clear()
    options = {"steps": 3, "penalty": 1.0, "refit_steps": 2, "rounds": 2, "backend": Backend(triton_ops, "bf16")}
    assert reselect(problem, warm, **options).error.is_cuda
    assert not gpu.waits


@pytest.mark.parametrize("place", ["host", "file"])
def test_the_host_is_no_more_than_one_micro_batch_ahead(place, gpu, tmp_path):
    """A micro-batch takes memory on the GPU as soon as it is launched, or page-locked memory."""
    activations = Activations(Store(DEVICE, place, tmp_path))
    for n in range(4):
        activations.append(torch.full((1, 2, 3), float(n), device="cuda"))
    gpu.waits.clear()
    for n in range(4):
        assert activations[n].tolist() == [2 * [3 * [n]]]
    waits = {where.split()[0].rpartition("/")[2].partition(":")[0]: times for where, times in gpu.waits.items()}
    assert waits["activations.py"] == 3


def test_what_is_read_ahead_and_skipped_leaves_the_gpu(gpu):
    """Micro-batches that are held out are read alone, and skipped where layers are watched."""
    activations = Activations(Store(DEVICE, "host"))
    for _ in range(64):
        activations.append(torch.zeros(1, 8, 16, device="cuda"))
    before, most = gpu.allocated, 0
    for j in [*split_batches(64)[0], *split_batches(64)[1], *range(64)]:
        assert activations[j].is_cuda
        most = max(most, gpu.allocated - before)
    # The one that was read has gone: one ahead is left.
    assert most == 8 * 16 * 4


def test_a_copy_in_waits_for_the_copy_out_of_the_same_tensor_alone(gpu, monkeypatch):
    """They are on streams of their own, also where a micro-batch is cut into the windows of steps."""
    activations = Activations(Store(DEVICE, "host"))
    store, awaited = activations.store, []
    assert store.inward is not store.outward
    monkeypatch.setattr(store.outward, "record_event", lambda: SimpleNamespace(number=len(activations)))
    monkeypatch.setattr(store.inward, "wait_event", lambda event: awaited.append(event.number))
    activations._left = None
    for _ in range(3):
        activations.append(torch.zeros(2, 8, device="cuda"))
        activations._left = None
    for each in (activations, activations.some([2, 1], 1)):
        assert all(x.is_cuda for x in each)
    assert awaited == [0, 1, 2, 2, 2, 1, 1]


def test_two_copies_out_at_most_are_on_their_way(gpu, monkeypatch):
    """Each holds a micro-batch on the GPU. A link may be slower than the work, and kept inputs are only added to."""
    under_way, most = [], []

    def recorded():
        under_way.append(copy := SimpleNamespace(synchronize=lambda: under_way.remove(copy)))
        most.append(len(under_way))
        return copy

    activations = Activations(Store(DEVICE, "host"))
    monkeypatch.setattr(activations.store.outward, "record_event", recorded)
    for n in range(4):
        activations.append(torch.full((1, 2, 3), float(n), device="cuda"))
    for n in range(4):
        activations[n] = torch.full((1, 2, 3), float(n), device="cuda")
    assert (len(most), max(most)) == (8, 2)


def prune(source, output, *flags, stand_ins=False):
    """Prune on a pretended GPU; returns it with the report. Stand-ins for the kernels need no interpreter."""
    text = output.parent / "text.txt"
    text.write_text(5 * TEXT)
    places = ["--model", str(source), "--dataset", str(text), "--output", str(output)]
    with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        for name, operation in vars(triton_ops).copy().items() if stand_ins else ():
            if callable(operation) and name in vars(cpu) and name != "repeat":
                patch.setattr(triton_ops, name, gpu.as_kernel(getattr(cpu, name)))
        assert run.main([*places, *flags]) == 0
    return gpu, report_of(output)


def test_the_peak_of_a_run_has_that_of_generated_text(tmp_path):
    """The whole model is on the GPU then, and a block at a time later."""
    source = save_model(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=12)
    flags = "--nsamples 2 --seqlen 16 --dataset self --method wanda --recover 0 --kernel torch"
    gpu, report = prune(source, tmp_path / "out", *flags.split())
    assert report["blocks"][-1]["gpu_bytes"] < report["peak_memory"]["gpu_bytes"] == gpu.peak


def test_whole_run(tmp_path, out, capsys):
    # A small model, since Triton's interpreter is slow.
    source = save_model(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=1)
    little = ["--nsamples", "2", "--seqlen", "16", "--steps", "1", "--refit", "1", "--rounds", "0"]
    gpu, report = prune(source, out, *little, "--reconstruct", "0")
    assert (
        "kernel: triton (TRITON_INTERPRET is set, so Triton's interpreter: exact and slow), " in capsys.readouterr().out
    )
    assert report["device"] == NAME
    assert report["memory"]["limits"]["gpu"] == int(0.9 * (80 << 30))
    assert report["memory"]["activations"] == "gpu"
    assert 0 < report["blocks"][0]["gpu_bytes"] <= gpu.peak
    assert 0 < report["peak_memory"]["gpu_bytes"] <= gpu.peak
    assert report["peak_memory"]["gpu_bytes"] < report["peak_memory"]["gpu_reserved_bytes"] <= gpu.peak + SEGMENT
    assert report["blocks"][0]["gpu_reserved_bytes"] == report["peak_memory"]["gpu_reserved_bytes"]
    assert gpu.allocated == 0
    passed(capsys, out)


def test_a_model_in_memory_is_limited_on_its_own_gpu():
    """It may be on another GPU than the caller's current one; torch limits and measures the current one."""
    model, batches = drawn("diffusion", 2)
    current, seen = [torch.device("cuda", 1)], []

    @contextmanager
    def device(device):
        current.append(device)
        yield
        current.pop()

    def on_current(function):
        return lambda *args, **kwargs: (seen.append(current[-1]), function(*args, **kwargs))[1]

    names = ("mem_get_info", "synchronize", "max_memory_allocated", "set_per_process_memory_fraction")
    with pretended_gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device", device)
        for name in names:
            patch.setattr(torch.cuda, name, on_current(getattr(torch.cuda, name)))
        flags = {"kernel": "torch", "steps": 1, "refit": 0, "reconstruct": 0, "gpu_memory": 1}
        result = prune_in_memory(model.to("cuda"), calibration=batches, **flags)
    assert len(result.layers) > 0
    assert {*seen} == {DEVICE}


def test_placement_does_not_change_the_result(tmp_path, monkeypatch):
    source = save_model(tmp_path / "model", "qwen3_moe", torch.bfloat16, num_hidden_layers=2)
    flags = ["--nsamples", "5", "--seqlen", "32", "--steps", "1", "--refit", "1", "--rounds", "0"]
    flags += ["--eval", str(tmp_path / "text.txt"), "--eval-windows", "3", "--reconstruct", "1", "--recover", "160"]
    place_of, contents = driver_run.place, {}
    for place in PLACES:

        def placed(*args, fixed=None, place=place, **kwargs):
            chosen = {"batch": 2, "place": place, "ahead": place != "host"}
            return place_of(*args, **kwargs, fixed=chosen | (fixed or {}))

        monkeypatch.setattr(driver_run, "place", placed)
        output = tmp_path / place
        gpu, report = prune(source, output, *flags, stand_ins=True)
        assert (report["memory"]["activations"], report["memory"]["batch_windows"]) == (place, 2)
        # The third micro-batch is held out; steps take one window of the others.
        assert (report["memory"]["step_windows"], report["blocks"][0]["reconstruction"]["steps"]) == (1, 4)
        assert gpu.allocated == 0
        contents[place] = [report["evaluation"], shards(output)]
    assert set(report["evaluation"][0]["perplexity"]) >= {"dense", "sparsefw"}
    assert contents["host"] == contents["gpu"]
    assert contents["file"] == contents["gpu"]


def test_the_thread_that_writes_a_block_waits_for_its_copies(tmp_path, monkeypatch):
    """The main thread continues; the copies are complete only after their event."""
    source = save_model(tmp_path / "model", "llama", torch.bfloat16)
    flags = ["--nsamples", "2", "--seqlen", "16", "--method", "wanda", "--compare", "magnitude", "--reconstruct", "0"]
    gpu, report = prune(source, tmp_path / "plain", *flags, stand_ins=True)
    waits = Counter(where.partition(":")[0] for where in gpu.waits.elements())
    assert not waits.keys() & {"sparsefw/model/skeleton.py", "sparsefw/memory.py"}
    assert waits["sparsefw/driver/finished.py"] == len(report["blocks"])
    spans = [span["phase"] for span in report["timeline"] if span["lane"] == "main"]
    assert waits["sparsefw/timeline.py"] == sum(phase not in ("wait", "write") for phase in spans)
    place_of = driver_run.place
    # The main thread waits for no event while a block is written then.
    monkeypatch.setattr(driver_run, "place", lambda *args, **options: place_of(*args, fixed={"ahead": False}))
    late_copies(monkeypatch)
    prune(source, tmp_path / "late", *flags, stand_ins=True)
    assert shards(tmp_path / "plain") == shards(tmp_path / "late")


def test_the_host_does_not_wait_in_a_step_of_a_reconstruction(tmp_path):
    """Twice the steps, and no more waits."""
    source, waits = save_model(tmp_path / "model", "llama", torch.bfloat16), []
    for passes in ("1", "2"):
        flags = ["--nsamples", "4", "--seqlen", "16", "--method", "wanda", "--reconstruct", passes]
        gpu, report = prune(source, tmp_path / passes, *flags, stand_ins=True)
        assert report["blocks"][-1]["reconstruction"]
        waits.append(gpu.waits)
    assert not waits[1] - waits[0]


def test_the_host_waits_once_in_a_forward_of_experts(gpu):
    waits = []
    for name in ("eager", ONE_BY_ONE):
        experts, inputs = experts_like("qwen3_moe")
        experts.config._experts_implementation = name
        experts, inputs = experts.to("cuda"), [x.to("cuda") for x in inputs]
        gpu.waits.clear()
        experts(*inputs)
        waits.append(gpu.waits.total())
    assert waits == [5 * experts.num_experts + 1, 1]
