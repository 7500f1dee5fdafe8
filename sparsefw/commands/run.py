"""Prune a Hugging Face checkpoint: `sparsefw run --model MODEL --sparsity 0.6 --output pruned/`.

Without arguments it prunes the embedded model, a tiny Llama, on text that every CPython carries.
"""

from tqdm import tqdm

from sparsefw import api, memory
from sparsefw.cli import inputs_and_config, output_of, quiet_libraries, run_parser, say


def run(argv: list[str] | None) -> int:
    """Prune, evaluate and write a model, and print a summary."""
    arguments = run_parser(__doc__).parse_args(argv)
    (inputs, config), output = inputs_and_config(arguments), output_of(arguments)
    quiet_libraries()
    memory.share_freed()
    # Redraws the progress bar below each line.
    report = api.prune_checkpoint(inputs, config, output, log=tqdm.write, progress=True)

    from sparsefw.checkpoint import SUMS, file_digest
    from sparsefw.report import log

    if kept_dense := log.kept_dense_line(report):
        say(kept_dense)
    say("")
    for line in log.summary(report):
        say(line)
    say(f"checkpoint: {output.folder}")
    say(f"report: {output.folder / 'report.html'}, {output.folder / 'report.json'}")
    say(f"SHA-256 of {output.folder / SUMS}: {file_digest(output.folder / SUMS)}")
    return 0
