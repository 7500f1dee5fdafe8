"""Prune a Hugging Face checkpoint: `python -m sparsefw.run --model MODEL --sparsity 0.6 --output pruned/`.

Without arguments a tiny Llama that the package carries is pruned, on text that every CPython carries.
"""

import argparse
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch

from sparsefw import patterns
from sparsefw.errors import InputError, first_line
from sparsefw.frank_wolfe import STEP_RULES
from sparsefw.kernels.reference import PRECISIONS
from sparsefw.prune import METHODS, Settings
from sparsefw.saliency import SALIENCIES

DEFAULT = "default"
DEFAULT_MODEL = Path(__file__).with_name("default") / "model"

# What `--preset` stands for; a flag given beside it wins.
PRESETS = {
    "sparsefw": {"step_rule": "line-search", "steps": 30, "alpha": 0.5, "penalty": 1.0},
    "paper": {"step_rule": "open-loop", "steps": 2000, "alpha": 0.9, "penalty": 0.0},
}

# Calibration for a checkpoint, and for the embedded default.
SAMPLES = {"checkpoint": {"nsamples": 256, "seqlen": 2048}, DEFAULT: {"nsamples": 64, "seqlen": 128}}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit 2; the usage is what --help is for."""
        self.exit(2, f"sparsefw: {message} (--help lists the options)\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line; everything that needs no file is settled here.

    Raises:
        InputError: a value out of range.
    """
    parser = _Parser(prog="python -m sparsefw.run", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default=DEFAULT, metavar="ID|PATH", help="checkpoint folder or Hub id (default: the embedded model)")
    add("--dataset", metavar="NAME|PATH", help="calibration text: c4, wikitext, a .txt, .jsonl or .parquet file, or a "
        "datasets id (default: c4; the embedded text for the embedded model)")  # fmt: skip
    add("--nsamples", type=int, metavar="N", help="calibration windows (default: 256; embedded model: 64)")
    add("--seqlen", type=int, metavar="N", help="tokens in a window, at most the model's maximum (default: 2048; "
        "embedded model: 128)")  # fmt: skip
    add("--seed", type=int, default=0, metavar="N", help="of the drawing of calibration windows (default: 0)")
    add("--sparsity", default="0.6", metavar="PATTERN", help="0.6: that fraction of every row is removed; layer:0.6: "
        "of every matrix; 2:4: 2 of every 4 weights are kept (default: 0.6)")  # fmt: skip
    add("--method", choices=METHODS, default="sparsefw", help="how masks are chosen (default: sparsefw)")
    add("--compare", choices=METHODS, action="append", metavar="METHOD", help="prune with this one of --method's "
        "too, for the table; may be repeated (default: none; embedded model: wanda)")  # fmt: skip
    add("--preset", choices=PRESETS, default="sparsefw", help="sparsefw: line search, integrality penalty, 30 steps, "
        "alpha 0.5; paper: open loop, 2000 steps, no penalty, alpha 0.9, last iterate rounded (default: "
        "sparsefw)")  # fmt: skip
    add("--warm-start", choices=SALIENCIES, default="wanda", help="saliency of the first mask (default: wanda)")
    add("--steps", type=int, metavar="N", help="Frank-Wolfe steps (default: the preset's)")
    add("--step-rule", choices=STEP_RULES, help="(default: the preset's)")
    add("--alpha", type=float, metavar="A", help="fraction of kept weights fixed by saliency (default: the preset's)")
    add("--penalty", type=float, metavar="P", help="final weight of the integrality penalty, 0 to 1 (default: the "
        "preset's)")  # fmt: skip
    add("--kernel", choices=("triton", "torch"), help="triton without a GPU runs in the interpreter: exact and slow "
        "(default: triton where CUDA is available, else torch)")  # fmt: skip
    add("--precision", choices=PRECISIONS, help="of the matrix products (default: tf32 on a GPU, else ieee)")
    add("--eval", metavar="wikitext|PATH", help="held-out text for perplexity (default: none; embedded model: its own)")
    add("--eval-windows", type=int, metavar="N", help="at most this many windows of --seqlen tokens (default: all)")
    add("--output", type=Path, default=Path("pruned"), metavar="DIR", help="(default: pruned)")
    add("--overwrite", action="store_true", help="replace what is in the output folder")
    arguments = parser.parse_args(argv)

    embedded = arguments.model == DEFAULT
    defaults = PRESETS[arguments.preset] | SAMPLES[DEFAULT if embedded else "checkpoint"]
    defaults |= {"dataset": DEFAULT, "eval": DEFAULT, "compare": ["wanda"]} if embedded else {"dataset": "c4"}
    defaults["compare"] = defaults.get("compare", [])
    cuda = torch.cuda.is_available()
    defaults |= {"kernel": "triton", "precision": "tf32"} if cuda else {"kernel": "torch", "precision": "ieee"}
    arguments.kernel_chosen = arguments.kernel is not None
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, low, high in (("nsamples", 1, None), ("seqlen", 2, None), ("eval_windows", 1, None), ("steps", 0, None),
                            ("alpha", 0, 1), ("penalty", 0, 1), ("seed", 0, 2**63 - 1)):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            upper = "" if high is None else f" and at most {high}"
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {low}{upper}")
    arguments.compare = [m for m in dict.fromkeys(arguments.compare) if m != arguments.method]
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit status: 0, 1 (the run failed), 2 (bad input), 130 (interrupted)."""
    # A polite kill ends like Ctrl-C: nothing half-written stays.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(parse_arguments(argv))
    except InputError as error:
        print(f"sparsefw: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        print(f"sparsefw: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sparsefw: interrupted; nothing was written", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Prune, evaluate, write, report."""
    pattern = patterns.parse(arguments.sparsity)
    paper = arguments.preset == "paper"
    whole = paper and pattern.scope == "layer"
    if whole and arguments.penalty:
        raise InputError("--penalty: the paper's budget for a whole matrix (--preset paper, layer:) has no penalty")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if arguments.kernel == "triton" and not cuda:
        # Read when triton is imported, which the imports below do.
        os.environ["TRITON_INTERPRET"] = "1"
    print(f"kernel: {arguments.kernel} ({_why(arguments, cuda)}), precision {arguments.precision}", flush=True)
    ops = importlib.import_module(f"sparsefw.kernels.{'fused' if arguments.kernel == 'triton' else 'reference'}")

    from tqdm import tqdm

    from sparsefw import checkpoint, data, report, writer
    from sparsefw.driver import prune_model
    from sparsefw.stream import StreamedModel

    settings = Settings(
        pattern=pattern,
        warm_start=arguments.warm_start,
        steps=arguments.steps,
        step_rule=arguments.step_rule,
        penalty=arguments.penalty,
        alpha=arguments.alpha,
        best_of=not paper,
        whole=whole,
        precision=arguments.precision,
    )
    folder = DEFAULT_MODEL if arguments.model == DEFAULT else checkpoint.locate(arguments.model)
    writer.check_output(arguments.output, folder, arguments.overwrite)
    source = checkpoint.inspect(folder)
    tokenizer = _tokenizer(folder)
    model = StreamedModel(source, device)
    seqlen = min(arguments.seqlen, model.max_seqlen or arguments.seqlen)
    if seqlen < arguments.seqlen:
        print(f"seqlen: {seqlen} tokens, the model's maximum (asked for {arguments.seqlen})")
    calibration = data.calibration_windows(
        tokenizer, arguments.dataset, nsamples=arguments.nsamples, seqlen=seqlen, seed=arguments.seed
    )
    evaluation = None
    if arguments.eval:
        evaluation = data.evaluation_windows(tokenizer, arguments.eval, seqlen=seqlen, limit=arguments.eval_windows)
    for note in model.notes:
        print(f"note: {note}")
    methods = [*arguments.compare, arguments.method]
    print(f"model: {arguments.model}, {len(model.blocks)} blocks, {source.dtype}")
    print(f"calibration: {calibration.n} windows of {calibration.seqlen} tokens of {calibration.source}")
    print(report.layer_header(), flush=True)

    with writer.Writer(arguments.output, arguments.overwrite) as output:
        with tqdm(total=len(model.blocks), unit="block", disable=None) as bar:
            outcome = prune_model(
                model,
                calibration,
                evaluation,
                methods,
                settings,
                ops,
                output,
                on_layer=lambda row: bar.write(report.layer_row(row)),
                on_block=lambda: bar.update(),
            )
        said = {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()}
        said = {name: v for name, v in said.items() if name != "kernel_chosen"} | {"seqlen": seqlen}
        content = report.report(said, device, calibration, arguments.seed, evaluation, outcome)
        (output.folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        output.finish(folder)
    if outcome.dense:
        print(f"kept dense: {', '.join(outcome.dense)}")
    print()
    print(report.summary(outcome, methods, evaluation))
    print(f"checkpoint: {arguments.output}")
    print(f"report: {arguments.output / 'report.json'}")


def _why(arguments: argparse.Namespace, cuda: bool) -> str:
    if arguments.kernel == "triton" and not cuda:
        return "as asked; no CUDA device, so Triton's interpreter: exact and slow"
    if arguments.kernel_chosen:
        return "as asked"
    return "CUDA is available" if cuda else "no CUDA device"


def _tokenizer(folder: Path):
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"{folder}: no tokenizer could be loaded: {first_line(error)}") from error


if __name__ == "__main__":
    sys.exit(main())
