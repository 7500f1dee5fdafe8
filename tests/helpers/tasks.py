"""Tasks in the format of lm-evaluation-harness, made for models that read 64 tokens, one for each byte."""

import json
from pathlib import Path

_TEXT = "the old miller saw a grey heron fly over the mill pond and into the reeds by the far shore at dusk"
WORDS = _TEXT.split()


def _sentence(n: int, words: int) -> str:
    return " ".join(WORDS[(n * 7 + 3 * k) % len(WORDS)] for k in range(words))


def _choices(n: int) -> dict:
    """Answers of one token to many, the first two alike in some documents: a tie."""
    one = _sentence(n, 1 + n % 3)
    two = one if n % 3 == 0 else _sentence(n + 2, 2)
    return {"text": _sentence(n, 2), "choices": [one, two, "x", _sentence(n + 5, 3)], "label": n % 4}


_CHOICES = dict(
    output_type="multiple_choice", doc_to_text="{{text}}:", doc_to_choice="choices", doc_to_target="label",
    fewshot_split="train",
)  # fmt: skip


def _metric(name: str, aggregation: str = "mean", higher: bool = True) -> dict:
    return dict(metric=name, aggregation=aggregation, higher_is_better=higher)


# By name: the task, and its documents.
TASKS: dict[str, tuple[dict, list[dict]]] = {
    "tiny_choices": (
        _CHOICES | dict(metric_list=[_metric("acc"), _metric("acc_norm")]),
        [_choices(n) for n in range(9)],
    ),
    "tiny_rolling": (
        dict(
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[
                _metric("word_perplexity", "weighted_perplexity", False),
                _metric("byte_perplexity", "weighted_perplexity", False),
                _metric("bits_per_byte", "bits_per_byte", False),
            ],
        ),
        # No token, one, as many as the model reads, one more, one less, and several windows.
        [{"text": text} for text in ("", "a", _sentence(1, 40)[:64], _sentence(2, 40)[:65], _sentence(3, 40)[:63])]
        + [{"text": _sentence(4, 40)[:190]}, {"text": _sentence(5, 40)[:128]}],
    ),
    "tiny_last_word": (
        dict(
            output_type="loglikelihood",
            # The space belongs to the word.
            doc_to_text="{{text.rsplit(' ', 1)[0]}} ",
            doc_to_target="{{text.rsplit(' ', 1)[1]}}",
            target_delimiter="",
            metric_list=[_metric("acc"), _metric("perplexity", "perplexity", False)],
        ),
        [{"text": _sentence(n, 6)} for n in range(6)],
    ),
    # Contexts longer than the model takes, and the longest answers that it does.
    "tiny_long": (
        _CHOICES | dict(metric_list=[_metric("acc")]),
        [
            dict(
                text=_sentence(n, 30 + n),
                choices=["one", _sentence(n, 40)[:63], _sentence(n, 30)[: 40 + n]],
                label=0,
            )
            for n in range(3)
        ],
    ),
    # Each answer also behind nothing.
    "tiny_mutual": (
        _CHOICES | dict(metric_list=[_metric("acc"), _metric("acc_mutual_info")]),
        [_choices(n) for n in range(1, 6)],
    ),
}


def write_tasks(folder: Path) -> Path:
    """Write all tasks, a group of two and a tag to a folder."""
    for name, (config, documents) in TASKS.items():
        write_task(folder, name, config | {"tag": "tiny_tag"}, documents)
    group = {"group": "tiny_group", "task": ["tiny_choices", "tiny_mutual"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "group.yaml").write_text(json.dumps(group))
    return folder


def write_task(folder: Path, name: str, config: dict, documents: list[dict]) -> None:
    """A task of these documents."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    data_files = {"train": str(data), "test": str(data)}
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": data_files}, "test_split": "test"}
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "metadata": {"version": 3}} | where | config))
