"""Make tasks for lm-evaluation-harness out of the English prose in any text.

- word_choice: a word of a sentence is the original, or one of three that are about as frequent and as long. The word
  and the rest of the sentence are scored.
- word_cloze: the last word of two sentences.

Items are short, so that a model answers many of them in a minute.
"""

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

CHOICES = 4
# Accuracy of a model that knows nothing.
CHANCE = {"word_choice": 0.25, "word_cloze": 0.0}
ITEMS = 600
# Words of a scored sentence.
LENGTHS = range(6, 21)
# Fewest words of two sentences before the last word, so that it can be known.
CONTEXT = 15
# Fewest letters of a word that is asked for, since grammar alone tells short ones, and fewest uses of it in all text,
# since rarer ones are names.
LETTERS, USES = 5, 20

# A word may have a hyphen or an apostrophe. Capitals within a word, digits and underscores are names of code.
WORD = r"[A-Za-z][a-z]*(?:['-][A-Za-z]?[a-z]+)*"
SENTENCE = re.compile(rf"[A-Z][a-z'-]*(?:[,;:]? \(?{WORD}\)?)+[.?!]")
# Words that are in most English sentences, and seldom in lists of names.
FUNCTION_WORDS = frozenset(
    """
    the a an of to and in is are that it for be as with this by on or not from if which can will at has have was were
    but when one all may its you do they there so than only any other into using such then no each these those must
    should would also been does how what where while both more most some between after before because
    """.split()  # noqa: SIM905
)

# A passage is a tuple of sentences that follow each other in a text.
Passage = tuple[str, ...]


def write_tasks(folder: Path, tag: str, documents: Sequence[str]) -> None:
    """Write a YAML and a JSONL file for each task of these documents. The tag and the task make its name."""
    found, seen = [], set()
    for document in documents:
        found += passages(document, seen)
    # In the order of their hashes, a passage that another version of a package lacks moves no other.
    found.sort(key=lambda passage: _hash(" ".join(passage)))
    targets = {
        word_choice: dict(output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="{{label}}"),
        word_cloze: dict(output_type="loglikelihood", doc_to_target="{{' ' + word}}"),
    }
    for make, target in targets.items():
        data = folder.resolve() / f"{tag}_{make.__name__}.jsonl"
        items = islice(make(found), ITEMS)
        data.write_text("".join(json.dumps(item) + "\n" for item in items), "utf-8")
        config = dict(
            task=data.stem,
            tag=[tag],
            dataset_path="json",
            test_split="test",
            num_fewshot=0,
            dataset_kwargs={"data_files": {"test": str(data)}},
            metadata={"version": 2.0},
            doc_to_text="{{context}}",
            **target,
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        )
        # JSON is YAML, too.
        data.with_suffix(".yaml").write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def word_choice(found: Sequence[Passage]) -> Iterator[dict]:
    """Make items of word_choice, one of each sentence that has a word with enough others like it."""
    uses = _uses(found)
    for sentence in (sentence for passage in found for sentence in passage):
        drawn, words = random.Random(sentence), sentence.split(" ")
        # Neither the first words, so that there is a context, nor the last.
        places = [n for n in range(3, len(words) - 1) if uses[words[n]] >= USES]
        if len(words) not in LENGTHS or not places:
            continue
        place = drawn.choice(places)
        others = [word for word in uses if alike(words[place], word, uses) and word not in words]
        if len(others) >= CHOICES - 1:
            chosen = [words[place], *drawn.sample(others, CHOICES - 1)]
            right, *wrong = (" ".join([word, *words[place + 1 :]]) for word in chosen)
            # An order that tells nothing.
            choices = sorted([right, *wrong], key=lambda choice: _hash(f"choice {choice}"))
            yield {"context": " ".join(words[:place]), "choices": choices, "label": choices.index(right)}


def word_cloze(found: Sequence[Passage]) -> Iterator[dict]:
    """Make items of word_cloze, one of each passage whose last word is used elsewhere."""
    uses = _uses(found)
    for passage in found:
        *context, last = " ".join(passage[-2:]).split(" ")
        if len(passage) > 1 and len(context) >= CONTEXT and uses[last[:-1]] >= USES:
            yield {"context": " ".join(context), "word": last[:-1]}


def alike(word: str, other: str, uses: Counter[str]) -> bool:
    """Tell whether another word could take a word's place by its length, its ending and the number of its uses."""
    endings = [next((end for end in ("ing", "ed", "ly", "s") if x.endswith(end)), "") for x in (word, other)]
    return (
        other[:3] != word[:3]
        and abs(len(other) - len(word)) <= 1
        and endings[0] == endings[1]
        and uses[other] >= USES
        and uses[word] / 2 <= uses[other] <= 2 * uses[word]
    )


def passages(text: str, seen: set[str]) -> Iterator[Passage]:
    """Yield the passages of a text. A sentence in `seen` or without prose ends one. Adds the sentences to `seen`."""
    passage = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        # A single letter with a full stop may be the initial of a name.
        for sentence in re.split(r"(?<=[a-z)][.?!]) (?=[A-Z])", " ".join(paragraph.split())):
            if is_prose(sentence) and sentence not in seen:
                seen.add(sentence)
                passage.append(sentence)
            elif passage:
                yield tuple(passage)
                passage = []
    if passage:
        yield tuple(passage)


def is_prose(sentence: str) -> bool:
    """Tell whether a text is one whole English sentence, without names of code, numbers and formulas."""
    words = words_of(sentence)
    common = sum(word.lower() in FUNCTION_WORDS for word in words)
    enough = len(words) >= 5 and common >= len(words) / 4
    return enough and sentence.count("(") == sentence.count(")") and SENTENCE.fullmatch(sentence) is not None


def words_of(sentence: str) -> list[str]:
    """List the words of a sentence, without punctuation."""
    return [word.strip(".,;:?!()") for word in sentence.split()]


def _uses(found: Sequence[Passage]) -> Counter[str]:
    """Count the uses of each word that has enough letters and no capital."""
    counted = Counter(word for passage in found for sentence in passage for word in words_of(sentence))
    letters = re.compile(rf"[a-z]{{{LETTERS},}}")
    return Counter({word: n for word, n in counted.items() if letters.fullmatch(word) and word not in FUNCTION_WORDS})


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
