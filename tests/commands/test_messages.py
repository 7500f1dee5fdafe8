"""Messages and log lines of the commands: one line each, whatever names the input has."""

import json
import logging
import sys

import transformers
from helpers.commands import run
from helpers.families import change_config, save_model

from sparsefw import plan, verify

# It clears the screen, breaks the line, and turns the direction of what follows.
HOSTILE = "a\x1b[2J\nb\u202ec"
SHOWN = r"a\x1b[2J\nb\u202ec"


def test_the_log_of_hostile_names(tmp_path, text, capsys):
    source = save_model(tmp_path / HOSTILE, "llama")
    named = tmp_path / f"{HOSTILE}.jsonl"
    named.write_text(json.dumps({"text": text.read_text()}) + "\n")
    capsys.readouterr()
    assert run(source, text, tmp_path / f"out {HOSTILE}", "--method", "magnitude", "--sparsity", "0.5") == 0
    said = capsys.readouterr().out
    assert verify.main([str(tmp_path / f"out {HOSTILE}")]) == 0
    said += capsys.readouterr().out
    assert plan.main(["--model", str(source), "--gpu", "h100"]) == 0
    said += capsys.readouterr().out
    assert all(line.isprintable() for line in said.split("\n"))
    assert said.count(f"{tmp_path}/{SHOWN}") > 1


def test_libraries_do_not_warn_beside_the_one_line(tmp_path, text, capsys):
    source = save_model(tmp_path / "model", "llama")
    # transformers warns of it, and fails later.
    change_config(source, pad_token_id=10**6)
    transformers.logging.set_verbosity_warning()
    capsys.readouterr()
    handler = logging.StreamHandler(sys.stderr)
    transformers.logging.add_handler(handler)
    try:
        assert run(source, text, tmp_path / "out") == 2
    finally:
        transformers.logging.remove_handler(handler)
    assert capsys.readouterr().err.count("\n") == 1
