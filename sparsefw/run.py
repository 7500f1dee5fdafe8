"""Prune a Hugging Face checkpoint: `python -m sparsefw.run --model MODEL --sparsity 0.6 --output pruned/`.

Without arguments it prunes the embedded model, a tiny Llama, on text that every CPython carries.
"""

import signal
import sys

import torch
from tqdm import tqdm

from sparsefw import api, process
from sparsefw.cli import inputs_and_config, run_parser, say_error
from sparsefw.errors import InputError


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit status: 0, 1 (the run failed), 2 (bad input), 130 (interrupted)."""
    # SIGTERM ends a run like Ctrl-C: nothing half-written stays.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(argv)
    except InputError as error:
        say_error(error, str(error))
        return 2
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        say_error(error, " ".join(str(error).split()))
        return 1
    except KeyboardInterrupt as error:
        say_error(error, "interrupted" if hasattr(error, "__notes__") else "interrupted; nothing was written")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def run(argv: list[str] | None) -> None:
    """Prune, evaluate and write a model, and print a summary."""
    arguments = run_parser(__doc__).parse_args(argv)
    inputs, config = inputs_and_config(arguments)
    process.share_freed()
    result = api.prune(
        inputs.model,
        arguments.output,
        config,
        dataset=inputs.dataset,
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

    if kept_dense := log.kept_dense_line(result.report):
        print(kept_dense)
    print()
    print(log.summary(result.report))
    print(f"checkpoint: {arguments.output}")
    print(f"report: {arguments.output / 'report.html'}, {arguments.output / 'report.json'}")
    print(f"SHA-256 of {arguments.output / SUMS}: {file_digest(arguments.output / SUMS)}")


if __name__ == "__main__":
    sys.exit(main())
