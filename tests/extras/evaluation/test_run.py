"""Whole evaluations."""

import errno
import json
import runpy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.families import save_model
from helpers.ranks import on_ranks
from helpers.texts import make_tokenizer

from sparsefw.errors import InputError
from sparsefw.evaluate import main
from sparsefw.extras.evaluation import evaluate, run
from sparsefw.extras.evaluation.run import RESULT

NAMES = ["tiny_choices", "tiny_rolling", "tiny_last_word"]


def evaluated(place, tasks=None, **options):
    given = {"texts": place / "text.txt", "eval_windows": 3, "seqlen": 32, "against": place / "dense"}
    with_tasks = {"tasks": NAMES, "include_path": tasks} if tasks else {}
    return evaluate(place / "pruned", **given | with_tasks | options)


def test_perplexity_is_that_of_the_run(place, tasks):
    found = evaluated(place, tasks, limit=4)
    assert found.models == [str(place / "dense"), str(place / "pruned")]
    assert {record.task for record in found.tasks} == {*NAMES}
    (text,), (of_run,) = found.texts, json.loads((place / "pruned/report.json").read_text())["evaluation"]
    for name, its in zip(found.models, ("dense", "sparsefw"), strict=True):
        assert text.results[name].value == pytest.approx(of_run["perplexity"][its], rel=1e-5)
    dense, pruned = text.results.values()
    assert pruned.difference.value == pytest.approx(pruned.value - dense.value)


def test_output(place, tmp_path):
    output = tmp_path / "a" / "out"
    result = evaluated(place, output=output)
    (output / "notes.txt").write_text("mine")
    assert (output / RESULT).read_text() == result.to_json()
    with pytest.raises(InputError, match=r"evaluation.json: is there already; give overwrite=True to replace it$"):
        evaluated(place, output=output)
    assert evaluated(place, output=output, overwrite=True, eval_windows=2) != result
    assert (output / RESULT).read_text() != result.to_json()
    assert {path.name for path in output.iterdir()} == {RESULT, "notes.txt"}


def test_an_output_that_cannot_be_written_loses_nothing(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(run, "inspect", None)
        patched.setattr("os.access", lambda *_: False)
        with pytest.raises(InputError, match="out: cannot be written to"):
            evaluated(place, output=tmp_path / "out")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="cannot be written to"):
            evaluated(place, output=folder)
    lines = []

    def full(path, *_, **__):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*evaluation\.json"):
        evaluated(place, output=tmp_path / "out", log=lines.append)
    assert any("perplexity" in line for line in lines)
    assert not [*(tmp_path / "out").iterdir()]


def test_the_example_compares_methods(tasks, tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).resolve().parents[3] / "examples/compare_methods.py"))["main"]
    few = dict(nsamples=4, seqlen=32, eval_windows=2, kernel="torch", include=["layers.3"], reconstruct=0, compare=())
    main("default", "tiny_choices", tmp_path, 4, tasks, **few)
    printed = capsys.readouterr().out
    assert all(f"{tmp_path}/{method}" in printed for method in ("wanda", "sparsegpt", "sparsefw"))


@pytest.mark.slow
def test_ranks_evaluate_together(place):
    expected = evaluated(place)
    one, other = on_ranks(2, evaluated_on, place)
    assert one.texts == other.texts
    for name, measured in expected.texts[0].results.items():
        assert one.texts[0].results[name].value == pytest.approx(measured.value, rel=1e-5)


def evaluated_on(ranks, place):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "joined_with", lambda log: nullcontext((ranks, log)))
        return evaluated(place)


def test_texts_alone_need_no_harness(place, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert evaluated(place).tasks == []
    with pytest.raises(InputError, match=r"pip install -e '.\[eval\]'"):
        evaluate(place / "dense", "tiny_choices")


def test_windows_are_as_long_as_the_model_takes(place):
    (text,) = evaluate(place / "dense", texts=place / "text.txt").texts
    assert text.seqlen == 64


def test_perplexities_in_other_tokens_are_not_compared(place, tmp_path):
    save_model(tmp_path / "other", "llama", seed=1)
    make_tokenizer(bos=True).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"reads .* as other tokens than"):
        evaluate(tmp_path / "other", against=place / "dense", texts=place / "text.txt", seqlen=32)


def test_a_model_is_not_compared_with_itself(place):
    with pytest.raises(InputError, match=r"^against='.*dense': the model itself"):
        evaluate(f"{place / 'dense'}/", against=place / "dense", texts=place / "text.txt")


def test_the_command(place, tasks, capsys):
    arguments = [str(place / "pruned"), "--against", str(place / "dense"), "--tasks", "tiny_choices, tiny_rolling"]
    arguments += ["--include-path", str(tasks), "--eval", str(place / "text.txt"), "--seqlen", "32", "--limit", "4"]
    arguments += ["--eval-windows", "3"]
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    at = next(n for n, line in enumerate(out) if line.startswith("tiny_choices") and " acc " in line)
    assert out[at].split()[2] == "4"
    assert out[at].endswith("dense")
    assert out[at + 1].count("±") == 2
    assert out[at + 1].endswith("pruned")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tasks", "tiny_chioces"], "task 'tiny_chioces': unknown"),
    ([], "--tasks, --eval: give tasks, or a text"),
    (["--eval", "default", "--against", "nowhere/x/y"], "nowhere/x/y: no such folder, and it could not be downloaded"),
    (["--tasks", "tiny_choices", "--limit", "-1"], "--limit -1"),
    (["--eval", "default", "--host-memory", "0.01"], "--host-memory 0.01: this run needs at least"),
    (["--eval", "default", "--limit", "3"], "--limit: needs --tasks"),
    (["--eval", "default", "--overwrite"], "--overwrite: needs --output"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, message, place, tasks, capsys):
    given = ["--include-path", str(tasks)] if "--tasks" in arguments and "--include-path" not in arguments else []
    assert main([str(place / "dense"), *given, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparsefw: ")
    assert message in line


@pytest.mark.parametrize("argument", ["models", "tasks", "texts", "against"])
def test_a_model_in_memory_is_no_name(argument):
    given = {"models": "pruned", "texts": "default", argument: torch.nn.Linear(2, 2)}
    with pytest.raises(InputError, match=r": expected a name or a path, got Linear$"):
        evaluate(**given)
