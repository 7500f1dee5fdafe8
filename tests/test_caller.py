"""What the caller of `prune` and `evaluate` has set in the process changes no result, and is the same afterwards."""

import threading
from contextlib import contextmanager

import huggingface_hub.utils as hub
import pytest
import torch
from helpers.families import TOKENS, first_is_fast, save_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sparsefw import prune
from sparsefw.evaluation import evaluate
from sparsefw.evaluation.harness import StreamedLM


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
    return save_model(tmp_path_factory.mktemp("caller") / "model", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("caller") / "text.txt"
    path.write_text("a rose is a rose is a rose. " * 20)
    return path


@pytest.fixture(scope="module")
def plain(source, text, tmp_path_factory):
    """The pruned weights, and the dense model's perplexity, where nothing is set."""
    return results(source, text, tmp_path_factory.mktemp("plain") / "out")


def results(source, text, output):
    prune(source, output, **OPTIONS)
    (of_text,) = evaluate(source, texts=text, seqlen=16).texts
    return [path.read_bytes() for path in sorted(output.glob("*.safetensors"))], of_text


@pytest.mark.parametrize("mode", first_is_fast(MODES))
def test_modes_of_the_caller_change_nothing(mode, source, text, plain, tmp_path):
    with MODES[mode]():
        assert results(source, text, tmp_path / "out") == plain


def products():
    """What torch has been told of products of fp32, in all ways to tell it; None where it only reports a mixture."""

    def told(read):
        try:
            return read()
        except RuntimeError:
            return None

    return [
        told(torch.get_float32_matmul_precision),
        told(lambda: torch.backends.cuda.matmul.allow_tf32),
        *(of_library.fp32_precision for of_library in (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)),
    ]


def test_models_may_ask_for_the_precision_of_products(source, tmp_path):
    """A setting of the caller that contradicts what it is meanwhile would be an error for whoever reads it."""
    initial, seen = products(), []
    try:
        torch.set_float32_matmul_precision("high")
        before = products()
        prune(source, tmp_path / "first", **OPTIONS, log=lambda line: seen.append(products()))
        assert products() == before
        # By the libraries' own settings alone.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        before = products()
        prune(source, tmp_path / "second", **OPTIONS, log=lambda line: seen.append(products()))
        assert products() == before
    finally:
        torch.set_float32_matmul_precision("highest")
        for of_library, precision in zip((torch.backends.mkldnn, torch.backends.cuda), initial[2:], strict=True):
            of_library.matmul.fp32_precision = precision
    assert seen
    assert all(told == ["highest", False, "ieee", "ieee"] for told in seen)
    assert products() == initial


@pytest.mark.parametrize("shown", [True, False])
def test_libraries_show_what_they_did(shown, source, text):
    def settings():
        return logging.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()

    def set_bars(of_transformers, of_hub):
        (logging.enable_progress_bar if of_transformers else logging.disable_progress_bar)()
        (hub.enable_progress_bars if of_hub else hub.disable_progress_bars)()

    bars = settings()
    try:
        set_bars(shown, not shown)
        model = AutoModelForCausalLM.from_pretrained(source)
        prune(model, kernel="torch", method="magnitude", dataset=text, nsamples=2, seqlen=16)
        evaluate(source, texts=text, seqlen=16)
        StreamedLM(source)
        assert settings() == (shown, not shown)
    finally:
        set_bars(*bars)


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
