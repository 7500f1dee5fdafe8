"""The suite: its texts share no run of words, its tasks are what they say, and a model is measured once."""

import json
import math
import zipfile
from collections import Counter
from functools import partial
from pydoc_data.topics import topics

import make_tasks
import prose
import pytest
import suite
import suite_texts
from helpers.families import save_model


@pytest.fixture(scope="module")
def passages():
    """The prose of CPython's language reference."""
    seen: set[str] = set()
    return [prose.Passage("", found) for text in topics.values() for found in prose.runs_of_sentences(text, seen)]


@pytest.fixture(scope="module")
def items(passages):
    # It uses no word as often as the suite's texts do.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(make_tasks, "USES", 2)
        return make_tasks.make_items(passages, 20)


def sentences_of(passages):
    return {sentence for passage in passages for sentence in passage.sentences}


def chosen(item):
    """The right one of the choices, and the wrong ones."""
    wrong = item["choices"].copy()
    return wrong.pop(item["label"]), wrong


@pytest.mark.parametrize(
    ("sentence", "is_prose"),
    [
        ("The length of a line (with its end) is how many letters it has.", True),
        ("It's well-known, if not true: this is the end of it.", True),
        ("Return the length of it", False),
        ("the length of a line is the number of its letters.", False),
        ("The length of a_line is the number of its letters.", False),
        ("Boolean object float value number letters lines.", False),
    ],
)
def test_whole_sentences(sentence, is_prose):
    assert prose.is_prose(sentence) == is_prose


class TestItems:
    def test_next_sentence(self, items, passages):
        following = {p.sentences[-2]: p for p in passages if len(p.sentences) > 1}
        assert len(items["next_sentence"]) == 20
        for item in items["next_sentence"]:
            right, wrong = chosen(item)
            passage = following[item["context"]]
            assert right == passage.sentences[-1]
            assert len({right, *wrong}) == 4
            assert set(wrong) <= sentences_of(passages) - set(passage.sentences)

    def test_word_choice(self, items, passages):
        """The wrong words stand nowhere in the sentence, and what follows them is the same."""
        assert len(items["word_choice"]) == 20
        for item in items["word_choice"]:
            right, wrong = chosen(item)
            whole = f"{item['context']} {right}"
            assert whole in sentences_of(passages)
            words, rests = zip(*(choice.split(" ", 1) for choice in (right, *wrong)), strict=True)
            assert (len(set(words)), len(set(rests))) == (4, 1)
            assert set(words) & {*whole.split()} == {words[0]}

    def test_true_sentence(self, items, passages):
        assert items["true_sentence"]
        for item in items["true_sentence"]:
            right, (wrong,) = chosen(item)
            assert item["context"] == ""
            assert right in sentences_of(passages)
            assert Counter(right.split()) == Counter(wrong.split())
            n, m = (n for n, (a, b) in enumerate(zip(right.split(), wrong.split(), strict=True)) if a != b)
            assert right.split()[n - 1] == right.split()[m - 1]

    def test_right_choices_stand_everywhere(self, items):
        assert {item["label"] for item in items["next_sentence"]} == set(range(4))
        assert {item["label"] for item in items["true_sentence"]} == set(range(2))


def test_texts_share_no_run_of_words(tmp_path, monkeypatch):
    """Neither with each other nor with a calibration text; what is reported goes before."""
    folder = tmp_path / "packages" / "a==1"
    folder.mkdir(parents=True)
    words = [" ".join(f"w{'abcdefghij'[n]}{'abcdefghij'[m]}" for m in range(10) for _ in "xx") for n in range(4)]
    with zipfile.ZipFile(folder / "a-1.whl", "w") as wheel:
        wheel.writestr("a/choose.txt", "\n\n".join(words))
        wheel.writestr("a/report.txt", "\n\n".join(words[1:3]))
    sources = [
        suite_texts.Source(f"{half}_prose", "a==1", rf"a/{half}\.txt", suite_texts._whole, "ours")
        for half in suite_texts.HALVES
    ]
    monkeypatch.setattr(suite_texts, "SOURCES", sources)
    (tmp_path / "calibration").write_text(words[2])
    suite_texts.write_texts(tmp_path, [tmp_path / "calibration"])
    assert (tmp_path / "report_prose.txt").read_text() == words[1] + "\n"
    assert (tmp_path / "choose_prose.txt").read_text() == f"{words[0]}\n\n{words[3]}\n"


def test_measure(items, tmp_path, capsys, monkeypatch):
    """The same weights are measured once, and others differ from them."""
    monkeypatch.setattr(suite, "SEQLEN", 32)
    (tmp_path / "choose_prose.txt").write_text("".join(f"{n} is a number, and so is {n * n}.\n" for n in range(100)))
    make_tasks.write_tasks(tmp_path, "choose", {"true_sentence": items["true_sentence"][:3]})
    # It reads the longest item at once.
    made = partial(save_model, family="llama", max_position_embeddings=1024)
    models = [str(made(tmp_path / f"model{n}", num_hidden_layers=n)) for n in (1, 2)]
    command = ["measure", str(tmp_path), *models, "--dense", models[0], "--half", "choose", "--windows", "2"]
    suite.main(command)
    found = json.loads((tmp_path / "suite.json").read_text())["choose"]
    dense, other = (found[model] for model in models)
    assert dense["ratio"] == [1, 0]
    assert math.isclose(other["ratio"][0], other["perplexity"]["choose_prose"] / dense["perplexity"]["choose_prose"])
    assert set(other["accuracy"]) == {"choose_true_sentence"}
    assert f"| {models[1]} | " in capsys.readouterr().out
    monkeypatch.setattr(suite, "scores_of", None)
    suite.main(command)


def test_both_means():
    """The mean of the ratios of perplexities, and that of the shares that tasks lose of what is above chance."""
    dense = {"txt": {"a": [-1.0, -3.0], "b": [-2.0, -2.0]}, "jsonl": {"h_true_sentence": [1.0, 1.0, 1.0, 0.0]}}
    pruned = {"txt": {"a": [-2.0, -3.0], "b": [-2.5, -2.5]}, "jsonl": {"h_true_sentence": [1.0, 0.0, 1.0, 0.0]}}
    found = suite.compared(pruned, dense)
    assert found["perplexity"] == {"a": math.exp(2.5), "b": math.exp(2.5)}
    # The windows of b lose alike. Those of a lose 1 and 0: a standard error of 1/2, for two texts 1/4.
    assert found["ratio"] == pytest.approx([math.exp(0.5), math.exp(0.5) / 4])
    # One item of four is lost: 1/4 of the accuracy, of which 3/4 - 1/2 are above chance.
    assert found["lost"] == pytest.approx((1.0, 1.0))
