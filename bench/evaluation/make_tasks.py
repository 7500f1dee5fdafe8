"""Tasks for lm-evaluation-harness, made of prose.

- next_sentence: a sentence goes on with its own next sentence, or with one of three from elsewhere in the text.
- word_choice: a word of a sentence is the original, or one of three that are about as frequent and as long. What is
  scored is the word and the rest of the sentence.
- true_sentence: a sentence, or the same with two of its words exchanged. There is no context.
- word_cloze: the last word of two sentences.

Items are short, so that many of them can be answered in a minute.
"""

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path

from prose import FUNCTION_WORDS, Passage, words_of

CHOICES = 4

# Accuracy of a model that knows nothing.
CHANCE = {"next_sentence": 0.25, "word_choice": 0.25, "true_sentence": 0.5, "word_cloze": 0.0}

# Words of what goes on after a sentence, and of a sentence that is judged alone.
CONTINUATION = range(6, 21)
ALONE = range(8, 21)

# Words before the blank, at least, so that it can be known.
BEFORE_BLANK = 15

# Letters of a word that may be replaced, exchanged or asked for, at least: short ones are given by grammar alone.
LETTERS = 5

# How often it is used, at least, in all text: rarer ones are names.
USES = 20

MULTIPLE_CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
ACCURACY = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


def _metrics(*names: str) -> list[dict]:
    return [ACCURACY | {"metric": name} for name in names]


# The entries of a task's YAML beside its name and its file.
SETTINGS: dict[str, dict] = {
    "next_sentence": MULTIPLE_CHOICE | dict(doc_to_text="{{context}}", metric_list=_metrics("acc", "acc_norm")),
    "word_choice": MULTIPLE_CHOICE | dict(doc_to_text="{{context}}", metric_list=_metrics("acc")),
    "true_sentence": MULTIPLE_CHOICE | dict(doc_to_text="", metric_list=_metrics("acc")),
    "word_cloze": dict(
        output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{' ' + word}}",
        metric_list=[*_metrics("acc"), dict(metric="perplexity", aggregation="perplexity", higher_is_better=False)],
    ),
}  # fmt: skip


def next_sentence(prose: Sequence[Passage]) -> Iterator[dict]:
    """One item of each passage of two sentences or more."""
    # Sentences that go on after others: the first one of a passage may be told by its style.
    later: dict[str, list[tuple[Passage, str]]] = {}
    for passage in prose:
        found = [(passage, s) for s in passage.sentences[1:] if len(words_of(s)) in CONTINUATION]
        later.setdefault(passage.text, []).extend(found)
    for passage in _shuffled(prose):
        *context, last = passage.sentences[-2:]
        length = len(words_of(last))
        others = [s for p, s in later[passage.text] if p is not passage and abs(len(words_of(s)) - length) <= 2]
        if context and length in CONTINUATION and len(others) >= CHOICES - 1:
            yield {"context": " ".join(context)} | _choices(last, random.Random(last).sample(others, CHOICES - 1))


def word_choice(prose: Sequence[Passage]) -> Iterator[dict]:
    """One item of each sentence that has a word with enough others like it."""
    uses = _uses(prose)
    for sentence in _alone(prose):
        chance = random.Random(sentence)
        words = sentence.split(" ")
        # Neither the first words, so that there is a context, nor the last.
        places = [n for n in range(3, len(words) - 1) if uses[words[n]] >= USES]
        if not places:
            continue
        n = chance.choice(places)
        others = [word for word in uses if alike(words[n], word, uses) and word not in words]
        if len(others) >= CHOICES - 1:
            rest = [" ".join([word, *words[n + 1 :]]) for word in (words[n], *chance.sample(others, CHOICES - 1))]
            yield {"context": " ".join(words[:n])} | _choices(rest[0], rest[1:])


def true_sentence(prose: Sequence[Passage]) -> Iterator[dict]:
    """One item of each sentence that has two words with the same ending, and the same word before each of them."""
    uses = _uses(prose)
    for sentence in _alone(prose):
        words = sentence.split(" ")
        # Words of the same ending behind the same word: grammar alone does not tell them apart.
        forms = [(before, ending(word)) for before, word in pairwise(words)]
        places = [n for n in range(1, len(words)) if uses[words[n]]]
        pairs = [
            (n, m) for m in places for n in places if n < m and words[n] != words[m] and forms[n - 1] == forms[m - 1]
        ]
        if pairs:
            n, m = random.Random(sentence).choice(pairs)
            exchanged = words.copy()
            exchanged[n], exchanged[m] = words[m], words[n]
            yield {"context": ""} | _choices(sentence, [" ".join(exchanged)])


def word_cloze(prose: Sequence[Passage]) -> Iterator[dict]:
    """One item of each passage of two sentences or more that ends with a word that is in use elsewhere."""
    uses = _uses(prose)
    for passage in _shuffled(prose):
        *context, word = " ".join(passage.sentences[-2:]).split(" ")
        word = word[:-1]
        if len(passage.sentences) > 1 and len(context) >= BEFORE_BLANK and uses[word] >= USES:
            yield {"context": " ".join(context), "word": word}


# Each makes the items of a task one by one, so that no more are made than are asked for.
TASKS = (next_sentence, word_choice, true_sentence, word_cloze)


def make_items(prose: Sequence[Passage], most: int) -> dict[str, list[dict]]:
    """The items of every task, at most so many of each."""
    return {make.__name__: list(islice(make(prose), most)) for make in TASKS}


def alike(word: str, other: str, uses: Counter[str]) -> bool:
    """Whether another word could stand in a word's place by its length, its ending and how often it is used."""
    return (
        other[:3] != word[:3]
        and abs(len(other) - len(word)) <= 1
        and ending(other) == ending(word)
        and uses[other] >= USES
        and abs(math.log(uses[other] / uses[word])) <= math.log(2)
    )


def ending(word: str) -> str:
    """The ending of a word, which mostly tells its part of speech."""
    return next((end for end in ("ing", "ed", "ly", "s") if word.endswith(end)), "")


def _uses(prose: Sequence[Passage]) -> Counter[str]:
    """How often each word is used that has enough letters, none of them a capital."""
    counted = Counter(word for passage in prose for sentence in passage.sentences for word in words_of(sentence))
    letters = re.compile(rf"[a-z]{{{LETTERS},}}")
    return Counter({word: n for word, n in counted.items() if letters.fullmatch(word) and word not in FUNCTION_WORDS})


def _shuffled(prose: Sequence[Passage]) -> list[Passage]:
    """Passages by their hash: one that another version of a package lacks moves no other."""
    return sorted(prose, key=lambda passage: _hash(" ".join(passage.sentences)))


def _alone(prose: Sequence[Passage]) -> list[str]:
    """Sentences that can be judged alone, by their hash."""
    return sorted((s for passage in prose for s in passage.sentences if len(words_of(s)) in ALONE), key=_hash)


def _choices(right: str, wrong: list[str]) -> dict:
    """The choices of an item, in an order that tells nothing."""
    # Not by the plain hash: those that items are taken by are small.
    choices = sorted([right, *wrong], key=lambda choice: _hash(f"choice {choice}"))
    return {"choices": choices, "label": choices.index(right)}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_tasks(folder: Path, tag: str, items: dict[str, list[dict]]) -> None:
    """Write a YAML and a JSONL file for each task, whose name is the tag and that of its items."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, of_task in items.items():
        data = folder.resolve() / f"{tag}_{name}.jsonl"
        data.write_text("".join(json.dumps(item) + "\n" for item in of_task), encoding="utf-8")
        config = {"task": data.stem, "tag": [tag], "dataset_path": "json", "test_split": "test", "num_fewshot": 0}
        config |= {"dataset_kwargs": {"data_files": {"test": str(data)}}, "metadata": {"version": 1.0}}
        # JSON is YAML, too.
        data.with_suffix(".yaml").write_text(json.dumps(config | SETTINGS[name], indent=1) + "\n", encoding="utf-8")
