"""Whole evaluations."""

import os
import shutil

import pytest
import torch
from helpers.evaluated import evaluated
from helpers.families import save_model
from helpers.ranks import on_ranks
from helpers.tasks import TASKS, write_task
from helpers.texts import make_tokenizer

import sparsefw
from sparsefw.errors import InputError
from sparsefw.evaluate import main
from sparsefw.evaluation import evaluate, job
from sparsefw.evaluation.answers import Budget
from sparsefw.evaluation.measured import Evaluation
from sparsefw.evaluation.saved import RESULT

pytestmark = pytest.mark.usefixtures("only_these_tasks")


def test_in_inference_mode(place, tasks):
    with torch.inference_mode():
        assert evaluated(place, tasks).evaluation.texts


def test_autocast_changes_nothing(place, tasks):
    expected = evaluated(place, tasks).evaluation
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluated(place, tasks).evaluation
    assert found.texts == expected.texts
    assert found.tasks == expected.tasks


def interrupt_evaluation(place, tasks, output):
    """Begin an evaluation that does not come to its second model; returns the models that it came to."""
    calls, scores_of = [], job.scores_of

    def second_fails(folder, *args, **others):
        calls.append(folder.name)
        if folder.name == "pruned":
            raise KeyboardInterrupt
        return scores_of(folder, *args, **others)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "scores_of", second_fails)
        with pytest.raises(KeyboardInterrupt):
            evaluated(place, tasks, output=output)
    return calls


def test_output_is_what_was_returned(place, tasks, tmp_path):
    result = evaluated(place, tasks, output=tmp_path / "out")
    path = result.output / RESULT
    assert [path.name for path in result.output.iterdir()] == [RESULT]
    assert Evaluation.from_json(path.read_text(), path) == result.evaluation
    with pytest.raises(InputError, match="exists and is not empty"):
        evaluated(place, tasks, output=tmp_path / "out")
    evaluated(place, tasks, output=tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes.txt, too, so --overwrite will not remove it"):
        evaluated(place, tasks, output=tmp_path / "out", overwrite=True)


def test_what_a_link_points_to_is_replaced(place, tmp_path):
    (tmp_path / "elsewhere/out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/out")
    evaluate(place / "dense", texts=place / "text.txt", eval_windows=3, seqlen=32, output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "elsewhere/out").iterdir()] == [RESULT]


def test_folders_above_the_output_are_made(place, tmp_path):
    evaluate(place / "dense", texts=place / "text.txt", eval_windows=3, seqlen=32, output=tmp_path / "a" / "b" / "out")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


@pytest.mark.parametrize("output", [".", "../out"])
def test_the_current_folder_is_not_replaced(output, place, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(InputError, match=f"^{output}: the current folder, which would be replaced"):
        evaluate(place / "dense", texts=place / "text.txt", output=output)


def test_a_checkpoint_is_never_replaced_by_an_evaluation(place, tasks, tmp_path):
    save_model(tmp_path / "other", "llama")
    with pytest.raises(InputError, match=r"not an evaluation \(no evaluation.json\)"):
        evaluated(place, tasks, output=tmp_path / "other", overwrite=True)
    (tmp_path / "other" / RESULT).write_text("{}")
    with pytest.raises(InputError, match=r"holds .*, too"):
        evaluated(place, tasks, output=tmp_path / "other", overwrite=True)


@pytest.mark.parametrize(("files", "overwrite", "message"), [
    (["notes.txt"], False, "exists and is not empty"),
    (["notes.txt"], True, r"not an evaluation \(no evaluation.json\)"),
    (["notes.txt", RESULT], True, "holds notes.txt, too"),
])  # fmt: skip
def test_an_output_that_appears_meanwhile_stays(files, overwrite, message, place, tmp_path, monkeypatch):
    measured, output = job._measured, tmp_path / "out"

    def meanwhile(*args):
        output.mkdir()
        for name in files:
            (output / name).write_text("mine")
        return measured(*args)

    given = {"texts": place / "text.txt", "eval_windows": 3, "seqlen": 32, "output": output}
    monkeypatch.setattr(job, "_measured", meanwhile)
    with pytest.raises(InputError, match=message):
        evaluate(place / "dense", overwrite=overwrite, **given)
    assert (output / "notes.txt").read_text() == "mine"
    monkeypatch.undo()
    # Nothing is computed again once it is out of the way.
    output.rename(tmp_path / "elsewhere")
    lines = []
    evaluate(place / "dense", log=lines.append, **given)
    assert f"model: {place / 'dense'}: all answers are there" in lines
    assert [path.name for path in output.iterdir()] == [RESULT]


def test_an_interrupted_evaluation_goes_on_with_the_next_model(place, tasks, tmp_path):
    whole = evaluated(place, tasks).evaluation
    assert interrupt_evaluation(place, tasks, tmp_path / "out") == ["dense", "pruned"]
    lines = []
    assert evaluated(place, tasks, output=tmp_path / "out", log=lines.append).evaluation == whole
    assert f"model: {place / 'dense'}: all answers are there" in lines
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize(("change", "named"), [
    ({"limit": 3}, "the tasks"),
    ({"eval_windows": 2}, "what .* is asked"),
    ({"against": None}, "--against"),
])  # fmt: skip
def test_another_evaluation_does_not_go_on_with_it(change, named, place, tasks, tmp_path):
    interrupt_evaluation(place, tasks, tmp_path / "out")
    with pytest.raises(InputError, match=f"an unfinished run of other input is there .* {named} "):
        evaluated(place, tasks, output=tmp_path / "out", **change)


def answer_only(models, **given):
    """An evaluation that comes to all answers, and not to its result."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(job, "_measured", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(models, **given)


def test_models_in_another_order_do_not_go_on_with_it(place, tmp_path):
    """Answers are found by the number of their model."""
    models, given = [place / "dense", place / "pruned"], {"texts": place / "text.txt", "eval_windows": 3, "seqlen": 32}
    answer_only(models, output=tmp_path / "out", **given)
    with pytest.raises(InputError, match=r"an unfinished run of other input is there .* the list of models "):
        evaluate(models[::-1], output=tmp_path / "out", **given)
    evaluate(models, output=tmp_path / "out", **given)


def test_another_file_of_a_model_is_other_input(place, tmp_path):
    shutil.copytree(place / "dense", tmp_path / "dense")
    given = {"texts": place / "text.txt", "eval_windows": 3, "seqlen": 32, "output": tmp_path / "out"}
    answer_only(tmp_path / "dense", **given)
    os.utime(next((tmp_path / "dense").glob("*.safetensors")), (0, 0))
    with pytest.raises(InputError, match=r"of other input is there .* the times of the files of .*dense"):
        evaluate(tmp_path / "dense", **given)


def test_each_machine_may_have_a_copy_of_the_model(place, tmp_path):
    for number in range(2):
        shutil.copytree(place / "dense", tmp_path / str(number) / "dense", copy_function=shutil.copyfile)
        for file in (tmp_path / str(number) / "dense").iterdir():
            os.utime(file, (number, number))
    one, other = on_ranks(2, evaluate_a_copy, place / "text.txt", tmp_path)
    assert one == other


def evaluate_a_copy(ranks, text, folder):
    os.chdir(folder / str(ranks.number))
    texts = job.Texts((str(text),), 32, 3)
    asked = job._Job(["dense"], None, job.Tasks(), texts, Budget(), folder / "out", False, False, False)
    return job._evaluate(asked, lambda line: None, False, ranks)


def test_texts_alone_need_no_harness(place, monkeypatch):
    monkeypatch.setattr("sparsefw.evaluation.find_spec", lambda name: None)
    result = evaluate(place / "dense", texts=place / "text.txt", seqlen=32)
    assert result.evaluation.tasks == []
    with pytest.raises(InputError, match=r"pip install -e '.\[eval\]'"):
        evaluate(place / "dense", "tiny_choices")


def test_windows_are_as_long_as_the_model_takes(place):
    (text,) = evaluate(place / "dense", texts=place / "text.txt").evaluation.texts
    assert text.seqlen == 64


def test_perplexities_in_other_tokens_are_not_compared(place, tmp_path):
    save_model(tmp_path / "other", "llama", seed=1)
    make_tokenizer(bos=True).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"reads .* as other tokens than"):
        evaluate(tmp_path / "other", against=place / "dense", texts=place / "text.txt", seqlen=32)


def test_a_model_is_not_compared_with_itself(place):
    with pytest.raises(InputError, match=r"^--against .*dense: the model itself"):
        evaluate(f"{place / 'dense'}/", against=place / "dense", texts=place / "text.txt")


def test_a_model_that_reads_one_token_has_no_perplexity(place, tmp_path):
    save_model(tmp_path / "one", "llama", max_position_embeddings=1)
    with pytest.raises(InputError, match="one: reads 1 token at once, so that none of a text can be predicted"):
        evaluate(tmp_path / "one", texts=place / "text.txt")


def test_a_task_without_metrics_is_told(place, tmp_path):
    config, documents = TASKS["tiny_choices"]
    metric = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    write_task(tmp_path, "silent", config | {"metric_list": [metric]}, documents)
    lines = []
    evaluate(place / "dense", "silent", include_path=tmp_path, log=lines.append)
    assert lines[-1] == "note: task silent: none of its metrics is one that the harness computes for its kind of task"


def test_nothing_to_do_is_refused(place):
    with pytest.raises(InputError, match="--tasks, --eval: neither is given"):
        evaluate(place / "dense")


def test_a_plan_computes_nothing(place, tasks, monkeypatch):
    monkeypatch.setattr(job, "scores_of", None)
    lines = []
    assert evaluated(place, tasks, plan=True, log=lines.append) is None
    assert len([line for line in lines if line.startswith(("requests: ", "memory: ", "plan: "))]) == 6


def test_the_command(place, tasks, capsys):
    arguments = [str(place / "pruned"), "--against", str(place / "dense"), "--tasks", "tiny_choices, tiny_rolling"]
    arguments += ["--include-path", str(tasks), "--eval", str(place / "text.txt"), "--seqlen", "32", "--limit", "4"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "beginnings shared" in out
    row = next(line for line in out.splitlines() if line.startswith("tiny_choices") and " acc " in line)
    assert row.split()[2] == "4"
    assert row.count("±") == 3


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tasks", "tiny_chioces"], "task 'tiny_chioces': unknown; the closest names are"),
    (["--tasks", "", "--eval", "default"], "--tasks: names no task"),
    (["--eval", "no.txt"], "no.txt: no such file"),
    (["--eval", "default", "--against", ""], "sparsefw: '': no such folder; give the folder of a checkpoint"),
    (["--eval", "default", "--limit", "-1"], "--limit -1"),
    (["--eval", "default", "--num-fewshot", "-1"], "--num-fewshot -1"),
    (["--eval", "default", "--host-memory", "0.01"], "--host-memory 0.01: this run needs at least"),
    (["--eval", "default", "--against", "nowhere/x/y"], "nowhere/x/y: neither a local path nor a valid Hub id"),
    (["--tasks", "tiny_choices", "--include-path", "nowhere"], "nowhere: no folder of tasks"),
    (["--eval", "default", "--limit", "3"], "--limit: needs --tasks"),
    (["--eval", "default", "--num-fewshot", "3"], "--num-fewshot: needs --tasks"),
    (["--eval", "default", "--include-path", "."], "--include-path: needs --tasks"),
    (["--tasks", "tiny_choices", "--eval-windows", "3"], "--eval-windows: needs --eval"),
    (["--tasks", "tiny_choices", "--seqlen", "32"], "--seqlen: needs --eval"),
    (["--eval", "default", "--overwrite"], "--overwrite: needs --output"),
    (["--eval", "default", "--restart"], "--restart: needs --output"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments, message, place, tasks, capsys):
    given = ["--include-path", str(tasks)] if "--tasks" in arguments and "--include-path" not in arguments else []
    assert main([str(place / "dense"), *given, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sparsefw: ")
    assert message in line


@pytest.mark.parametrize(("make", "fields", "message"), [
    (job.Tasks, {"limit": -1}, "--limit -1"),
    (job.Tasks, {"num_fewshot": 0.5}, "--num-fewshot 0.5"),
    (job.Tasks, {"include_path": "a\0b"}, "--include-path a"),
    (job.Texts, {"seqlen": 1}, "--seqlen 1"),
    (job.Texts, {"windows": True}, "--eval-windows True"),
    (job.Budget, {"gpu_memory": "all"}, "--gpu-memory all"),
    (job.Budget, {"host_memory": float("nan")}, "--host-memory nan"),
])  # fmt: skip
def test_fields_are_checked(make, fields, message):
    make()
    with pytest.raises(InputError, match=message):
        make(**fields)


def test_a_batch_of_a_caller_has_no_tasks(place):
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="prune\\(\\) got calibration and 'tasks', which belongs to a text"):
        sparsefw.prune(model, calibration=[torch.ones(1, 2)], tasks="hellaswag")


@pytest.mark.parametrize("argument", ["models", "tasks", "texts", "against"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x]], ids=["one", "several"])
def test_what_is_no_name_is_refused_by_its_argument(argument, wrap):
    """A model in memory is none."""
    given = {"models": "pruned", "texts": "default", argument: wrap(torch.nn.Linear(2, 2))}
    kind = "list" if argument == "against" and isinstance(given["against"], list) else "Linear"
    with pytest.raises(TypeError, match=f"^{argument}: expected names or paths, got {kind}$"):
        evaluate(**given)
