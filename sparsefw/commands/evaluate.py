"""Evaluate checkpoints: `sparsefw evaluate MODEL --tasks hellaswag,arc_easy --eval wikitext`.

MODEL is a folder or a Hub id, dense or pruned; one block of it is in memory at a time. All requests of all tasks go
through block 0, then through block 1, and so on. Tasks are those of lm-evaluation-harness that ask for likelihoods.
"""

from pathlib import Path

from tqdm import tqdm

from sparsefw import memory
from sparsefw.cli import Parser, quiet_libraries, say
from sparsefw.errors import InputError


def run(argv: list[str] | None) -> int:
    """Evaluate models, print a table, and write it as JSON."""
    arguments = vars(_parser().parse_args(argv))
    # This takes seconds, and --help and a mistaken flag need none of it.
    from sparsefw.evaluation import evaluate
    from sparsefw.evaluation.table import lines

    tasks = [name.strip() for names in arguments["tasks"] for name in names.split(",") if name.strip()]
    if arguments["tasks"] and not tasks:
        raise InputError("--tasks: names no task; give tasks, or leave it out")
    quiet_libraries()
    memory.share_freed()
    # Redraws the progress bar below each line.
    evaluation = evaluate(**arguments | {"tasks": tasks}, log=tqdm.write, progress=True)
    say("")
    for line in lines(evaluation):
        say(line)
    return 0


def _parser() -> Parser:
    parser = Parser("evaluate", __doc__)
    add, free = parser.add_argument, "(default: what is free, less a tenth)"
    add("models", nargs="+", metavar="MODEL", help="checkpoint folder or Hub id; several are evaluated in turn")
    add("--tasks", action="append", default=[], metavar="A,B", help="tasks, groups and tags of lm-evaluation-harness; "
        "paper: the seven zero-shot tasks of the paper; may be repeated")  # fmt: skip
    add("--eval", dest="texts", action="append", default=[], metavar="wikitext|PATH", help="text for perplexity: "
        "wikitext, c4, a .txt, .jsonl or .parquet file, or a datasets id; may be repeated")  # fmt: skip
    add("--against", metavar="DENSE", help="compare all models with this one, the same documents in pairs: differences "
        "with their standard errors")  # fmt: skip
    add("--limit", type=float, metavar="N", help="most documents of each task; below 1: a share of them (default: all)")
    add("--num-fewshot", type=int, metavar="K", help="examples before each question (default: as the task says)")
    add("--include-path", type=Path, metavar="DIR", help="folder with more tasks in the harness's format")
    add("--seqlen", type=int, metavar="N", help="tokens in a window of a text, at most the model's "
        "maximum (default: 2048)")  # fmt: skip
    add("--eval-windows", type=int, metavar="N", help="at most this many windows of each text (default: all)")
    add("--gpu-memory", type=float, metavar="GIB", help=f"take at most this of the GPU's memory {free}")
    add("--host-memory", type=float, metavar="GIB", help=f"take at most this of the host's memory {free}")
    add("--output", type=Path, metavar="DIR", help="folder for evaluation.json")
    add("--overwrite", action="store_true", help="replace an older evaluation.json there")
    return parser
