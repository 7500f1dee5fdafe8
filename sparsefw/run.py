"""Prune a Hugging Face checkpoint: `python -m sparsefw.run --model MODEL --sparsity 0.6 --output pruned/`.

Without arguments a tiny Llama that the package carries is pruned, on text that every CPython carries.
"""

import argparse
import importlib
import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from sparsefw import process
from sparsefw.data.windows import Windows
from sparsefw.errors import InputError
from sparsefw.kernels.cpu import PRECISIONS
from sparsefw.solver import patterns
from sparsefw.solver.frank_wolfe import STEP_RULES
from sparsefw.solver.methods import METHODS, TARGETS, Settings
from sparsefw.solver.saliency import SALIENCIES

DEFAULT = "default"
DEFAULT_MODEL = Path(__file__).with_name("default") / "model"

# What `--preset` stands for; a flag given beside it wins.
PRESETS = {
    "sparsefw": dict(step_rule="line-search", steps=30, alpha=0.0, penalty=1.0, refit=4, rounds=3),
    "paper": dict(step_rule="open-loop", steps=2000, alpha=0.9, penalty=0.0, refit=0, rounds=0),
}
# What goes with it where kept weights are refitted, and where they stay as they are and their masks are final.
WITH_REFIT = dict(swaps=0, target="dense", damp=0.1)
WITHOUT_REFIT = {
    "sparsefw": dict(steps=40, swaps=100, target="layer", damp=0.2),
    "paper": dict(swaps=0, target="layer", damp=0.0),
}

# Flags that only Frank-Wolfe listens to.
FRANK_WOLFE = ("warm_start", "steps", "step_rule", "alpha", "penalty", "swaps", "refit", "rounds", "target", "damp")

# Least and greatest value of a flag.
RANGES = {
    "nsamples": (1, None),
    "seqlen": (2, None),
    "eval_windows": (1, None),
    "steps": (0, None),
    "alpha": (0, 1),
    "penalty": (0, 1),
    "swaps": (0, None),
    "refit": (0, None),
    "rounds": (0, None),
    "damp": (0, 2**20),
    "gpu_memory": (0, 2**20),
    "host_memory": (0, 2**20),
    "seed": (0, 2**63 - 1),
}

# Of free memory this share is left to others.
MARGIN = 0.1

# Of the flags those that change nothing in the result, and those whose content is compared.
WITHOUT_EFFECT = {"output", "overwrite", "restart", "kernel_chosen", "gpu_memory", "host_memory"}
BY_CONTENT = {"model", "dataset", "eval"}

# Calibration for a checkpoint, and for the embedded default.
SAMPLES = {"checkpoint": {"nsamples": 256, "seqlen": 2048}, DEFAULT: {"nsamples": 64, "seqlen": 128}}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit 2; the usage is what --help is for."""
        self.exit(2, f"sparsefw: {message} (--help lists the options)\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line; everything that needs no file is settled here.

    Raises:
        InputError: a value out of range.
    """
    parser = Parser(prog="python -m sparsefw.run", description=__doc__, allow_abbrev=False)
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
        "alpha 0, refit 4, 3 rounds; with --refit 0, 40 steps and swaps; paper: open loop, 2000 steps, no penalty, "
        "alpha 0.9, last iterate rounded, no refit (default: sparsefw)")  # fmt: skip
    add("--warm-start", choices=SALIENCIES, help="saliency of the first mask (default: wanda)")
    add("--steps", type=int, metavar="N", help="Frank-Wolfe steps (default: the preset's; 40 with --refit 0)")
    add("--step-rule", choices=STEP_RULES, help="(default: the preset's)")
    add("--alpha", type=float, metavar="A", help="fraction of kept weights fixed by saliency (default: the preset's)")
    add("--penalty", type=float, metavar="P", help="final weight of the integrality penalty, 0 to 1 (default: the "
        "preset's)")  # fmt: skip
    add("--swaps", type=int, metavar="N", help="1-swaps at most of every row's mask after Frank-Wolfe, each of which "
        "lowers the row's error (default: 0; 100 with --refit 0, but for --preset paper)")  # fmt: skip
    add("--refit", type=int, metavar="STEPS", help="conjugate-gradient steps with which kept weights make up for "
        "removed ones, in each refit; 0 leaves kept weights as they are (default: the preset's)")  # fmt: skip
    add("--rounds", type=int, metavar="N", help="rounds of choosing the mask again for refitted weights; 0 only refits "
        "(default: the preset's)")  # fmt: skip
    add("--target", choices=TARGETS, help="what layers approximate. dense: the dense model's outputs, so that "
        "they make up for pruned ones before them; layer: what the layer itself makes of its input, with far fewer "
        "forward passes (default: dense; layer with --refit 0)")  # fmt: skip
    add("--damp", type=float, metavar="D", help="this share of the Gram matrix's diagonal is added to it where masks "
        "and weights are chosen, so that they hold on other text (default: 0.1; 0.2 with --refit 0, but for --preset "
        "paper: 0)")  # fmt: skip
    add("--gpu-memory", type=float, metavar="GIB", help="the run takes at most this of the GPU's memory (default: "
        "what is free, less a margin)")  # fmt: skip
    add("--host-memory", type=float, metavar="GIB", help="and this of the host's, in all (default: what is free, "
        "less a margin)")  # fmt: skip
    add("--kernel", choices=("triton", "torch"), help="triton without a GPU runs in the interpreter: exact and slow "
        "(default: triton where CUDA is available, else torch)")  # fmt: skip
    add("--precision", choices=PRECISIONS, help="of the matrix products (default: bf16 on a GPU, else ieee)")
    add("--eval", action="append", metavar="wikitext|PATH", help="held-out text for perplexity; may be repeated "
        "(default: none; embedded model: its own)")  # fmt: skip
    add("--eval-windows", type=int, metavar="N", help="at most this many windows of --seqlen tokens (default: all)")
    add("--output", type=Path, default=Path("pruned"), metavar="DIR", help="(default: pruned)")
    add("--overwrite", action="store_true", help="replace what is in the output folder")
    add("--restart", action="store_true", help="discard what an interrupted run has finished; without it the same "
        "command goes on from there")  # fmt: skip
    arguments = parser.parse_args(argv)

    given = [name for name in FRANK_WOLFE if getattr(arguments, name) is not None]
    embedded = arguments.model == DEFAULT
    defaults = PRESETS[arguments.preset] | SAMPLES[DEFAULT if embedded else "checkpoint"]
    defaults |= {"dataset": DEFAULT, "eval": [DEFAULT], "compare": ["wanda"]} if embedded else {"dataset": "c4"}
    defaults = {"compare": [], "eval": [], "warm_start": "wanda"} | defaults
    cuda = torch.cuda.is_available()
    defaults |= {"kernel": "triton", "precision": "bf16"} if cuda else {"kernel": "torch", "precision": "ieee"}
    arguments.kernel_chosen = arguments.kernel is not None
    refits = defaults["refit"] if arguments.refit is None else arguments.refit
    defaults |= WITH_REFIT if refits else WITHOUT_REFIT[arguments.preset]
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, (low, high) in RANGES.items():
        value = getattr(arguments, name)
        if value is not None and not (low <= value and (high is None or value <= high)):
            upper = "" if high is None else f" and at most {high}"
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {low}{upper}")
    arguments.compare = [m for m in dict.fromkeys(arguments.compare) if m != arguments.method]
    if given and "sparsefw" not in (arguments.method, *arguments.compare):
        raise InputError(
            f"--{given[0].replace('_', '-')}: --method {arguments.method} does not use it, only sparsefw does"
        )
    if not arguments.refit:
        if "rounds" in given and arguments.rounds:
            raise InputError("--rounds: masks are chosen again for refitted weights, and --refit 0 refits none")
        arguments.rounds = 0
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    """How masks and weights are chosen.

    Raises:
        InputError: no such pattern, or flags that do not go together.
    """
    pattern = patterns.parse(arguments.sparsity)
    paper = arguments.preset == "paper"
    whole = paper and pattern.scope == "layer"
    for flag in ("penalty", "swaps", "refit"):
        if whole and getattr(arguments, flag):
            raise InputError(f"--{flag}: the paper's budget for a whole matrix (--preset paper, layer:) has none")
    return Settings(
        pattern=pattern,
        warm_start=arguments.warm_start,
        steps=arguments.steps,
        step_rule=arguments.step_rule,
        penalty=arguments.penalty,
        swaps=arguments.swaps,
        alpha=arguments.alpha,
        best_of=not paper,
        whole=whole,
        precision=arguments.precision,
        refit=arguments.refit,
        rounds=arguments.rounds,
        target=arguments.target,
        damp=arguments.damp,
    )


def main(argv: list[str] | None = None) -> int:
    """Run from the command line. Returns the exit status: 0, 1 (the run failed), 2 (bad input), 130 (interrupted)."""
    # A polite kill ends like Ctrl-C: nothing half-written stays.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(parse_arguments(argv))
    except InputError as error:
        return _say(2, error, str(error))
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        return _say(1, error, " ".join(str(error).split()))
    except KeyboardInterrupt as error:
        return _say(130, error, "interrupted")
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _say(status: int, error: BaseException, message: str) -> int:
    """One line for what ended the run, with what is left of it."""
    left = getattr(error, "__notes__", ["nothing was written"] if isinstance(error, KeyboardInterrupt) else [])
    print(f"sparsefw: {'; '.join([message, *left])}", file=sys.stderr)
    return status


def run(arguments: argparse.Namespace) -> None:
    """Prune, evaluate, write, report."""
    settings = settings_of(arguments)
    process.share_freed()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if arguments.kernel == "triton" and not cuda:
        # Read when triton is imported, which the imports below do.
        os.environ["TRITON_INTERPRET"] = "1"
    print(f"kernel: {arguments.kernel} ({_why(arguments, cuda)}), precision {arguments.precision}", flush=True)
    ops = importlib.import_module(f"sparsefw.kernels.{'triton_ops' if arguments.kernel == 'triton' else 'cpu'}")

    from tqdm import tqdm

    from sparsefw import checkpoint, data
    from sparsefw.checkpoint import writer
    from sparsefw.checkpoint.reader import fingerprint
    from sparsefw.checkpoint.resume import durably
    from sparsefw.data.tokenizer import load_tokenizer
    from sparsefw.driver.loop import prune_model
    from sparsefw.estimate import memory
    from sparsefw.model.shapes import shape_of
    from sparsefw.model.streamed import StreamedModel
    from sparsefw.report import content as report
    from sparsefw.report.html import page

    folder = DEFAULT_MODEL if arguments.model == DEFAULT else checkpoint.locate(arguments.model)
    writer.check_output(arguments.output, folder, arguments.overwrite)
    source = checkpoint.inspect(folder)
    tokenizer = load_tokenizer(folder)
    model = StreamedModel(source, device)
    seqlen = min(arguments.seqlen, model.max_seqlen or arguments.seqlen)
    if seqlen < arguments.seqlen:
        print(f"seqlen: {seqlen} tokens, the model's maximum (asked for {arguments.seqlen})")
    calibration = data.calibration_windows(
        tokenizer, arguments.dataset, nsamples=arguments.nsamples, seqlen=seqlen, seed=arguments.seed
    )
    evaluation = [
        data.evaluation_windows(tokenizer, text, seqlen=seqlen, limit=arguments.eval_windows)
        for text in dict.fromkeys(arguments.eval)
    ]
    process.give_back()
    for note in model.notes:
        print(f"note: {note}")
    methods = [*arguments.compare, arguments.method]
    print(f"model: {arguments.model}, {len(model.blocks)} blocks, {source.dtype}")
    print(f"calibration: {calibration.n} windows of {calibration.seqlen} tokens of {calibration.source}")
    held_out = tuple(windows.n for windows in evaluation)
    threads = torch.get_num_threads() if arguments.kernel == "torch" else 1
    work = memory.Work(calibration.n, held_out, seqlen, tuple(methods), settings, cuda, threads, process.resident())
    shape, budgets = shape_of(source), _budgets(arguments, process.free_memory(device))
    place = partial(memory.place, shape, work, budgets, arguments.output.resolve().parent)
    placement, _ = place()
    identity = _identity(arguments, fingerprint(source), calibration, evaluation, report.machine(device))
    shards = len(model.blocks) + 1
    chosen = {"batch": placement.batch, "solver": placement.solver}
    replaces = {"overwrite": arguments.overwrite, "restart": arguments.restart}
    with writer.Writer(arguments.output, shards, identity, chosen, **replaces) as output:
        if output.finished:
            print(f"going on with an unfinished run: {len(output.finished)} of {shards} parts are there")
        placement, needed = place(fixed=output.chosen)
        # Of a finished block the compared methods' weights are there, too.
        output.check_space(sum(memory.disk_space(shape, work, placement).values()) - len(methods) * output.written)
        settings = replace(settings, memory=placement.solver)
        print(report.placement_line(placement, needed, budgets))
        print(report.layer_header(), flush=True)
        with tqdm(total=len(model.blocks), unit="block", disable=None) as bar:
            outcome = prune_model(
                model,
                calibration,
                evaluation,
                methods,
                settings,
                ops,
                output,
                placement=placement,
                on_layer=lambda row: bar.write(report.layer_row(row)),
                on_block=lambda: bar.update(),
            )
        said = {name: str(v) if isinstance(v, Path) else v for name, v in vars(arguments).items()}
        said = {name: v for name, v in said.items() if name != "kernel_chosen"} | {"seqlen": seqlen}
        content = report.report(said, device, calibration, arguments.seed, evaluation, outcome)
        content["memory"] = report.memory(placement, needed, budgets)
        for name, text in (("report.json", json.dumps(content, indent=2) + "\n"), ("report.html", page(content))):
            durably(output.folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        output.finish(folder)
    if outcome.dense:
        print(f"kept dense: {', '.join(outcome.dense)}")
    print()
    print(report.summary(outcome, methods, evaluation))
    print(f"checkpoint: {arguments.output}")
    print(f"report: {arguments.output / 'report.html'}, {arguments.output / 'report.json'}")


def _budgets(arguments: argparse.Namespace, free: dict[str, int]) -> dict[str, int]:
    """Bytes that the run may take."""
    given = {"gpu": arguments.gpu_memory, "host": arguments.host_memory}
    if given["gpu"] is not None and "gpu" not in free:
        raise InputError("--gpu-memory: no CUDA device")
    return {what: int(n * (1 - MARGIN) if given[what] is None else given[what] * 2**30) for what, n in free.items()}


def _identity(
    arguments: argparse.Namespace, model: str, calibration: Windows, evaluation: list[Windows], machine: dict
) -> dict[str, Any]:
    """What has to be the same for a run to go on with what another has finished."""
    flags = {name: value for name, value in vars(arguments).items() if name not in WITHOUT_EFFECT | BY_CONTENT}
    said = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
    texts = {f"the text of --eval {windows.source}": windows.hash for windows in evaluation}
    return said | {"the model": model, "the calibration text": calibration.hash} | texts | machine


def _why(arguments: argparse.Namespace, cuda: bool) -> str:
    if arguments.kernel == "triton" and not cuda:
        return "as asked; no CUDA device, so Triton's interpreter: exact and slow"
    if arguments.kernel_chosen:
        return "as asked"
    return "CUDA is available" if cuda else "no CUDA device"


if __name__ == "__main__":
    sys.exit(main())
