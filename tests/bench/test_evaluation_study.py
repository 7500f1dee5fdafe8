"""The study of pruned models on tasks: what is made and kept, texts in common."""

import json

import pytest
import study

WORDS = [f"{letter}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def commands(monkeypatch):
    """The commands that are run, as if they had written their results."""
    ran = []

    def run(*command):
        ran.append([*map(str, command)])
        if command[0] == "sparsefw.run":
            command[command.index("--output") + 1].mkdir()

    monkeypatch.setattr(study, "_run", run)
    return ran


def main(folder, *flags, text="text"):
    (folder / "wiki.txt").write_text(text)
    study.main([str(folder / "tiny"), str(folder / "wiki.txt"), str(folder), "--work", str(folder / "work"), *flags])


def test_what_is_there_is_not_made_again(commands, tmp_path):
    main(tmp_path)
    assert [command[0] for command in commands] == ["sparsefw.run"] * 3 + ["sparsefw.evaluate"]
    main(tmp_path, "--sparsities", "0.6,0.5")
    assert [command[0] for command in commands[4:]] == ["sparsefw.run"] * 3 + ["sparsefw.evaluate"]
    assert f"{tmp_path}/work/wanda-0.5-64x512" in commands[-1]
    main(tmp_path, "--nsamples", "32")
    assert [command[0] for command in commands[8:]] == ["sparsefw.run"] * 3 + ["sparsefw.evaluate"]


def test_a_study_of_texts_in_common_is_refused(commands, tmp_path):
    run = " ".join(WORDS[: study.RUN])
    item = {"context": f"Zero {run.upper()}", "choices": ["x"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(item) + "\n" + json.dumps({"text": " ".join(WORDS)}) + "\n")
    assert list(study.shared_runs(tmp_path, f"zz, {run}.")) == [f"a.jsonl: {run}"] * 2
    assert list(study.shared_runs(tmp_path, run.replace("dd", "xx"))) == []
    with pytest.raises(SystemExit, match=r"wiki.txt: has words of the tasks in it: a.jsonl: aa bb"):
        main(tmp_path, text=run)
    assert commands == []
