"""What the caller of `prune` and `evaluate` has set in the process changes no result, and is the same afterwards."""

import threading
from contextlib import contextmanager

import pytest
import torch
from helpers.commands import shards
from helpers.families import TOKENS, first_is_fast, save_model

from sparsefw import prune
from sparsefw.evaluation import evaluate


@contextmanager
def less_exact_products():
    """On processors that multiply in bf16, products of fp32 are made there."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


OPTIONS = dict(dataset=TOKENS, kernel="torch", method="magnitude", reconstruct=1)
MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "less exact products": less_exact_products,
    "no gradients": torch.no_grad,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("caller") / "model", "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory):
    """The pruned weights, and the dense model's perplexity, where nothing is set."""
    return results(source, tmp_path_factory.mktemp("plain") / "out")


def results(source, output):
    prune(source, output, **OPTIONS)
    (of_text,) = evaluate(source, texts="default", eval_windows=9, seqlen=16).texts
    return shards(output), of_text


@pytest.mark.parametrize("mode", first_is_fast(MODES))
def test_modes_of_the_caller_change_nothing(mode, source, plain, out):
    with MODES[mode]():
        assert results(source, out) == plain


def test_products_are_exact_meanwhile(source, tmp_path):
    """Also where a caller has set the precision of one library, which torch then refuses to read as a whole."""
    cuda, seen = torch.backends.cuda.matmul, []
    before = cuda.fp32_precision
    cuda.fp32_precision = "tf32"
    try:
        prune(source, tmp_path / "out", **OPTIONS, log=lambda line: seen.append(cuda.fp32_precision))
        assert cuda.fp32_precision == "tf32"
    finally:
        cuda.fp32_precision = before
    with less_exact_products():
        asked = torch.get_float32_matmul_precision
        prune(source, tmp_path / "other", **OPTIONS, log=lambda line: seen.append(asked()))
    assert {*seen} == {"ieee", "highest"}


def test_threads_take_turns(source, tmp_path):
    """What torch is told to do is told the whole process."""
    lines, others = [], []

    def run(name):
        prune(source, tmp_path / name, **OPTIONS, log=lambda line: hears(name))

    def hears(name):
        if not lines:
            others.append(threading.Thread(target=run, args=("second",)))
            others[0].start()
        elif not others[0].is_alive():
            # It must wait for its turn.
            lines.append("over")
        lines.append(name)

    run("first")
    others[0].join()
    assert lines == sorted(lines)
    assert lines.count("first") == lines.count("second")
    assert torch.get_deterministic_debug_mode() == 0
