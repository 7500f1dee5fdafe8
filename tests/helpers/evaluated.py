"""A model that is pruned and evaluated on tasks and a text."""

import sparsefw
from sparsefw.evaluation import evaluate

TEXT = "".join(f"{n}: a rose is a rose is a rose, {n % 7} times.\n" for n in range(40))
NAMES = ["tiny_choices", "tiny_rolling", "tiny_last_word"]
QUICK = {"nsamples": 4, "seqlen": 32, "sparsity": "0.5", "steps": 2, "reconstruct": 0, "kernel": "torch"}


def pruned(folder, output, **options):
    text = str(folder / "text.txt")
    return sparsefw.prune(
        folder / "dense", output, dataset=text, evaluate=text, eval_windows=3,
        compare=("wanda",), **QUICK | options,
    )  # fmt: skip


def evaluated(place, tasks, **options):
    text = str(place / "text.txt")
    given = {"texts": text, "eval_windows": 3, "seqlen": 32, "include_path": tasks, "against": place / "dense"}
    return evaluate(place / "pruned", NAMES, **given | options)
