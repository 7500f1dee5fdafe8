"""Tasks made of prose that ships with packages: what counts as prose, and that every item is what its task says."""

import json
from collections import Counter

import make_tasks
import prose
import pytest

# A small package that is always installed, with the prose of which items of every task can be made.
PACKAGE = "jinja2"


@pytest.fixture(scope="module")
def passages():
    return prose.passages([PACKAGE])


@pytest.fixture(scope="module")
def few_uses():
    # It uses no word as often as all packages together do.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(make_tasks, "USES", 2)
        yield


@pytest.fixture(scope="module")
def items(passages, few_uses):
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
        following = {" ".join(p.sentences[:-1]): p for p in passages if len(p.sentences) > 1}
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


def test_files(items, tmp_path):
    make_tasks.write_tasks(tmp_path / "tasks", items, {"jinja2": "3"})
    for name, of_task in items.items():
        config = json.loads((tmp_path / "tasks" / f"{name}.yaml").read_text())
        assert (config["task"], config["tag"]) == (name, ["prose"])
        data = config["dataset_kwargs"]["data_files"]["test"]
        with open(data) as file:
            assert [json.loads(line) for line in file] == of_task
    sources = json.loads((tmp_path / "tasks" / "sources.json").read_text())
    assert sources["versions"] == {"jinja2": "3"}
    assert sources["items"]["next_sentence"] == 20
