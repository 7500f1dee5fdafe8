"""`python -m bench` on a CPU, at tiny shapes."""

import csv
import io
import json

import machine
import measure
import pytest
import timing
import torch

from bench import __main__ as command
from sparsefw.kernels import cpu

PROVIDERS = ["--providers", "ours,torch,library"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Make roofs and flushes small, and leave torch's threads as they are."""
    monkeypatch.setattr(machine, "COPIED", 1 << 16)
    monkeypatch.setattr(machine, "SIDE", 64)
    monkeypatch.setattr(timing, "FLUSH", 1 << 16)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def bench(*words, shape="48x64"):
    return command.main([*words, "--shape", shape, "--tokens", "20", "--seconds", "0.01"])


def test_two_operations_end_to_end(tmp_path, capsys):
    files = ["--json", str(tmp_path / "run.json"), "--csv", str(tmp_path / "run.csv")]
    assert bench("take", "lmo", *PROVIDERS, *files) == 0
    printed = capsys.readouterr().out
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["machine"]["torch"] == torch.__version__
    assert run["machine"]["driver"] is run["machine"]["capability"] is None
    assert run["command"].startswith("python -m bench take lmo --providers ours,torch,library")
    cases = [(row["operation"], row["setting"], row["provider"]) for row in run["rows"]]
    chosen = [("lmo", setting, provider) for setting in ("", "2:4") for provider in ("ours", "torch", "library")]
    assert cases == [("take_rows", "", "ours"), ("take_rows", "", "torch"), *chosen]
    for row in run["rows"]:
        assert (row["rows"], row["d"], row["tokens"], row["dtype"]) == (48, 64, 20, "float32")
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert (row["wrong"], row["error"], row["unit"]) == (None, 0, None)
        assert row["share"] == pytest.approx(row["bytes"] / run["roofs"]["copy"] / row["seconds"])
    ours, theirs = run["rows"][:2]
    assert ours["speedup"] == pytest.approx(theirs["seconds"] / ours["seconds"]) == pytest.approx(1 / theirs["speedup"])
    read = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert [float(row["seconds"]) for row in read] == [row["seconds"] for row in run["rows"]]
    assert printed.count("\nprovider ") == printed.count("\ntriton    checked at 48x96, error 0.0e+00") == 3


def test_a_wrong_result_gets_no_time(tmp_path, monkeypatch, capsys):
    """Nor does one of another shape, and one of NaN; and others are compared with those that are right."""
    for number, wrong in enumerate((lambda G: G.add_(1), lambda G: G[1:], lambda G: G.fill_(torch.nan))):
        monkeypatch.setattr(cpu, "mirror_lower", wrong)
        assert bench("mirror", *PROVIDERS, "--json", str(tmp_path / "run.json")) == 1
        ours, theirs = json.loads((tmp_path / "run.json").read_text())["rows"]
        assert (ours["seconds"], ours["share"], ours["speedup"], theirs["speedup"]) == (None,) * 4
        assert ours["wrong"].startswith("wrong: error "), number
        assert f"\nours      {ours['wrong']}\n" in capsys.readouterr().out


def test_one_that_fails_says_why(monkeypatch, capsys):
    def compiled(G):
        raise RuntimeError("No working C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled)
    assert bench("mirror", "--providers", "compile") == 0
    assert "\ncompile   failed: No working C++ compiler\n" in capsys.readouterr().out


def test_masks_may_differ_in_few_entries():
    exact = torch.arange(30_000).view(3, -1) % 2 == 0
    got = exact.clone()
    got[0, :2] ^= True
    assert 0 < measure.difference(got, exact) < measure.FLIPPED < measure.difference(~got, exact) < 1


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("take", ["take_rows"]),
        ("step", ["row_step"]),
        ("product", ["product"]),
        ("packed", ["unpack", "packed_product"]),
        ("adam mirror", ["adam_step", "mirror_lower"]),
    ],
)
def test_names_may_be_short(words, names, capsys):
    assert command.main([*words.split(), "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("nothing", "no operation 'nothing'; there are "),
        ("row_", "'row_' is not unique: row_s"),
        ("lmo --shape 3", "argument --shape: invalid shape value: '3'\n"),
        ("lmo --shape 0x3", "argument --shape: invalid shape value: '0x3'\n"),
        ("lmo --tokens none", "argument --tokens: invalid positive value: 'none'\n"),
        ("lmo --setting 3:7", "unknown 3:7; there are 2:4\n"),
        ("lmo --providers us", "unknown us; there are ours, torch, compile, library\n"),
        ("lmo --model none", "--model: no file 'none', and none of DeepSeek-V3, "),
    ],
)
def test_a_mistake_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(words.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"python -m bench: error: {line}")
    assert error.count("\n") == 1


def test_a_worker_answers_each_line(monkeypatch, capsys):
    case = dict(setting="", rows=4, d=8, tokens=4, dtype="float32")
    asked = [dict(operation=name, rounds=3, **case) for name in ("take_rows", "nothing")]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(request) + "\n" for request in asked)))
    assert command.main(["--worker"]) == 0
    times, refused = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(times["seconds"]) == 3
    assert refused == {"error": "KeyError: 'nothing'"}


def test_no_case_is_measured_twice_or_without_a_roof(capsys):
    """mirror_lower ignores the rows."""
    sizes = [measure.size_of(rows, d, 4, "float32") for rows, d in ((8, 16), (4, 16), (8, 32))]
    chosen = command.named(["product", "mirror"])
    found = [(x.name, label, size.d) for x, label, size in command.cases(chosen, None, sizes[1:], {"ieee": 1.0})]
    assert found == [("product", "ieee", 16), ("product", "ieee", 32), *(("mirror_lower", "", d) for d in (16, 32))]
    assert "left out: product bf16, since no roof of bf16 is known here" in capsys.readouterr().out
    assert len(list(command.cases(chosen[1:], None, sizes, {}))) == 2
    assert [label for _, label, _ in command.cases(chosen, ["bf16"], sizes[:1], {})] == ["bf16"]


def test_shapes_of_a_model(tmp_path):
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=48,
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=64)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(command.shapes_of(str(tmp_path / "config.json"))) == {(32, 32), (16, 32), (48, 32), (32, 48)}
