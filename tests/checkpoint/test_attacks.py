"""Checkpoints made to do harm: each is read or refused in one line, opens nothing outside, and takes little.

`pytest` tries a few, always the same ones. `python tests/checkpoint/test_attacks.py --seed 1 --seconds 600` goes on.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import helpers.judged
import pytest
import torch
from helpers.attacks import draw
from helpers.checkpoints import TENSORS
from helpers.families import COMMON, save_model
from helpers.judged import bait_of, judged
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from sparsefw.checkpoint import tokenizer_trust
from sparsefw.checkpoint.source import inspect
from sparsefw.model import StreamedModel


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_attacks(kind, tmp_path):
    bait = bait_of(tmp_path)
    # Imported once, and not in each of the processes.
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON))
    for seed in range(8):
        assert judged(draw(random.Random(f"{kind} {seed}"), str(bait), kind, COMMON), bait) == []


def test_the_judge_sees_what_is_opened(tmp_path, monkeypatch):
    bait = bait_of(tmp_path)
    named = {"tokenizer_class": "GPT2Tokenizer", "vocab": str(bait / "file.json"), "merges": str(bait / "file")}
    files = {
        "config.json": b'{"model_type": "gpt2"}',
        "model.safetensors": save(TENSORS),
        "tokenizer_config.json": json.dumps(named).encode(),
    }
    assert judged(files, bait) == []
    monkeypatch.setattr(tokenizer_trust, "FOLLOWED", set())
    monkeypatch.setattr(tokenizer_trust, "SAFE", {*tokenizer_trust.SAFE, *named})
    assert f"opened {bait / 'file.json'}" in judged(files, bait)


def test_the_judge_sees_memory(tmp_path, monkeypatch):
    files = {"config.json": json.dumps({"model_type": "llama"} | COMMON).encode(), "model.safetensors": save(TENSORS)}
    assert judged(files, bait_of(tmp_path)) == []
    monkeypatch.setattr(helpers.judged, "BYTES", 0)
    assert [line for line in judged(files, tmp_path / "bait") if line.endswith(" GiB")]


def test_a_model_is_not_loaded_by_a_method_of_its_class(tmp_path, monkeypatch):
    """Some look for more files than the checked ones, and ask the Hub for them."""

    def from_pretrained(*names, **options):
        raise AssertionError(names)

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", from_pretrained)
    assert StreamedModel(inspect(save_model(tmp_path, "llama")), torch.device("cpu")).blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--keep", type=Path, help="folder for checkpoints with findings")
    options = parser.parse_args()
    started, tried, found = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as root:
        bait = bait_of(Path(root))
        while time.monotonic() - started < options.seconds:
            # Each has a seed of its own, to be tried again alone.
            name = f"{options.seed}-{tried}"
            files = draw(random.Random(name), str(bait))
            before = time.monotonic()
            if problems := judged(files, bait):
                found += 1
                print(f"{name}: {problems} ({time.monotonic() - before:.1f} s)", flush=True)
                for file, content in files.items() if options.keep else ():
                    (options.keep / name).mkdir(parents=True, exist_ok=True)
                    (options.keep / name / file).write_bytes(content)
            tried += 1
    print(f"{tried} checkpoints, {found} with findings, in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
