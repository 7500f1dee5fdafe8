"""Whole runs on a pretended GPU: results, placements and memory."""

import json
from contextlib import contextmanager

import pytest
import random_checkpoint
import torch
from helpers import verifying
from helpers.families import save_model
from helpers.pretended_gpu import DEVICE, NAME, SEGMENT, pretended_gpu
from helpers.stacks import drawn

from sparsefw import prune as prune_in_memory
from sparsefw import run
from sparsefw.driver import loop, reconstruct
from sparsefw.driver import run as driver_run
from sparsefw.estimate import placing
from sparsefw.kernels import cpu, triton_ops
from sparsefw.model.activations import PLACES
from sparsefw.report import PREDICTIONS, read_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: no need to pretend one"),
]


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
    little += ["--reconstruct", "0"]
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
        # The limit ends with the run.
        assert gpu.most == 80 << 30
        assert run.main([*places, *flags, "--gpu-memory", "1"]) == 0


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


def test_what_the_caller_has_on_the_gpu_is_expected():
    """Such as a model in memory: the limit counts it."""
    expected = []
    for size in (0, 64 << 20):
        model, batches = drawn("diffusion", 2)
        with pretended_gpu():
            held = torch.empty(size, dtype=torch.uint8, device="cuda")
            flags = {"kernel": "torch", "steps": 1, "refit": 0, "reconstruct": 0}
            expected.append(prune_in_memory(model, calibration=batches, **flags).report.memory.expected["gpu"])
            del held
    assert expected[1] - expected[0] == 64 << 20


VARIANTS = {
    "micro-batches": ("llama", ["--nsamples", "136", "--alpha", "0.5", "--refit", "1", "--rounds", "0"]),
    "refit 0": ("llama", ["--refit", "0"]),
    "groups": ("llama", ["--sparsity", "2:4"]),
    "bf16": ("llama", ["--precision", "bf16"]),
    "sparsegpt": ("llama", ["--method", "sparsegpt"]),
    "compare": ("llama", ["--compare", "wanda"]),
    "paper": ("llama", ["--preset", "paper", "--sparsity", "layer:0.6"]),
    "mixture": ("qwen3_moe", ["--rounds", "1"]),
    "reconstruct": ("llama", ["--method", "wanda", "--reconstruct", "4"]),
    "reconstruct, dense targets": ("llama", ["--reconstruct", "1", "--nsamples", "8", "--rounds", "0"]),
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
    check_reconstructions(*(read_report(folder / "report.json") for folder in (output, on_cpu)))
    _, printed, failures = verifying.verdict(capsys, output)
    assert not failures, printed


def check_reconstructions(report, expected):
    """As errors are: the first block's losses are the same up to rounding, and those behind it are alike."""
    asked = report.arguments["reconstruct"] > 0
    for n, (block, other) in enumerate(zip(report.blocks, expected.blocks, strict=True)):
        assert bool(block.reconstruction) == bool(other.reconstruction) == asked
        if not asked:
            continue
        mine, theirs = block.reconstruction, other.reconstruction
        assert (mine.steps, mine.put_back) == (theirs.steps, theirs.put_back)
        assert mine.before == pytest.approx(theirs.before, rel=0.12 if n else 1e-3)
        assert mine.after == pytest.approx(theirs.after, rel=0.12 if n else 1e-2)


def test_placement_does_not_change_the_result(tmp_path, monkeypatch):
    source = save_model(tmp_path / "model", "llama", torch.bfloat16)
    flags = ["--nsamples", "5", "--seqlen", "32", "--steps", "1", "--refit", "1", "--rounds", "0"]
    flags += ["--reconstruct", "0"]
    flags += ["--eval", str(tmp_path / "text.txt"), "--eval-windows", "3", "--reconstruct", "1"]
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
    "reconstruct": ("llama", [*WINDOWS, "--method", "wanda", "--reconstruct", "1"]),
    "reconstruct, dense targets": ("llama", [*WINDOWS, "--rounds", "0", "--reconstruct", "1"]),
    "reconstruct, long windows": (
        "llama", ["--nsamples", "4", "--seqlen", "512", "--method", "wanda", "--reconstruct", "1"],
    ),
    "reconstruct, micro-batches": (
        "llama",
        ["--nsamples", "34", "--seqlen", "64", "--method", "wanda", "--reconstruct", "1", "--ignore", "layers.1"],
    ),
    "reconstruct, mixture": ("qwen3_moe", [*WINDOWS, "--method", "wanda", "--reconstruct", "1"]),
    "reconstruct, compare": ("llama", [*WINDOWS, "--method", "wanda", "--compare", "magnitude", "--reconstruct", "1"]),
}  # fmt: skip


@pytest.mark.parametrize("working", WORKINGS)
def test_expected_memory_is_enough_and_not_much_more(working, random_models, tmp_path, monkeypatch):
    """The whole run's, and a reconstruction's by itself, since other phases may take more."""
    family, flags = WORKINGS[working]
    reconstructed = "--reconstruct" in flags
    if "--method" not in flags:
        flags = ["--reconstruct", "0", *flags, "--steps", "1"]
    if "--eval-windows" in flags:
        flags = [*flags, "--eval", str(tmp_path / "text.txt")]
    needs, peaks = [], []
    place_of, do = driver_run.place, loop.reconstruct

    def placed(*args, **kwargs):
        placement, needed = place_of(*args, **kwargs)
        needs.append(needed)
        return placement, needed

    def measured(*args):
        torch.cuda.reset_peak_memory_stats()
        found = do(*args)
        peaks.append(torch.cuda.max_memory_allocated())
        return found

    monkeypatch.setattr(driver_run, "place", placed)
    monkeypatch.setattr(loop, "reconstruct", measured)
    if working == "reconstruct, micro-batches":
        # Several windows in a micro-batch; else that takes thousands of windows.
        monkeypatch.setattr(placing, "LEAST_BATCHES", 2)
    gpu, report = prune(random_models / family, tmp_path / "out", *flags, stand_ins=True)
    assert (report["memory"]["batch_windows"] == 17) == (working == "reconstruct, micro-batches")
    expected = report["memory"]["expected"]["gpu"]
    assert expected / 3 <= gpu.peak <= expected
    if reconstructed:
        expected, _ = needs[-1].phases["reconstruct"]
        assert len(peaks) == 2
        assert expected / 2.5 <= max(peaks) <= expected, (peaks, expected)


def test_the_host_does_not_wait_in_a_step_of_a_reconstruction(tmp_path, monkeypatch):
    """Twice the steps, and no more waits of this project's, also where predictions are compared."""
    monkeypatch.setattr(reconstruct, "MOST_ROUNDS", 1)
    source, waits = save_model(tmp_path / "model", "llama", torch.bfloat16), []
    for passes in ("1", "2"):
        flags = ["--nsamples", "4", "--seqlen", "16", "--method", "wanda", "--reconstruct", passes]
        gpu, report = prune(source, tmp_path / passes, *flags, stand_ins=True)
        assert report["blocks"][-1]["reconstruction"]["loss"] == PREDICTIONS
        waits.append(gpu.waits)
    steps = 3
    # To predict, the model's own forward runs, in which transformers looks whether windows are packed.
    (where,) = more = waits[1] - waits[0]
    assert where.startswith("sparsefw/model/gradients.py")
    assert more[where] == 2 * steps
