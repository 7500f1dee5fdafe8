"""Prune a Hugging Face checkpoint: `python -m sparsefw.run --model MODEL --sparsity 0.6 --output pruned/`.

Without arguments it prunes the built-in model, a tiny Llama, on text that comes with every CPython.
"""

import sys

from sparsefw.cli import launched, load_libraries, run_parser, say, say_fitted, settings_of


def main(argv: list[str] | None = None) -> int:
    """Prune from the command line; returns the exit status, see `Outcome`."""
    with launched(argv) as outcome:
        inputs, config, output = settings_of(run_parser(__doc__).parse_args(argv))
        from sparsefw import memory

        # Creates the backend before the libraries are imported: it may set TRITON_INTERPRET, which Triton reads then.
        _ = config.on(memory.this_device()).backend
        load_libraries()
        from tqdm import tqdm

        from sparsefw.api import prune_checkpoint

        memory.share_freed()
        # tqdm.write prints a line above the progress bar.
        report = prune_checkpoint(inputs, config, output, log=tqdm.write)

        from sparsefw.checkpoint.files import SUMS, file_digest
        from sparsefw.report import log

        say_fitted([*filter(None, [log.kept_dense_line(report)]), "", *log.summary(report)])
        say(f"checkpoint: {output.folder}")
        say(f"report: {output.folder / 'report.html'}, {output.folder / 'report.json'}")
        say(f"SHA-256 of {output.folder / SUMS}: {file_digest(output.folder / SUMS)}")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
