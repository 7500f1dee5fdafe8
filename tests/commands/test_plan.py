"""The plan's command line: what a config says, what is printed, and bad input in one line."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.families import config_of, save_model
from huggingface_hub.errors import LocalEntryNotFoundError

import sparsefw.run
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import evaluation_windows
from sparsefw.inputs import DEFAULT_MODEL
from sparsefw.plan import main

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(source, tmp_path):
    return config_of(source, tmp_path / "config")


SMALL = ["--nsamples", "8", "--seqlen", "32"]


def said(capsys, *argv):
    """The output of a good command line."""
    assert main([*map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def planned(capsys, tmp_path, *argv):
    """The content of the JSON of a good command line."""
    said(capsys, *argv, "--json", tmp_path / "plan.json")
    return json.loads((tmp_path / "plan.json").read_text())


def refused(capsys, *argv):
    """The error line of a bad command line."""
    assert main([*map(str, argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sparsefw: ")
    assert err.count("\n") == 1
    return err


def test_lines_and_json(config, tmp_path, capsys):
    path = tmp_path / "plan.json"
    out = said(capsys, "--model", config, "--gpu", "h100", *SMALL, "--json", path)
    content = json.loads(path.read_text())
    assert content["workload"]["precision"] == "bf16"
    assert set(content["memory"]) >= {"start", "calibrate", "solve", "reconstruct", "end"}
    assert content["limits"] == {"gpu": 72 * 10**9, "host": None}
    peak = max(peak["gpu"] for peak in content["memory"].values()) / 2**30
    assert re.search(rf"^all +{peak:.2f} ", out, re.MULTILINE)
    tokens = 4 * content["workload"]["windows"] * content["workload"]["seqlen"]
    assert content["recovery"] == {"tokens": tokens, "hours": None, "reruns": False}
    # The pruned blocks stay until the end.
    others = planned(capsys, tmp_path, "--model", config, "--gpu", "h100", *SMALL, "--recover", "0")
    assert (others["recovery"]["tokens"], others["disk"]["kept"]) == (0, 0)
    assert content["memory"].keys() - others["memory"].keys() == {"recover"}
    assert 0 < content["disk"]["kept"] < content["disk"]["output"]


def test_hours_of_no_recovery_are_refused_as_by_a_run(tmp_path, capsys):
    flags = "--hours=1", "--recover=0"
    assert "model: as many tokens as fit into 1 hours\n" in said(capsys, flags[0])
    line = refused(capsys, *flags)
    assert sparsefw.run.main([*flags, f"--output={tmp_path}/out"]) == 2
    assert capsys.readouterr().err == line


def test_defaults_are_those_of_a_run_on_that_device(config, tmp_path, capsys):
    def workload(*flags):
        return planned(capsys, tmp_path, "--model", config, *SMALL, *flags)["workload"]

    assert workload("--gpu", "h100", "--precision", "tf32")["precision"] == "tf32"
    if not torch.cuda.is_available():
        assert workload()["precision"] == "ieee"
    # The model's maximum counts, as in a run.
    assert workload("--seqlen", "2048")["seqlen"] == 64
    assert workload("--refit", "0")["target"] == "layer"
    assert workload("--eval", "a", "--eval", "b", "--eval-windows", "5")["evaluation"] == [5, 5]


def test_without_flags_it_is_the_built_in_models_run(tmp_path, capsys):
    """Its text is there: nobody has to say how long it is."""
    plan = planned(capsys, tmp_path)
    (windows,) = plan["workload"]["evaluation"]
    assert windows == evaluation_windows(load_tokenizer(DEFAULT_MODEL), "default", seqlen=128).n > 50
    assert "reconstruct" in plan["memory"]
    assert "reconstruct" not in planned(capsys, tmp_path, "--reconstruct", "0")["memory"]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--gpu-memory 8", "--gpu-memory 8.0: no CUDA device; a plan for another machine names its card (--gpu)"),
        ("--gpu rtx4090 --gpu-memory 23", "--gpu-memory 23.0: the GPU has 22.35 GiB free; a plan for another machine"),
        ("--gpu nothing", "argument --gpu: invalid choice: 'nothing' (choose from "),
        ("--host-memory 0.001", "--host-memory 0.001: this run needs at least"),
        ("--eval text.txt", "--eval text.txt: a plan reads no texts; give the number of its windows with --eval-win"),
        ("--json /nowhere/plan.json", "/nowhere/plan.json: No such file or directory"),
        ("--unheard-of", "unrecognized arguments: --unheard-of (--help lists the options)"),
    ],
)
def test_bad_flags_are_one_line(config, flags, line, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert line in refused(capsys, "--model", str(config), *SMALL, *flags.split())


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}", "transformers cannot load this config: "),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', "the model is quantized"),
    ],
)
def test_bad_configs_are_one_line(content, line, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert line in refused(capsys, "--model", tmp_path, *SMALL, "--gpu", "h100")


def test_no_model_there(tmp_path, capsys, monkeypatch):
    assert "config.json: missing" in refused(capsys, "--model", tmp_path)
    asked = []

    def download(*what, allow_patterns, **_):
        asked.append((*what, *allow_patterns))
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    line = refused(capsys, "--model", "org/name")
    assert "org/name: no such folder, and it could not be downloaded from the Hub: no network" in line
    assert asked == [("org/name", "config.json")]


def test_a_run_expects_and_refuses_what_its_plan_does(tmp_path, capsys, monkeypatch):
    """It refuses before a text is read: there is none here. What the plan names is enough for both."""
    # Other tests have made this process larger.
    monkeypatch.setattr("sparsefw.memory.resident", lambda: 400 << 20)
    text = tmp_path / "text.txt"
    source = save_model(tmp_path / "model", "llama", num_hidden_layers=2)
    for method in ("sparsefw", "wanda"):
        flags = ["--model", source, "--dataset", text, *SMALL, "--method", method]
        line = refused(capsys, *flags, "--host-memory", "0.1")
        run = [*map(str, flags), "--output", str(tmp_path / "out"), "--host-memory"]
        assert sparsefw.run.main([*run, "0.1"]) == 2
        assert capsys.readouterr().err == line
    enough = re.search(r"at least ([\d.]+) GiB", line)[1]
    plan = said(capsys, *flags, "--host-memory", enough)
    text.write_text(100 * "A rose is a rose is a rose. ")
    assert sparsefw.run.main([*run, enough]) == 0
    expected = re.search(r"^all +0.00 +([\d.]+)$", plan, re.MULTILINE)[1]
    assert f"memory: {expected} of {enough} GiB" in " ".join(capsys.readouterr().out.split())
