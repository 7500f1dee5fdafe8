"""Whole evaluations."""

import errno
import json
import os
import re
import runpy
from pathlib import Path

import pytest
from helpers.checkpoints import refused
from helpers.families import save_model
from helpers.ranks import on_ranks
from helpers.texts import make_tokenizer

from sparsefw.errors import InputError
from sparsefw.evaluate import main
from sparsefw.evaluation import evaluate
from sparsefw.extras.evaluation import run
from sparsefw.extras.evaluation.run import RESULT

NAMES = ["tiny_choices", "tiny_rolling", "tiny_last_word"]


def evaluated(place, tasks=None, **options):
    given = {"texts": "default", "eval_windows": 3, "seqlen": 32, "against": place / "model"}
    with_tasks = {"tasks": NAMES, "include_path": tasks} if tasks else {}
    return evaluate(place / "out", **given | with_tasks | options)


def test_perplexity_is_that_of_the_run(place, tasks):
    found = evaluated(place, tasks, limit=4)
    dense, pruned = found.models
    assert (dense, pruned) == (str(place / "model"), str(place / "out"))
    assert {record.task for record in found.tasks} == {*NAMES}
    # The harness's own aggregations say how documents make a metric.
    assert all(record.results[pruned].difference.stderr is not None for record in found.tasks)
    (text,), (of_run,) = found.texts, json.loads((place / "out/report.json").read_text())["evaluation"]
    values = [text.results[name].value for name in found.models]
    assert values == pytest.approx([of_run["perplexity"][name] for name in ("dense", "sparsefw")], rel=1e-5)
    assert text.results[pruned].difference.value == pytest.approx(values[1] - values[0])


def test_output(place, tmp_path):
    output = tmp_path / "a" / "out"
    result = evaluated(place, output=output)
    (output / "notes.txt").write_text("mine")
    assert (output / RESULT).read_text() == result.to_json()
    with refused(r"evaluation.json: is there already; give overwrite=True to replace it$"):
        evaluated(place, output=output)
    assert evaluated(place, output=output, overwrite=True, eval_windows=2) != result
    assert (output / RESULT).read_text() != result.to_json()
    assert {path.name for path in output.iterdir()} == {RESULT, "notes.txt"}


def test_an_output_that_cannot_be_written_is_refused_before_the_work(place, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "inspect", None)
    (tmp_path / "file").touch()
    with refused("cannot be written to"):
        evaluated(place, output=tmp_path / "file" / "out")


def test_a_full_disk_loses_nothing(place, out, monkeypatch):
    def full(path, *_, **__):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    lines = []
    with pytest.raises(OSError, match=r"No space left on device: .*evaluation\.json"):
        evaluated(place, output=out, log=lines.append)
    assert any("perplexity" in line for line in lines)
    assert not [*out.iterdir()]


def test_the_example_compares_methods(tasks, tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).resolve().parents[3] / "examples/compare_methods.py"))["main"]
    few = dict(nsamples=4, seqlen=32, eval_windows=2, kernel="torch", include=["layers.3"], reconstruct=0, compare=())
    main("default", "tiny_choices", tmp_path, 4, tasks, **few)
    printed = capsys.readouterr().out
    assert all(f"{tmp_path}/{method}" in printed for method in ("wanda", "sparsegpt", "sparsefw"))


def test_texts_alone_need_no_harness(place, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    found = evaluated(place, seqlen=None)
    assert found.tasks == []
    # Windows are as long as the model takes.
    assert found.texts[0].seqlen == 64
    with refused(r"pip install -e '.\[eval\]'"):
        evaluate(place / "model", "tiny_choices")


def test_perplexities_in_other_tokens_are_not_compared(place, tmp_path):
    save_model(tmp_path / "other", "llama", seed=1)
    make_tokenizer(bos=True).save_pretrained(tmp_path / "other")
    given = dict(against=place / "model", texts=place / "text.txt")
    with refused(r"reads .* as other tokens than"):
        evaluate(tmp_path / "other", **given, seqlen=32)
    with refused("other: windows of 32 tokens, .*; give seqlen=32"):
        evaluate(save_model(tmp_path / "other", "llama", max_position_embeddings=32), **given)
    with refused("models: none"):
        evaluate([], texts=given["texts"])


def test_ranks_that_differ_are_named(place, tmp_path):
    """Each machine may have a folder of its own, here with other weights."""
    save_model(tmp_path / "out", "llama", num_hidden_layers=2, seed=1)
    for folders, windows, message in (
        ([place, place], [3, 2], "rank 1: eval_windows is 2, and that of rank 0 is 3; start all ranks with the same"),
        ([place, tmp_path], [3, 3], "rank 1: the digest of the weights of out is "),
    ):
        assert all(x.startswith(message) for x in on_ranks(2, refused_in, folders, windows, place / "text.txt"))


def refused_in(ranks, folders, windows, text):
    os.chdir(folders[ranks.number])
    with pytest.raises(InputError) as error:
        evaluate("out", texts=text, seqlen=32, eval_windows=windows[ranks.number])
    return str(error.value)


def test_the_command(place, tasks, capsys):
    arguments = [place / "out", "--against", place / "model", "--tasks", "tiny_choices, tiny_rolling", "--limit", 4]
    arguments += ["--include-path", tasks, "--eval", place / "text.txt", "--seqlen", 32, "--eval-windows", 3]
    assert main([*map(str, arguments)]) == 0
    # The dense model's accuracy with its error, and the pruned model's with the difference.
    table = capsys.readouterr().out
    assert re.search(r"^tiny_choices +acc +4 [^±\n]*±[^±\n]*model\n[^±\n]*±[^±\n]*±[^±\n]*out$", table, re.M)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tasks", "tiny_chioces"], "task 'tiny_chioces': unknown"),
    ([], "--tasks, --eval: give tasks, or a text"),
    (["--eval", "default", "--against", "DENSE"], "model: the model itself"),
    (["--eval", "default", "--host-memory", "0.01"], "--host-memory 0.01: this run needs at least"),
    (["--eval", "default", "--limit", "3"], "--limit: needs --tasks"),
    (["--tasks", "tiny_choices", "--limit", "0"], "--limit 0: expected more than 0"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, message, place, tasks, capsys):
    given = ["--include-path", str(tasks)] if "--tasks" in arguments else []
    dense = str(place / "model")
    assert main([dense, *given, *(dense if x == "DENSE" else x for x in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparsefw: ")
    assert message in line
