"""Evaluate checkpoints: `python -m sparsefw.evaluate MODEL --tasks hellaswag,arc_easy --eval wikitext`.

MODEL is a folder or a Hub id, dense or pruned. One block is in memory at a time: all requests of all tasks go through
block 0, then through block 1, and so on. Tasks are those of lm-evaluation-harness that need likelihoods only.
"""

import sys
from dataclasses import fields

from sparsefw.cli import Parser, add_flag, given, launched, load_libraries, say
from sparsefw.inputs import EvaluationInputs


def main(argv: list[str] | None = None) -> int:
    """Evaluate from the command line; returns the exit status, see `Outcome`."""
    with launched(argv) as outcome:
        parser = Parser("evaluate", __doc__)
        models, *flags = fields(EvaluationInputs)
        parser.add_argument(models.name, nargs="+", metavar=models.metadata["metavar"], help=models.metadata["help"])
        for f in flags:
            add_flag(parser, f)
        arguments = given(parser.parse_args(argv), EvaluationInputs)
        load_libraries()
        from tqdm import tqdm

        from sparsefw import memory
        from sparsefw.extras.evaluation.metrics import lines
        from sparsefw.extras.evaluation.run import evaluate

        memory.share_freed()
        # tqdm.write prints a line above the progress bar.
        evaluation = evaluate(**arguments, log=tqdm.write, progress=None)
        say("")
        for line in lines(evaluation):
            say(line)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
