"""Recover part of the quality that pruning has cost: `python -m sparsefw.recover PRUNED OUTPUT`.

All kept weights are fitted together, so that the pruned model predicts what the dense model does. Zeros stay zeros.
The model and the optimizer's state have to fit into memory: at 60 % in bf16, 8.8 bytes per weight. More tokens give
better results.
"""

import sys
from dataclasses import fields

from sparsefw.cli import FAILED, Parser, add_flag, folder, given, launched, load_libraries, refuse_ranks, say
from sparsefw.inputs import Inputs, Output
from sparsefw.solver.config import PruneConfig

# The flags of this command, and their defaults where these are not those of a run.
FLAGS = {
    "model": "the run's",
    "dataset": "the run's",
    "seqlen": "the run's",
    "seed": "the run's, plus 1",
    "recover": "twice the calibration tokens; four times with fewer than 128 windows",
    **dict.fromkeys(("overwrite", "restart", "gpu_memory", "host_memory", "hours"), ""),
}


def main(argv: list[str] | None = None) -> int:
    """Recover from the command line; returns the exit status, see `Outcome`."""
    with launched(argv) as outcome:
        parser = Parser("recover", __doc__)
        parser.add_argument("pruned", type=folder, metavar="PRUNED", help="folder that sparsefw wrote")
        parser.add_argument("folder", type=folder, metavar="OUTPUT", help="folder for the result")
        for f in (*fields(Inputs), *fields(PruneConfig), *fields(Output)):
            if f.name in FLAGS:
                add_flag(parser, f, FLAGS[f.name])
        arguments = parser.parse_args(argv)
        refuse_ranks("recover")
        inputs = given(arguments, Inputs) | given(arguments, PruneConfig)
        output = Output(**given(arguments, Output))
        load_libraries()
        from sparsefw import memory
        from sparsefw.extras.recover_output import recover_output

        memory.share_freed()
        if recover_output(arguments.pruned, output, inputs, say) is None:
            outcome.status = FAILED
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
