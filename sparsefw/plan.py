"""Plan a run: `python -m sparsefw.plan --model MODEL --gpu h100`, with the flags of a run.

A plan downloads only the model's config.json; --model may also name this file. It prints peak memory by phase, the
placement (how much is in memory at a time, and where), and disk space.
"""

import json
import sys
from pathlib import Path

from sparsefw.cli import launched, load_libraries, run_parser, say, settings_of
from sparsefw.fields import checked_path
from sparsefw.inputs import CARDS


def main(argv: list[str] | None = None) -> int:
    """Plan from the command line; returns the exit status, see `Outcome`."""
    with launched(argv) as outcome:
        parser = run_parser(__doc__, "plan")
        cards = f"plan for this GPU: {', '.join(CARDS)} (default: this machine)"
        parser.add_argument("--gpu", choices=CARDS, metavar="CARD", help=cards)
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
        arguments = parser.parse_args(argv)
        load_libraries()
        import torch

        from sparsefw.estimate.plan import lines, plan
        from sparsefw.memory import this_device

        inputs, config, output = settings_of(arguments)
        # The config of a run on that GPU, which this machine need not have.
        config = config.on(torch.device("cuda") if arguments.gpu else this_device())
        content = plan(inputs, config, output, arguments.gpu)
        if arguments.json:
            checked_path("json", arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for line in lines(content):
            say(line)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
