"""Runs on a pretended GPU; and that the pretended GPU refuses and counts as CUDA would."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import random_checkpoint
import torch
from helpers import verifying
from helpers.families import save_model
from helpers.pretended_gpu import NAME, SEGMENT, pretended_gpu
from helpers.problems import make_problem
from helpers.problems import on_gpu as problem_on_gpu
from torch import nn

from sparsefw import run
from sparsefw.driver import run as driver_run
from sparsefw.kernels import cpu, triton_ops
from sparsefw.kernels.backend import Backend
from sparsefw.kernels.repeat import LEAST, repeat
from sparsefw.model.activations import PLACES, PinnedActivations
from sparsefw.solver import frank_wolfe
from sparsefw.solver.reselect import reselect

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
    ("sparsity", "alpha", "precision", "options"),
    [
        ("0.6", 0.0, "tf32", {}),
        ("layer:0.6", 0.5, "bf16", {"step_rule": "open-loop"}),
        ("2:4", 0.0, "ieee", {"penalty": 0.0}),
    ],
)
def test_a_solve_waits_once_in_the_end(sparsity, alpha, precision, options, gpu, monkeypatch):
    """Everything is launched before the host checks that the errors are finite: no step waits."""
    problem = problem_on_gpu(make_problem(5, 24, sparsity, alpha))
    problem = replace(problem, damped=problem.G * 1.5, target_gap=problem.W / 2)
    backend = Backend(triton_ops, precision)
    options = {"steps": 3, "step_rule": "line-search", "penalty": 1.0, "backend": backend} | options
    gpu.waits.clear()
    assert len([state.error for state in frank_wolfe.iterate(problem, **options)]) == 3
    assert not gpu.waits
    frank_wolfe.solve(problem, swaps=2, **options)
    assert gpu.waits.total() == 1
    gpu.waits.clear()
    monkeypatch.setattr(frank_wolfe, "_check_finite", lambda error: None)
    frank_wolfe.solve(problem, swaps=2, **options)
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


def prune(source, output, *flags, stand_ins=False):
    """Prune on a pretended GPU; returns it with the report. Stand-ins for the kernels need no interpreter."""
    text = output.parent / "text.txt"
    text.write_text(5 * verifying.TEXT)
    places = ["--model", str(source), "--dataset", str(text), "--output", str(output)]
    with pretended_gpu() as gpu, pytest.MonkeyPatch.context() as patch:
        for name in triton_ops.__all__ if stand_ins else ():
            if name not in ("PRECISIONS", "repeat"):
                patch.setattr(triton_ops, name, gpu.as_kernel(getattr(cpu, name)))
        assert run.main([*places, *flags]) == 0
    return gpu, json.loads((output / "report.json").read_text())


@pytest.mark.parametrize(
    ("flags", "kernel"),
    [([], "triton (CUDA is available)"), (["--kernel", "torch"], "torch (as asked)")],
    ids=["default", "torch"],
)
def test_whole_run(flags, kernel, tmp_path, capsys):
    # A small model, since Triton's interpreter is slow.
    source = save_model(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=1)
    little = ["--nsamples", "2", "--seqlen", "16", "--steps", "1", "--refit", "1", "--rounds", "1"]
    gpu, report = prune(source, tmp_path / "out", *little, *flags)
    assert f"kernel: {kernel}, precision " in capsys.readouterr().out
    assert report["device"] == NAME
    assert report["memory"]["limits"]["gpu"] == int(0.9 * (80 << 30))
    assert report["memory"]["activations"] == "gpu"
    assert 0 < report["blocks"][0]["gpu_bytes"] <= gpu.peak
    assert 0 < report["peak_memory"]["gpu_bytes"] <= gpu.peak
    assert report["peak_memory"]["gpu_bytes"] < report["peak_memory"]["gpu_reserved_bytes"] <= gpu.peak + SEGMENT
    assert report["blocks"][0]["gpu_reserved_bytes"] == report["peak_memory"]["gpu_reserved_bytes"]
    assert gpu.allocated == 0
    _, said, failures = verifying.verdict(capsys, tmp_path / "out")
    assert not failures, said


def test_a_run_that_goes_over_its_limit_ends_in_one_line(tmp_path, monkeypatch, capsys):
    source = save_model(tmp_path / "model", "llama", torch.bfloat16, num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(5 * verifying.TEXT)
    place_of, free = driver_run.place, {"gpu": 1 << 40}
    # As if less memory were expected than is taken.
    monkeypatch.setattr(driver_run, "place", lambda s, w, limits, *a, **k: place_of(s, w, limits | free, *a, **k))
    flags = ["--nsamples", "4", "--seqlen", "32", "--method", "wanda", "--output", str(tmp_path / "out")]
    places = ["--model", str(source), "--dataset", str(tmp_path / "text.txt"), "--kernel", "torch"]
    with pretended_gpu() as gpu:
        assert run.main([*places, *flags, "--gpu-memory", "0.0001"]) == 1
        line = capsys.readouterr().err
        assert line.startswith("sparsefw: --gpu-memory 0.00: the run needed more of the GPU's memory, after 0.00 GiB;")
        assert line.count("\n") == 1
        # What comes after the run is not limited.
        assert gpu.most == 80 << 30
        assert run.main([*places, *flags, "--gpu-memory", "1"]) == 0


VARIANTS = {
    "micro-batches": ("llama", ["--nsamples", "136", "--alpha", "0.5", "--refit", "1", "--rounds", "0"]),
    "refit 0": ("llama", ["--refit", "0"]),
    "groups": ("llama", ["--sparsity", "2:4"]),
    "bf16": ("llama", ["--precision", "bf16"]),
    "sparsegpt": ("llama", ["--method", "sparsegpt"]),
    "compare": ("llama", ["--compare", "wanda"]),
    "paper": ("llama", ["--preset", "paper", "--sparsity", "layer:0.6"]),
    "mixture": ("qwen3_moe", ["--rounds", "1"]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_on_a_cpu(variant, pruned, tmp_path, capsys):
    """The same layers, budgets and errors.

    The errors are the same up to rounding, until two weights are so nearly as good as each other that rounding chooses.
    Then all layers behind them are given other inputs, and their errors are alike.
    """
    family, flags = VARIANTS[variant]
    flags = flags if "--precision" in flags else [*flags, "--precision", "ieee"]
    source, on_cpu = pruned(*flags, family=family)
    output = tmp_path / "out"
    with pretended_gpu():
        verifying.prune(source, output, *flags)
    rows = [json.loads((folder / "report.json").read_text())["layers"] for folder in (output, on_cpu)]
    for row, expected in zip(*rows, strict=True):
        for key in ("name", "method", "kept", "alpha", "target"):
            assert row[key] == expected[key]
    for key in ("error_warm_start", "error_mask", "error"):
        got, wanted = ([row[key] for row in each] for each in rows)
        assert sum(got) == pytest.approx(sum(wanted), rel=2e-2 if "bf16" in flags else 1e-2), key
        assert got[:3] == pytest.approx(wanted[:3], rel=1e-2), key
        if "bf16" not in flags:
            assert got == pytest.approx(wanted, rel=0.12), key
    _, printed, failures = verifying.verdict(capsys, output)
    assert not failures, printed


def test_placement_does_not_change_the_result(tmp_path, monkeypatch):
    source = save_model(tmp_path / "model", "llama", torch.bfloat16)
    flags = ["--nsamples", "5", "--seqlen", "32", "--steps", "1", "--refit", "1", "--rounds", "0"]
    flags += ["--eval", str(tmp_path / "text.txt"), "--eval-windows", "3"]
    place_of, contents = driver_run.place, {}
    for place in PLACES:

        def placed(*args, fixed=None, place=place, **kwargs):
            return place_of(*args, **kwargs, fixed={"batch": 2, "place": place} | (fixed or {}))

        monkeypatch.setattr(driver_run, "place", placed)
        output = tmp_path / place
        gpu, report = prune(source, output, *flags, stand_ins=True)
        assert (report["memory"]["activations"], report["memory"]["batch_windows"]) == (place, 2)
        assert gpu.allocated == 0
        contents[place] = [report["evaluation"], *(p.read_bytes() for p in sorted(output.glob("*.safetensors")))]
    assert set(report["evaluation"][0]["perplexity"]) == {"dense", "sparsefw"}
    assert contents["host"] == contents["gpu"]
    assert contents["file"] == contents["gpu"]


def test_the_host_is_no_more_than_one_micro_batch_ahead(gpu):
    """A micro-batch takes memory on the GPU as soon as it is launched."""
    activations = PinnedActivations(torch.device("cuda"))
    for n in range(4):
        activations.append(torch.full((1, 2, 3), float(n), device="cuda"))
    gpu.waits.clear()
    for n in range(4):
        assert activations[n].tolist() == [2 * [3 * [n]]]
    waits = {where.split()[0].rpartition("/")[2].partition(":")[0]: times for where, times in gpu.waits.items()}
    assert waits["activations.py"] == 3


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """Models large enough that no single tensor is most of what is held."""
    folder = tmp_path_factory.mktemp("random")
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 1024}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 16}
    random_checkpoint.generate(folder / "llama", "llama", **sizes)
    random_checkpoint.generate(folder / "qwen3_moe", "qwen3_moe", decoder_sparse_step=1, **sizes, **experts)
    return folder


WINDOWS = ["--nsamples", "8", "--seqlen", "64"]
WORKINGS = {
    "default": ("llama", WINDOWS),
    "refit 0": ("llama", [*WINDOWS, "--refit", "0"]),
    "rounds 0": ("llama", [*WINDOWS, "--rounds", "0"]),
    "sparsegpt": ("llama", [*WINDOWS, "--method", "sparsegpt"]),
    "compare": ("llama", [*WINDOWS, "--compare", "wanda", "--rounds", "0"]),
    "bf16": ("llama", [*WINDOWS, "--precision", "bf16", "--refit", "0"]),
    "groups": ("llama", [*WINDOWS, "--sparsity", "2:4"]),
    "evaluation": ("llama", [*WINDOWS, "--eval-windows", "4", "--refit", "0"]),
    "long windows": ("llama", ["--nsamples", "4", "--seqlen", "512"]),
    "many windows": ("llama", ["--nsamples", "64", "--seqlen", "64"]),
    "micro-batches": ("llama", ["--nsamples", "130", "--seqlen", "64", "--rounds", "0"]),
    "mixture": ("qwen3_moe", [*WINDOWS, "--rounds", "0"]),
    "mixture, refit 0": ("qwen3_moe", [*WINDOWS, "--refit", "0"]),
}


@pytest.mark.parametrize("working", WORKINGS)
def test_expected_memory_is_enough_and_not_much_more(working, random_models, tmp_path):
    family, flags = WORKINGS[working]
    if "--method" not in flags:
        flags = [*flags, "--steps", "1"]
    if "--eval-windows" in flags:
        flags = [*flags, "--eval", str(tmp_path / "text.txt")]
    gpu, report = prune(random_models / family, tmp_path / "out", *flags, stand_ins=True)
    expected = report["memory"]["expected"]["gpu"]
    assert expected / 3 <= gpu.peak <= expected
