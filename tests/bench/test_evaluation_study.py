"""The study of pruned models on tasks: what is made and kept, texts in common, values with their differences."""

import json
from types import SimpleNamespace

import pytest
import study
from study import Pruned, Study

WORDS = [f"{letter}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


def answers(right, word=-1.0, of_document=-100.0):
    """Answers to four items of each task: `right` tells which are right."""
    return {
        "next_sentence": {"metrics": {"acc_norm": right}, "results": {"acc_norm": sum(right) / 4}},
        "word_choice": {"metrics": {"acc": right}, "results": {"acc": sum(right) / 4}},
        "true_sentence": {"metrics": {"acc": right}, "results": {"acc": sum(right) / 4}},
        "word_cloze": {
            "metrics": {"acc": right, "perplexity": [word] * 4},
            "results": {"acc": sum(right) / 4, "perplexity": 2.718281828459045},
        },
        "docs_rolling": {
            "metrics": {"word_perplexity": [[of_document, 50], [of_document, 50]]},
            "results": {"word_perplexity": 7.38905609893065},
        },
    }


@pytest.fixture
def of(tmp_path):
    """A study in a folder, of a model and tasks that nothing reads."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sources.json").write_text('{"sha256": 1}')
    (tmp_path / "wiki.txt").write_text("text")
    return Study(tmp_path / "tiny", tmp_path / "wiki.txt", tasks, tmp_path / "work", 64, 512)


@pytest.fixture
def commands(monkeypatch, of):
    """The commands that are run, as if they had written their results."""
    ran = []

    def run(command, name):
        ran.append([str(part) for part in command])
        if "sparsefw.run" in ran[-1]:
            (of.work / name).mkdir(parents=True)
        else:
            command[-1].write_text(json.dumps({"tasks": answers([1, 1, 1, 0] if name == "dense" else [1, 0, 1, 0])}))

    def report(path):
        method, _, sparsity = path.parent.name.partition("-")
        return SimpleNamespace(arguments={"method": method, "sparsity": sparsity, "nsamples": 64, "seqlen": 512})

    monkeypatch.setattr(study, "_run", run)
    monkeypatch.setattr(study, "read_report", report)
    return ran


def main(of, results, *flags):
    paths = [str(path) for path in (of.model, of.calibration, of.tasks)]
    study.main([*paths, "--work", str(of.work), "--results", str(results), *flags])


def test_what_is_there_is_not_made_again(of, commands, tmp_path, capsys):
    results = tmp_path / "results.json"
    main(of, results)
    pruned = [command for command in commands if "sparsefw.run" in command]
    assert [command[command.index("--method") + 1] for command in pruned] == ["wanda", "sparsegpt", "sparsefw"]
    assert len(commands) == 3 + 4
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("| the default - SparseGPT, 60% | +0.0 ± 0.0 |")
    main(of, results)
    assert len(commands) == 3 + 4
    assert capsys.readouterr().out == printed
    # More sparsities need more checkpoints, other tasks only more answers.
    main(of, results, "--sparsities", "0.6,0.5")
    assert len(commands) == 2 * 3 + 7
    (of.tasks / "sources.json").write_text('{"sha256": 2}')
    main(of, results)
    assert len(commands) == 2 * 3 + 7 + 4
    study.main(["--table", "--results", str(results)])
    assert "Wanda, 60%" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_is_refused(of, commands):
    wanda = Pruned("wanda", "0.6")
    folder = study.prune(wanda, of)
    assert study.prune(wanda, of) == folder
    other = Study(of.model, of.calibration, of.tasks, of.work, 32, 512)
    with pytest.raises(SystemExit, match=r"wanda-0.6: made with nsamples 64, not 32"):
        study.prune(wanda, other)


def test_values_with_paired_differences():
    dense, found = answers([1, 1, 1, 0]), answers([1, 0, 1, 0], word=-2.0, of_document=-200.0)
    entry = study.entry(found, dense)
    of = entry["word_choice acc"]
    assert of["value"] == 0.5
    # Sample deviations of [1, 0, 1, 0] and of the differences [0, -1, 0, 0], over the root of 4.
    assert of["stderr"] == pytest.approx((1 / 3) ** 0.5 / 2)
    assert of["difference"] == pytest.approx([-0.25, 0.25])
    assert entry["word_cloze perplexity"]["value"] == pytest.approx(2.718281828459045**2)
    assert entry["docs_rolling word_perplexity"]["value"] == pytest.approx(2.718281828459045**4)
    assert study.entry(dense, dense)["docs_rolling word_perplexity"]["difference"] == [0.0, 0.0]


def test_table():
    models = {"dense": answers([1, 1, 1, 0]), "Wanda, 60%": answers([1, 0, 1, 0])}
    results = {"models": {name: study.entry(one, models["dense"]) for name, one in models.items()}}
    results["pairs"] = {"one - other": study.differences_of(models["Wanda, 60%"], answers([0, 1, 1, 0]))}
    dense, wanda, pair = study.table(results).splitlines()[2:]
    # Of the differences [1, -1, 0, 0].
    assert pair.startswith("| one - other | +0.0 ± 40.8 | +0.0 ± 40.8 |")
    assert dense.startswith("| dense | 75.0 ± 25.0 |")
    assert wanda.startswith("| Wanda, 60% | 50.0 ± 28.9 (-25.0 ± 25.0) |")
    assert wanda.endswith("| 2.72 ± 0.00 (+0.00 ± 0.00) | 7.39 ± 0.00 (+0.00 ± 0.00) |")


def test_texts_in_common(tmp_path):
    run = " ".join(WORDS[: study.RUN])
    item = {"context": f"Zero {run.upper()}", "choices": ["x"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(item) + "\n" + json.dumps({"text": " ".join(WORDS)}) + "\n")
    assert list(study.shared_runs(tmp_path, f"zz, {run}.")) == [f"a.jsonl: {run}"] * 2
    assert list(study.shared_runs(tmp_path, run.replace("dd", "xx"))) == []


def test_a_study_of_texts_in_common_is_refused(of, commands, tmp_path):
    run = " ".join(WORDS[: study.RUN])
    (of.tasks / "a.jsonl").write_text(json.dumps({"text": run}))
    of.calibration.write_text(run)
    with pytest.raises(SystemExit, match=r"wiki.txt: has words of the tasks in it: a.jsonl: aa bb"):
        main(of, tmp_path / "results.json")
    assert commands == []
