"""Prune a Hugging Face checkpoint: `python -m sparsefw.run --model MODEL --sparsity 0.6 --output pruned/`.

Without arguments it prunes the embedded model, a tiny Llama, on text that every CPython carries.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from sparsefw import api, process
from sparsefw.cli import inputs_and_config, quiet_libraries, run_parser, say


def run(argv: list[str] | None) -> int:
    """Prune, evaluate and write a model, and print a summary."""
    arguments = run_parser(__doc__).parse_args(argv)
    inputs, config = inputs_and_config(arguments)
    quiet_libraries()
    process.share_freed()
    with _noted("nothing was written"):
        result = api.prune(
            inputs.model,
            arguments.output,
            config,
            dataset=inputs.shares,
            nsamples=inputs.nsamples,
            seqlen=inputs.seqlen,
            seed=inputs.seed,
            evaluate=inputs.evaluate,
            eval_windows=inputs.eval_windows,
            gpu_memory=arguments.gpu_memory,
            host_memory=arguments.host_memory,
            overwrite=arguments.overwrite,
            restart=arguments.restart,
            # Redraws the progress bar below each line.
            log=tqdm.write,
            progress=True,
        )

    from sparsefw.checkpoint import SUMS, file_digest
    from sparsefw.report import log

    output = result.output
    assert output is not None
    with _noted(f"{output} is complete"):
        if kept_dense := log.kept_dense_line(result.report):
            say(kept_dense)
        say("")
        for line in log.summary(result.report):
            say(line)
        say(f"checkpoint: {output}")
        say(f"report: {output / 'report.html'}, {output / 'report.json'}")
        say(f"SHA-256 of {output / SUMS}: {file_digest(output / SUMS)}")
    return 0


@contextmanager
def _noted(state: str) -> Iterator[None]:
    """Add the state of the output to an interruption, unless the writer of the output has done so."""
    try:
        yield
    except KeyboardInterrupt as error:
        if not hasattr(error, "__notes__"):
            error.add_note(state)
        raise
