"""The plan's command line: what a config says, what is printed, and bad input in one line."""

import json
import os
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
from helpers.families import config_of, save_model
from huggingface_hub.errors import LocalEntryNotFoundError

from sparsefw import data
from sparsefw.estimate import rates
from sparsefw.inputs import DEFAULT_MODEL
from sparsefw.model import predictions
from sparsefw.plan import main

LLAMA_70B = dict(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    model_type="llama",
    torch_dtype="bfloat16",
)


@pytest.fixture
def config(tmp_path):
    return config_of(save_model(tmp_path / "model", "llama"), tmp_path / "config")


SMALL = ["--nsamples", "8", "--seqlen", "32"]


def said(capsys, *argv):
    """The output of a good command line."""
    assert main([*map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


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
    rate = ["--tflops", "2", "--tflops", "tf32=4", "--bandwidth", "3", "--disk", "5"]
    out = said(capsys, "--model", config, "--gpu", "h100", *SMALL, *rate, "--json", path)
    content = json.loads(path.read_text())
    assert "products of a solve by sparsefw: 39 (steps 16, refits 15, target 4, starts 1, errors 3)" in out
    assert content["workload"]["precision"] == "bf16"
    assert content["rates"]["flops"] == {"bf16": 2e12, "tf32": 4e12, "ieee": 2e12}
    assert (content["rates"]["bandwidth"], content["rates"]["disk"]) == (3e9, 5e9)
    assert list(content["phases"]) == ["read", "calibrate", "solve", "reconstruct", "forward", "write", "all"]
    every = content["phases"].pop("all")
    assert every["run"]["flops"] == sum(row["run"].get("flops", 0) for row in content["phases"].values())
    assert content["phases"]["solve"]["run"]["flops"] == 3 * content["phases"]["solve"]["block"]["flops"]
    assert set(content["memory"]) >= {"start", "calibrate", "solve", "write", "end"}
    assert content["limits"]["host"] is None
    assert f"hours: at least {content['seconds']['all'] / 3600:.3f}, at bf16 2 Tflop/s" in out


def test_hours_need_rates(config, capsys):
    out = said(capsys, "--model", config, "--gpu", "h100", *SMALL)
    assert "hours: not known: no rates of this card were measured yet; give --tflops and --bandwidth, or" in out
    assert "GB/s as measured here, the disk at no time" in said(capsys, "--model", config, *SMALL, "--measure")


def test_several_gpus_and_machines(config, tmp_path, capsys):
    path = tmp_path / "plan.json"
    rate = ["--tflops", "2", "--bandwidth", "3"]
    several = ["--gpu", "h100", "--gpus", "2", "--nodes", "3", "--host-memory", "8", "--network", "20"]
    out = said(capsys, "--model", config, *SMALL, *rate, *several, "--json", path)
    content = json.loads(path.read_text())
    assert "ranks: 6, 2 on each of 3 machines; work, memory and hours are of the rank with the most" in out
    assert "largest share over the mean one: windows 1.500, rows " in out
    assert "% of the run, at 400 GB/s on a machine (assumed), 20 GB/s between machines\n" in out
    assert (content["ranks"]["gpus"], content["ranks"]["nodes"]) == (2, 3)
    assert content["limits"]["host"] == 4 * 2**30
    sent = content["traffic"]
    assert sent["run"] == {kind: 3 * nbytes for kind, nbytes in sent["block"].items()}
    assert set(sent["block"]) == {"sum", "sum_at", "spread"}
    assert sent["links"]["assumed"] == ["inside"]
    assert sent["seconds"] > sum(sent["run"].values()) / 20e9
    assert sent["share"] == pytest.approx(sent["seconds"] / content["seconds"]["all"])
    assert content["seconds"]["exchange"] > sent["seconds"]
    out = said(capsys, "--model", config, *SMALL, "--gpu", "h100", "--gpus", "2", "--link", "7")
    assert "transfers: at least 0.0000 hours, at 7 GB/s on a machine\n" in out


def test_a_block_that_sends_is_not_the_last_one_which_has_more_steps(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predictions, "LEAST", 1)
    path = tmp_path / "plan.json"
    said(capsys, "--model", config, *SMALL, "--gpu", "h100", "--gpus", "2", "--method", "wanda", "--reconstruct", "1",
         "--json", path)  # fmt: skip
    sent = json.loads(path.read_text())["traffic"]
    # The last of three blocks sums its gradients twice as often, and all else once.
    assert 3 * sent["block"]["sum"] < sent["run"]["sum"] < 4 * sent["block"]["sum"]


def test_one_gpu_sends_nothing(config, tmp_path, capsys):
    out = said(capsys, "--model", config, *SMALL, "--gpu", "h100", "--gpus", "1", "--json", tmp_path / "plan.json")
    assert "ranks" not in out
    assert "sent" not in out
    assert not {"ranks", "traffic"} & set(json.loads((tmp_path / "plan.json").read_text()))


def test_gpus_that_are_here(config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--gpus 3: 2 here; to plan for other machines, name their card with" in refused(
        capsys, "--model", config, *SMALL, "--gpus", "3"
    )


def test_rates_of_a_card_that_was_measured(config, capsys, monkeypatch):
    monkeypatch.setitem(rates.MEASURED_ROOFS, "l4", {"copy": 1e9, "bf16": 1e12, "tf32": 2e12, "ieee": 3e12})
    out = said(capsys, "--model", config, "--gpu", "l4", *SMALL)
    assert "at bf16 1 Tflop/s, tf32 2 Tflop/s, ieee 3 Tflop/s, memory 1 GB/s as measured on l4, the disk at no" in out


def test_defaults_are_those_of_a_run_on_that_device(config, tmp_path, capsys):
    def workload(*flags):
        said(capsys, "--model", config, *SMALL, *flags, "--json", tmp_path / "plan.json")
        return json.loads((tmp_path / "plan.json").read_text())["workload"]

    assert workload("--gpu", "h100")["precision"] == "bf16"
    assert workload("--gpu", "h100", "--precision", "tf32")["precision"] == "tf32"
    if not torch.cuda.is_available():
        assert workload()["precision"] == "ieee"
    # The model's maximum counts, as in a run.
    assert workload("--seqlen", "2048")["seqlen"] == 64
    assert workload("--refit", "0")["target"] == "layer"
    assert workload("--eval", "a", "--eval", "b", "--eval-windows", "5")["evaluation"] == [5, 5]


def test_without_flags_it_is_the_embedded_models_run(tmp_path, capsys):
    """Its text is there: nobody has to say how long it is."""

    def planned(*flags):
        said(capsys, *flags, "--json", tmp_path / "plan.json")
        return json.loads((tmp_path / "plan.json").read_text())

    plan = planned()
    (windows,) = plan["workload"]["evaluation"]
    text = data.read_text("default", part="evaluation")
    with data.TokenizerProcess(DEFAULT_MODEL) as tokenizer:
        assert windows == data.evaluation_windows(tokenizer, text, seqlen=128).n > 50
    assert planned("--seqlen", "64")["workload"]["evaluation"][0] >= 2 * windows
    assert "reconstruct" in plan["memory"]
    assert "reconstruct" not in planned("--reconstruct", "0")["memory"]
    assert "texts are not read here" in refused(capsys, "--eval", "other.txt")


def test_layers_that_stay_dense(config, tmp_path, capsys):
    def phases(*flags):
        said(capsys, "--model", config, *SMALL, *flags, "--json", tmp_path / "plan.json")
        return json.loads((tmp_path / "plan.json").read_text())["phases"]

    # Otherwise windows go on inside a block that is pruned, and run through the whole of one that is not.
    flags = ("--target", "layer")
    every, some, one = phases(*flags), phases(*flags, "--ignore", "layers.1"), phases(*flags, "--include", "layers.2")
    assert every["forward"] == some["forward"] == one["forward"]
    for kind in ("flops", "bytes"):
        assert every["solve"]["run"][kind] * 2 == some["solve"]["run"][kind] * 3 == one["solve"]["run"][kind] * 6
    said(capsys, "--model", config, *SMALL, "--ignore", "self_attn", "--ignore", r"re:.*\.0\.", "--keep-zeros")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--gpu nothing", "argument --gpu: invalid choice: 'nothing' (choose from 'a10', "),
        ("--gpu h100 --gpu-memory 0", "--gpu-memory 0.00: this run needs at least"),
        ("--host-memory 0.01", "--host-memory 0.01: this run needs at least"),
        ("--gpu h100 --measure --tflops 1", "--measure: finds what --tflops and --bandwidth say"),
        ("--tflops 1", "--tflops and --bandwidth: hours need both of them"),
        ("--tflops fp8=1 --bandwidth 1", "--tflops fp8=1: expected a positive number"),
        ("--tflops nan --bandwidth 1", "--tflops nan: expected a positive number"),
        ("--tflops tf32=1 --bandwidth 1 --gpu h100", "the run multiplies in ieee too; give ieee=N as well"),
        ("--disk 0", "argument --disk: 0: expected a positive number (--help lists the options)"),
        ("--eval text.txt", "--eval text.txt: texts are not read here; say how long it is with --eval-windows"),
        ("--sparsity 2", "--sparsity 2: the fraction removed lies between 0 and 1"),
        ("--steps -1", "--steps -1: expected at least 0"),
        ("--host-memory -1", "--host-memory -1.0: expected at least 0"),
        ("--host-memory 1e7", "--host-memory 10000000.0: expected at least 0 and at most 1048576"),
        ("--gpu h100 --gpu-memory nan", "--gpu-memory nan: expected at least 0"),
        ("--ignore lm_head", "--ignore lm_head: no layer of the model has this name; one is model.layers.0."),
        ("--include up_proj --ignore mlp", "--include, --ignore: no layer is left to prune"),
        ("--json /nowhere/plan.json", "--json /nowhere/plan.json: cannot be written"),
        ("--gpu h100 --gpus 0", "--gpus 0: expected at least 1 and at most 4096"),
        ("--gpu h100 --nodes 5000", "--nodes 5000: expected at least 1 and at most 4096"),
        ("--gpu h100 --gpus two", "argument --gpus: invalid int value: 'two'"),
        ("--gpu h100 --gpus 9", "--gpus 9: 9 GPUs share 8 calibration windows, and each needs one"),
        ("--gpu h100 --gpus 3 --nodes 3", "--gpus 3: 9 GPUs share 8 calibration windows, and each needs one"),
        ("--gpu h100 --link 400", "--link: there is one GPU on a machine; give --gpus, too"),
        ("--gpu h100 --gpus 2 --network 50", "--network: there is one machine; give --nodes, too"),
        ("--gpu h100 --gpus 2 --link 0", "argument --link: 0: expected a positive number"),
        ("--unheard-of", "unrecognized arguments: --unheard-of (--help lists the options)"),
    ],
)
def test_bad_flags_are_one_line(config, flags, line, capsys):
    assert line in refused(capsys, "--model", str(config), *SMALL, *flags.split())


def test_flags_of_a_gpu_that_is_not_here(config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device here; say which card" in refused(capsys, "--model", config, *SMALL, "--gpu-memory", "8")
    assert "--gpus 2: no CUDA device here; say which card" in refused(capsys, "--model", config, *SMALL, "--gpus", "2")
    assert "no GPU is here" in refused(capsys, "--model", config, *SMALL, "--gpu", "h100", "--measure")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "config.json: not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "transformers cannot build this model"),
        ('{"model_type": "unheard_of"}', "has no class for model_type unheard_of"),
        ('{"model_type": "vit"}', "vit is none that generates text"),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', "the model is quantized"),
        ('{"model_type": "llama", "num_hidden_layers": 1000000000}', "num_hidden_layers is 1000000000, which no model"),
        ('{"model_type": "llama", "vocab_size": 1000000000000}', "vocab_size is 1000000000000, which no model has"),
        ('{"model_type": "llama", "hidden_size": 1000000, "num_attention_heads": 1000}', "asks for model."),
        ('{"model_type": "llama", "hidden_size": -1}', "transformers cannot build this model"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "num_hidden_layers is 0: there is nothing to prune"),
    ],
)
def test_bad_configs_are_one_line(content, line, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert line in refused(capsys, "--model", tmp_path, *SMALL, "--gpu", "h100")


def test_a_layer_that_does_not_fit_the_pattern(config, capsys):
    assert "model.layers.0.mlp.down_proj.weight: 48 inputs do not divide into groups of 32" in refused(
        capsys, "--model", config, *SMALL, "--sparsity", "16:32"
    )


def test_a_block_that_cannot_be_run_is_one_line(config, capsys, monkeypatch):
    def fails(model):
        raise RuntimeError("no such kernel\nat all")

    # The package exports a function of the module's name.
    monkeypatch.setattr(sys.modules["sparsefw.estimate.describe"], "shape_of", fails)
    assert "unsupported model: a block cannot be run: no such kernel\n" in refused(capsys, "--model", config, *SMALL)


def test_no_model_there(tmp_path, capsys, monkeypatch):
    assert "no config.json" in refused(capsys, "--model", tmp_path)
    assert "no such folder or file" in refused(capsys, "--model", tmp_path / "nothing")
    assert "no such folder or file" in refused(capsys, "--model", "~no-user/nothing")
    assert "nor a valid Hub id" in refused(capsys, "--model", "a/b/c")
    asked = []

    def download(*what):
        asked.append(what)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    line = refused(capsys, "--model", "org/name")
    assert "org/name: no such folder, and it could not be downloaded from the Hub (no network)" in line
    assert asked == [("org/name", "config.json")]


def test_a_hub_id_needs_its_config_only(config, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *what: str(config / "config.json"))
    assert "org/name, LlamaForCausalLM" in said(capsys, "--model", "org/name", *SMALL)


@pytest.mark.slow
def test_llama_3_70b(tmp_path):
    """A process of its own shows by its memory that the 141 GB of weights are never there."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    code = (
        "import resource, sys; from sparsefw.plan import main; status = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr); sys.exit(status)"
    )
    flags = ["--model", str(tmp_path), "--gpu", "h100", "--reconstruct", "0", "--json", str(tmp_path / "plan.json")]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True, env=os.environ
    )
    assert int(done.stderr.splitlines()[-1]) < 2000
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["model"]["parameters"] == 70_553_706_496
    assert content["disk"]["output"] == 2 * 70_553_706_496
    tokens, d, inner = 256 * 2048, 8192, 28672
    matrices = {"qkv": (10240, d), "o": (d, d), "up": (2 * inner, d), "down": (d, inner)}
    linear = sum(2 * tokens * rows * d for rows, d in matrices.values())
    attention = 2 * tokens * 2049 * d
    # The inputs of the last layers are kept.
    assert content["placement"]["kept_width"] == inner
    rows, width = matrices["down"]
    assert content["phases"]["forward"]["block"]["flops"] == 2 * tokens * rows * width
    # Every layer runs once in each model; but what a run goes on from is asked of one micro-batch of two windows.
    grams = sum(tokens * width * (width + 1) for _, width in matrices.values())
    crosses = 2 * tokens * (2 * d * d + d * d + d * inner)
    once = linear + attention
    passes = once + once - 2 * tokens * rows * width + once // 128
    assert content["phases"]["calibrate"]["block"]["flops"] == pytest.approx(passes + grams + crosses, rel=1e-3)
    # Two of the three products for errors are two products of bf16 terms, one is three; so is W G of o and down.
    solves = sum((62 + 2 * 2 + 3) * 2 * rows * d * d for rows, d in matrices.values())
    solves += sum(2 * factor * rows * d * d for factor, (rows, d) in zip((1, 2, 1, 2), matrices.values(), strict=True))
    assert content["phases"]["solve"]["block"]["flops"] == pytest.approx(solves, rel=0.01)


def test_windows_are_in_the_process(config, tmp_path, capsys):
    """Every phase of a run holds their tokens."""

    def hosts(*flags):
        said(capsys, "--model", config, "--gpu", "h100", "--seqlen", "32", *flags, "--json", tmp_path / "plan.json")
        return {name: peak["host"] for name, peak in json.loads((tmp_path / "plan.json").read_text())["memory"].items()}

    few, many = (
        hosts("--nsamples", "10"),
        hosts("--nsamples", "10", "--eval", "a", "--eval", "b", "--eval-windows", "90000"),
    )
    assert many["texts"] - few["texts"] == 32 * (8 * 2 * 90000 + 4 * (90000 - 4 * 10))
    assert many["start"] - few["start"] >= 32 * 8 * 2 * 90000


def test_the_number_of_windows_takes_no_time(tmp_path, capsys):
    """Windows and micro-batches are counted, not listed, also those by whose predictions the last block is fitted."""
    config, path = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps(LLAMA_70B))
    windows = ("--nsamples", 10**9, "--seqlen", 8192, "--eval", "wikitext", "--eval-windows", 10**9)
    began = time.process_time()
    said(capsys, "--model", config, *windows, "--gpu", "h100", "--json", path)
    assert time.process_time() - began < 10
    assert json.loads(path.read_text())["workload"]["windows"] == 10**9
