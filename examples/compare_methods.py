"""Prune a model by several methods, and compare them on tasks of lm-evaluation-harness.

pip install -e '.[eval]'
python examples/compare_methods.py                                        # SmolLM2 on three tasks
python examples/compare_methods.py meta-llama/Llama-3.1-8B paper          # the paper's seven tasks
"""

import sys
from pathlib import Path

from sparsefw import prune
from sparsefw.extras.evaluation.metrics import lines
from sparsefw.extras.evaluation.run import evaluate


def main(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    tasks="arc_easy,hellaswag,piqa",
    output="methods/",
    limit=200,
    include_path=None,
    **options,
):
    """At most `limit` documents of each task, None: all; options are those of `prune`."""
    folders = [Path(output, method) for method in ("wanda", "sparsegpt", "sparsefw")]
    for folder in folders:
        # One run with compare=["wanda", "sparsegpt"] measures perplexity alone, and writes one model.
        prune(model, folder, method=folder.name, **{"sparsity": 0.6} | options)
    # Differences to the dense model are of the same documents, with their standard errors.
    found = evaluate(folders, tasks, against=model, limit=limit, include_path=include_path)
    print(*lines(found), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
