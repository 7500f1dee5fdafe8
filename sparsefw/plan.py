"""What a run would take: `python -m sparsefw.plan --model MODEL --gpu h100`, with the flags of `sparsefw.run`.

From the config alone: flops and bytes by phase, peaks of memory, disk, hours. Of a model on the Hub only config.json is
downloaded. Flops and bytes are those of matrix products and of the package's own kernels; what torch does between them
is not counted. So they, and the hours, are the least that it can be.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from sparsefw.errors import InputError, first_line
from sparsefw.estimate import rates, totals
from sparsefw.estimate.describe import Described, describe
from sparsefw.estimate.flops import calls
from sparsefw.estimate.memory import Work, disk_space, place
from sparsefw.estimate.rates import CARDS, Rates
from sparsefw.estimate.totals import Job
from sparsefw.process import free_memory
from sparsefw.run import DEFAULT, DEFAULT_MODEL, MARGIN, Parser, parse_arguments, settings_of

GIB = 2**30

# Where memory is not limited: more than any machine has.
UNLIMITED = 2**62

UNKNOWN = (
    "not known: no rates of this card were measured yet; give --tflops and --bandwidth, or run with --measure on it"
)


def _gigabytes(text: str) -> float:
    """Bytes a second."""
    try:
        value = float(text) * 1e9
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return value


def _arguments(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The plan's own flags, and those of the run that is planned."""
    parser = Parser(prog="python -m sparsefw.plan", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "All flags of python -m sparsefw.run, too; there --help lists them. --model may be a config file."
    add = parser.add_argument
    add("--gpu", choices=CARDS, metavar="CARD", help=f"on this card: {', '.join(CARDS)} (default: on this machine)")
    add("--tflops", action="append", default=[], metavar="N|UNIT=N", help="rate of matrix products, in 10^12 flops a "
        f"second: of all units, or of one of {', '.join(rates.UNITS)}; may be repeated")  # fmt: skip
    add("--bandwidth", type=_gigabytes, metavar="N", help="of the device's memory, in 10^9 bytes a second")
    add("--disk", type=_gigabytes, metavar="N", help="rate of reading and writing, in 10^9 bytes a second (default: it "
        "costs no time)")  # fmt: skip
    add("--measure", action="store_true", help="measure --tflops and --bandwidth on this machine, in seconds")
    add("--json", type=Path, metavar="FILE", help="write the same as JSON")
    own, others = parser.parse_known_args(argv)
    own.on_gpu = own.gpu is not None or torch.cuda.is_available()
    # The defaults on a GPU, which need not be here. What the user says comes later and wins.
    return own, parse_arguments([*(["--kernel", "triton", "--precision", "bf16"] if own.on_gpu else []), *others])


def plan(own: argparse.Namespace, arguments: argparse.Namespace) -> dict[str, Any]:
    """The content of --json; sizes in bytes, times in seconds, rates per second.

    Raises:
        InputError: no such model, too little memory for it, or rates that are not enough.
    """
    settings = settings_of(arguments)
    if arguments.eval and arguments.eval_windows is None:
        raise InputError(f"--eval {arguments.eval[0]}: texts are not read here; say how long it is with --eval-windows")
    described = describe(str(DEFAULT_MODEL) if arguments.model == DEFAULT else arguments.model)
    work = Work(
        windows=arguments.nsamples,
        held_out=(arguments.eval_windows,) * len(set(arguments.eval)),
        seqlen=min(arguments.seqlen, described.max_seqlen or arguments.seqlen),
        methods=(*arguments.compare, arguments.method),
        settings=settings,
        gpu=own.on_gpu,
        threads=torch.get_num_threads() if arguments.kernel == "torch" else 1,
    )
    budgets = _budgets(own, arguments)
    placement, needs = place(described.shape, work, budgets, arguments.output.resolve().parent)
    by_changes = not work.gpu and arguments.kernel == "torch"
    job = Job(described.shape, described.traits, work, placement, by_changes)
    speed = _rates(own, job)
    return {
        "model": {
            "name": arguments.model,
            "class": described.name,
            "dtype": str(described.dtype).removeprefix("torch."),
            "parameters": described.shape.parameters,
            "blocks": len(described.shape.blocks),
        },
        "work": {
            "windows": work.windows,
            "held_out": list(work.held_out),
            "seqlen": work.seqlen,
            "methods": list(work.methods),
            "sparsity": settings.pattern.text,
            "target": "dense" if work.followed else "layer",
            "precision": settings.precision,
        },
        "device": own.gpu or ("this machine's GPU" if own.on_gpu else "this machine's CPU"),
        "budgets": {name: None if size == UNLIMITED else size for name, size in budgets.items()},
        "products": {method: asdict(calls(method, settings, work.followed)) for method in work.methods},
        "phases": totals.phases(job),
        "memory": {phase: {"gpu": gpu, "host": host} for phase, (gpu, host) in needs.phases.items()},
        "placement": asdict(placement) | {"folder": str(placement.folder)},
        "disk": disk_space(job.shape, job.work, job.placement),
        "rates": asdict(speed) if speed else None,
        "seconds": totals.phase_seconds(job, speed) | {"all": totals.seconds(job, speed)} if speed else None,
        "notes": [*described.notes, *_notes(described, arguments, job)],
    }


def _budgets(own: argparse.Namespace, arguments: argparse.Namespace) -> dict[str, int]:
    """Bytes of GPU and host memory that the run may take: as said, else what a card has or is free here, as in run."""
    if own.gpu:
        budgets = {"gpu": int(CARDS[own.gpu] * 10**9 * (1 - MARGIN)), "host": UNLIMITED}
    else:
        free = free_memory(torch.device("cuda" if own.on_gpu else "cpu"))
        budgets = {name: int(size * (1 - MARGIN)) for name, size in free.items()}
    for name in ("gpu", "host"):
        said = getattr(arguments, f"{name}_memory")
        if said is not None:
            if name not in budgets:
                raise InputError(f"--{name}-memory: no CUDA device here; say which card is meant with --gpu")
            budgets[name] = int(said * GIB)
    return budgets


def _rates(own: argparse.Namespace, job: Job) -> Rates | None:
    if not own.measure:
        return rates.given(own.tflops, own.bandwidth, own.disk) or rates.known(own.gpu, own.disk)
    if own.tflops or own.bandwidth:
        raise InputError("--measure: finds what --tflops and --bandwidth say; give it or them")
    if own.on_gpu and not torch.cuda.is_available():
        raise InputError(f"--measure: the run is planned for {own.gpu}, and no GPU is here; run it on that machine")
    widest = max(layer.d for block in job.shape.blocks for layer in block.layers)
    device = torch.device("cuda" if own.on_gpu else "cpu")
    return rates.measured(sorted(totals.units(job)), widest, device, own.disk)


def _notes(described: Described, arguments: argparse.Namespace, job: Job) -> Iterator[str]:
    work = job.work
    if work.seqlen < arguments.seqlen:
        yield f"seqlen: {work.seqlen} tokens, the model's maximum (asked for {arguments.seqlen})"
    if "sparsefw" in work.methods:
        if job.by_changes:
            yield "products of steps come from what changed since on a CPU, which depends on the weights: not counted"
        if work.settings.swaps:
            yield f"swaps, of which a row makes {work.settings.swaps} at most, depend on the weights: not counted"


def lines(content: dict[str, Any]) -> Iterator[str]:
    """What is printed of a plan."""
    model, work, memory = content["model"], content["work"], content["memory"]
    yield (
        f"model: {model['name']}, {model['class']}, {model['parameters']:,} parameters, "
        f"{model['blocks']} blocks, {model['dtype']}"
    )
    held_out = f", {' + '.join(map(str, work['held_out']))} held out" if work["held_out"] else ""
    yield f"windows: {work['windows']} of {work['seqlen']} tokens{held_out}"
    yield (
        f"prune: {work['sparsity']} by {', '.join(work['methods'])}, target {work['target']}, "
        f"products in {work['precision']}"
    )
    for method, of in content["products"].items():
        of = {name: of[name] for name in ("steps", "refits", "target", "starts", "errors") if of[name]}
        yield f"products of a solve by {method}: {sum(of.values())} ({', '.join(f'{n} {v}' for n, v in of.items())})"
    yield ""
    yield from _work_table(content)
    yield ""
    yield f"{'peak memory, GiB':16} {'GPU':>10} {'host':>10}"
    for phase, peak in memory.items():
        yield f"{phase:16} {peak['gpu'] / GIB:10.2f} {peak['host'] / GIB:10.2f}"
    most = {name: max(peak[name] for peak in memory.values()) for name in ("gpu", "host")}
    yield f"{'all':16} {most['gpu'] / GIB:10.2f} {most['host'] / GIB:10.2f}"
    budgets = [content["budgets"].get(name, 0) for name in ("gpu", "host")]
    cells = ["any" if size is None else f"{size / GIB:.2f}" for size in budgets]
    yield f"{'there is':16} {cells[0]:>10} {cells[1]:>10}"
    yield ""
    yield f"device: {content['device']}"
    yield f"placement: {_placement(content['placement'])}"
    disk = content["disk"]
    yield (
        f"disk: {disk['output'] / 1e9:.2f} GB of output; until the end also {disk['kept'] / 1e9:.2f} GB of compared "
        f"methods, {disk['activations'] / 1e9:.2f} GB of activations"
    )
    for note in content["notes"]:
        yield f"note: {note}"
    yield f"hours: {_hours(content)}"


def _work_table(content: dict[str, Any]) -> Iterator[str]:
    seconds, cell = content["seconds"], "{:>10}".format
    yield " ".join([f"{'at least':16}", f"{'of a block':>21}", f"{'of the run':>21}"])
    heads = ["Tflop", "GB", "Tflop", "GB", "disk GB", *(["hours"] if seconds else [])]
    yield " ".join([f"{'':16}", *map(cell, heads)])
    for phase, row in content["phases"].items():
        numbers = [row[of][what] / unit for of in ("block", "run") for what, unit in (("flops", 1e12), ("bytes", 1e9))]
        cells = [f"{number:.4g}" if number else "-" for number in [*numbers, row["disk"]["bytes"] / 1e9]]
        cells += [f"{seconds[phase] / 3600:.3f}"] if seconds else []
        yield " ".join([f"{phase:16}", *map(cell, cells)])


def _placement(of: dict[str, Any]) -> str:
    where = {"gpu": "on the device", "host": "in host memory", "file": f"in a file in {of['folder']}"}[of["place"]]
    ahead = "the next block is read and the last one written meanwhile" if of["ahead"] else "blocks one after another"
    return (
        f"micro-batches of {of['batch']} windows, activations {where}, {ahead}, solves in {of['solver'] / GIB:.2f} GiB"
    )


def _hours(content: dict[str, Any]) -> str:
    if not content["rates"]:
        return UNKNOWN.format("card" if "gpu" in content["budgets"] else "machine")
    of = content["rates"]
    rate = ", ".join(f"{unit} {flops / 1e12:.4g} Tflop/s" for unit, flops in of["flops"].items())
    disk = f"disk {of['disk'] / 1e9:.4g} GB/s" if of["disk"] else "the disk at no time (--disk)"
    at = f"{rate}, memory {of['bandwidth'] / 1e9:.4g} GB/s {of['source']}, {disk}"
    return f"at least {content['seconds']['all'] / 3600:.3f}, at {at}"


def main(argv: list[str] | None = None) -> int:
    """Plan from the command line. Returns the exit status: 0, or 2 (bad input)."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        own, arguments = _arguments(argv)
        content = plan(own, arguments)
        if own.json:
            try:
                own.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise InputError(f"--json {own.json}: cannot be written: {first_line(error)}") from error
    except InputError as error:
        print(f"sparsefw: {error}", file=sys.stderr)
        return 2
    for line in lines(content):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
