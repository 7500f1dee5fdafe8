"""A measure that cannot be fitted: perplexity on far texts, and tasks, in two halves.

    python bench/evaluation/suite.py make DIR CALIBRATION.txt ...
    python bench/evaluation/suite.py measure DIR CHECKPOINT ... --dense MODEL [--half choose]

`make` writes twelve texts of other kinds than Wikipedia (suite_texts.py names them), none of which shares 13 words in a
row with a CALIBRATION.txt or with another, and tasks made of their sentences (make_tasks.py). Settings are chosen on
the half `choose`, and results are told of the half `report`, which has other documents. `measure` prints tables, and
writes DIR/suite.json. The measures of a half are the geometric mean over its texts of the ratios of perplexities to the
dense model's, and the mean over its tasks of the share that is lost of what the dense model has more than chance.
Standard errors are those of windows and items, in pairs with the dense model's; texts and tasks are taken as fixed.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

# The package of this checkout, whatever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from make_tasks import CHANCE, make_items, write_tasks
from prose import Passage, runs_of_sentences
from suite_texts import HALVES, write_texts

from sparsefw.checkpoint.source import Checkpoint, inspect
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import evaluation_windows
from sparsefw.extras.evaluation.harness import StreamedLM, Tasks
from sparsefw.extras.evaluation.streaming import window_losses_of
from sparsefw.inputs import locate

# Tokens of a window, and items of a task.
SEQLEN, ITEMS = 512, 600

# Answers of a model to a half: log-likelihoods per token of the windows of each text, and for each item of a task 1 if
# it is right, else 0.
Values = dict[str, dict[str, list[float]]]


def make(folder: Path, calibration: Sequence[Path]) -> None:
    """Write the suite, and print the hashes of its files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = write_texts(folder, calibration)
    for half in HALVES:
        seen: set[str] = set()
        # In comments of code there is English, too.
        named = [(x, d) for x, of_text in texts.items() if x.startswith(half) and "code" not in x for d in of_text]
        prose = [Passage(name, run) for name, document in named for run in runs_of_sentences(document, seen)]
        write_tasks(folder, half, make_items(prose, ITEMS))
    print(*(f"{digest}  {name}" for name, digest in _hashes(folder).items()), sep="\n")


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each text and task."""
    paths = sorted([*folder.glob("*.txt"), *folder.glob("*.jsonl")])
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def values_of(folder: Path, half: str, name: str, windows: int, items: int) -> Values:
    """Answers of a model to a half; kept in the folder text by text, and not computed twice for the same bytes."""
    source = inspect(locate(name))
    digest = hashlib.sha256()
    for path in sorted(source.folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    values: Values = {"txt": {}, "jsonl": {}}
    for path in sorted(x for kind in values for x in folder.glob(f"{half}_*.{kind}")):
        settings = repr((path.name, SEQLEN, windows if path.suffix == ".txt" else items)).encode()
        of_file = hashlib.sha256(digest.digest() + path.read_bytes() + settings).hexdigest()
        kept = folder / "measured" / f"{of_file[:32]}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            found = _of_text(source, path, windows) if path.suffix == ".txt" else _of_task(source, path, items)
            kept.write_text(json.dumps(found) + "\n", encoding="utf-8")
        values[path.suffix[1:]][path.stem] = json.loads(kept.read_text(encoding="utf-8"))
    return values


def _of_text(source: Checkpoint, path: Path, windows: int) -> list[float]:
    cut = evaluation_windows(load_tokenizer(source.folder), str(path), seqlen=SEQLEN, limit=windows)
    return [-loss for loss in window_losses_of(source, cut, progress=None)]


def _of_task(source: Checkpoint, path: Path, items: int) -> list[float]:
    tasks = Tasks([path.stem], path.parent, include_defaults=False)
    found = tasks.results(StreamedLM(source.folder), items, None)["samples"][path.stem]
    return [float(sample["acc"]) for sample in sorted(found, key=lambda sample: sample["doc_id"])]


def _mean(differences: dict[str, np.ndarray]) -> tuple[float, float]:
    """The mean over texts or tasks of the mean of each, and its standard error; NaN where there are none."""
    if not differences:
        return math.nan, math.nan
    errors = [x.std(ddof=1) / math.sqrt(len(x)) for x in differences.values()]
    return float(np.mean([x.mean() for x in differences.values()])), math.hypot(*errors) / len(errors)


def compared(values: Values, dense: Values) -> dict:
    """A model beside the dense one: what is measured of each text and task, and both means with standard errors."""
    logs = {name: np.subtract(x, values["txt"][name]) for name, x in dense["txt"].items()}
    above = {name: np.mean(x) - CHANCE[name.partition("_")[2]] for name, x in dense["jsonl"].items()}
    lost = {name: np.subtract(x, values["jsonl"][name]) / above[name] for name, x in dense["jsonl"].items()}
    mean, error = _mean(logs)
    return {
        "perplexity": {name: math.exp(-np.mean(x)) for name, x in values["txt"].items()},
        "accuracy": {name: float(np.mean(x)) for name, x in values["jsonl"].items()},
        "ratio": [math.exp(mean), math.exp(mean) * error],
        "lost": _mean(lost),
    }


def _table(results: dict[str, dict]) -> str:
    """Perplexities, accuracies and both measures of a half; a row for each model."""
    names = [*next(iter(results.values()))["perplexity"], *next(iter(results.values()))["accuracy"]]
    heads = [name.partition("_")[2].replace("_", " ") for name in names]
    lines = ["| | " + " | ".join([*heads[:6], "**mean ratio**", *heads[6:], "**lost, %**"]) + " |"]
    lines.append("| --- " * (len(names) + 3) + "|")
    for model, found in results.items():
        cells = [*(f"{x:.1f}" for x in found["perplexity"].values()), "{:.3f} ± {:.3f}".format(*found["ratio"])]
        cells += [f"{100 * x:.1f}" for x in found["accuracy"].values()]
        cells.append("{:.1f} ± {:.1f}".format(*(100 * x for x in found["lost"])))
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(folder: Path, halves: Sequence[str], models: Sequence[str], dense: str, windows: int, items: int) -> None:
    """Measure models that were not yet, print tables of all, and write suite.json."""
    results: dict[str, dict] = {"sha256": _hashes(folder)}
    for half in halves:
        values = {name: values_of(folder, half, name, windows, items) for name in (dense, *models)}
        results[half] = {name: compared(found, values[dense]) for name, found in values.items()}
        print(f"{half}, {windows} windows of {SEQLEN} tokens, {items} items\n\n{_table(results[half])}\n", flush=True)
    (folder / "suite.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Make the suite, or measure checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (make, measure):
        add = commands.add_parser(command.__name__, help=command.__doc__).add_argument
        add("folder", type=Path, metavar="DIR", help="folder of the suite")
        if command is make:
            add("texts", type=Path, nargs="*", metavar="CALIBRATION.txt", help="text that the suite is to differ from")
        else:
            add("models", nargs="*", metavar="CHECKPOINT", help="checkpoints, dense or pruned")
            add("--dense", required=True, metavar="MODEL", help="checkpoint that they are compared with")
            add("--half", choices=HALVES, help="the half that is measured (default: both)")
            add("--windows", type=int, default=8, metavar="N", help="windows of each text (default: 8)")
            add("--items", type=int, default=300, metavar="N", help=f"items of each task, of {ITEMS} (default: 300)")
    given = parser.parse_args(argv)
    if given.command == "make":
        make(given.folder, given.texts)
        return
    halves = [given.half] if given.half else HALVES
    measure(given.folder, halves, given.models, given.dense, given.windows, given.items)


if __name__ == "__main__":
    main()
