"""Run the command of lm-evaluation-harness, with all its flags, and with the model "sparsefw":

    python -m sparsefw.lm_eval --model sparsefw --model_args pretrained=MODEL --tasks hellaswag

The harness's own command does not find models of other packages.
"""

import sys

from sparsefw.errors import InputError


def main() -> int:
    """Run the harness's command; returns the exit status, 2 for bad input."""
    # Importing the package registers the model.
    from sparsefw.extras.evaluation.run import check_installed

    try:
        check_installed()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except InputError as error:
        print(f"sparsefw: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
