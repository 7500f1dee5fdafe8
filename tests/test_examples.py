"""The scripts of examples/, on the built-in model and few windows.

tests/extras/ runs the one with tasks (evaluation/test_run.py) and the one of llm-compressor (test_llmcompressor.py).
"""

import runpy
from pathlib import Path

import torch

from sparsefw.default.text import training_text
from sparsefw.inputs import DEFAULT_MODEL

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FEW = dict(nsamples=4, seqlen=32, eval_windows=2, kernel="torch", progress=False)


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_prune_hub_model(out, capsys):
    main_of("prune_hub_model")("default", str(out), method="wanda", **FEW)
    printed = capsys.readouterr().out
    assert "\nwanda " in printed
    assert "The history of" in printed


def test_prune_encoder(tmp_path, capsys):
    sentences = training_text()[:10_000].split(". ")[:48]
    main_of("prune_encoder")(DEFAULT_MODEL, tmp_path / "out", sentences, method="wanda", progress=False)
    assert 0.3 < float(capsys.readouterr().out.split()[-1]) < 1
    assert (tmp_path / "out/tokenizer.json").exists()


def test_time_kernel(capsys):
    main_of("time_kernel")("48", "64", torch.float32)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["sparsefw", "torch"]
