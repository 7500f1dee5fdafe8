"""Plan a run: `sparsefw plan --model MODEL --gpu h100`, with the flags of `sparsefw run`.

A plan needs config.json alone, which --model may name, and downloads nothing else. It prints peak memory by phase,
what is held at once and where, and disk space.
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
        cards = f"on this card: {', '.join(CARDS)} (default: on this machine)"
        parser.add_argument("--gpu", choices=CARDS, metavar="CARD", help=cards)
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
        arguments = parser.parse_args(argv)
        load_libraries()
        import torch

        from sparsefw.estimate.plan import lines, plan
        from sparsefw.memory import this_device

        inputs, config, output = settings_of(arguments)
        # That of a run on the GPU, which need not be in this machine.
        config = config.on(torch.device("cuda") if arguments.gpu else this_device())
        content = plan(inputs, config, output, arguments.gpu)
        if arguments.json:
            checked_path("json", arguments.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for line in lines(content):
            say(line)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
