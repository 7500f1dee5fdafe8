"""Measure operations on this machine: `python -m bench [OPERATION ...]`, from the root of the repository.

    python -m bench --list
    python -m bench row_step gram --shape 8192x8192 --providers ours,library
    python -m bench --model Meta-Llama-3-70B --json results.json
    python -m bench report results.json

First the roofs are measured: how fast the machine copies, and how fast its library multiplies. Then each operation gets
a table for every setting and shape, with a line for each provider whose result is right:

    ours       the Triton kernel on a GPU, the function of kernels/cpu on a CPU
    torch      the formula in plain torch
    compile    the same by torch.compile
    library    one or two calls of torch's library, if there are such
    base       ours, at another commit (--base)

Columns: the median of the milliseconds, and what 20 and 80 % of the calls stay below; GB/s and GFLOP/s of the least
bytes and flops; the share of the roof, with "of 40%" the share that was expected; the speedup over the fastest other
provider, for base over ours; the largest error, relative to the largest value in float64.
"""

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

# The modules of bench/. The package is that of the working folder, or of another commit for a worker.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import machine
import report
import torch
from base import Worker, start
from host import REPO
from measure import PROVIDERS, TINY, Case, functions, measure, size_of
from timing import GPU, Stopwatch

from sparsefw.kernels.operation import OPERATIONS, Operation, Size

# Projections of Llama-3.1-8B and of Llama-3-70B.
LLAMA = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
LLAMA += [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)]
SHAPES, TOKENS, DTYPE = (LLAMA, 8192, "bf16") if GPU else ([(1024, 4096)], 2048, "fp32")
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def positive(text: str) -> int:
    """Read a number of at least 1.

    Raises:
        ValueError: it is none.
    """
    if int(text) < 1:
        raise ValueError
    return int(text)


def shape(text: str) -> tuple[int, int]:
    """Read ROWSxCOLUMNS.

    Raises:
        ValueError: it is no shape.
    """
    rows, d = map(positive, text.split("x"))
    return rows, d


def parser() -> argparse.ArgumentParser:
    """Describe the flags."""
    made = argparse.ArgumentParser(
        "python -m bench",
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("operations", nargs="*", metavar="OPERATION", help="names, prefixes, or files of kernels/ (default: all)")
    add("--list", action="store_true", help="list the operations and their settings")
    add("--shape", type=shape, action="append", metavar="ROWSxCOLUMNS", help="shape of the weight; may be repeated")
    add("--model", help="shapes of all projections of a model: a file of bench/configs, or a path to a config.json")
    add("--tokens", type=positive, default=TOKENS, help="inputs of a Gram or cross matrix (default: %(default)s)")
    add("--dtype", choices=DTYPES, default=DTYPE, help="dtype of weights and inputs (default: %(default)s)")
    add("--setting", action="append", help="label of a setting; may be repeated (default: all with a roof here)")
    add("--providers", type=lambda text: text.split(","), default=",".join(PROVIDERS), help="(default: %(default)s)")
    add("--threads", type=positive, default=1, help="threads of a CPU (default: %(default)s)")
    add("--seconds", type=float, default=5.0, help="limit of the timing of a table (default: %(default)s)")
    add("--base", metavar="COMMIT", help="time our kernels at this commit, too, in turns with the others")
    add("--json", type=report.output, metavar="FILE", help="write the results there")
    add("--plot", type=report.plotter, metavar="FILE", help="plot the results to this file, by matplotlib")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def named(words: Sequence[str]) -> list[Operation]:
    """Find operations by name, file, or unique prefix.

    Raises:
        ValueError: no or several operations have a prefix.
    """
    found = {}
    for word in words:
        of_file = [name for name, x in OPERATIONS.items() if x.run.__module__.endswith(f".{word}")]
        names = [word] if word in OPERATIONS else of_file or [name for name in OPERATIONS if name.startswith(word)]
        if len(names) != 1 and not of_file:
            raise ValueError(f"{word!r} is not one operation; there are {', '.join(names or OPERATIONS)}")
        found |= {name: OPERATIONS[name] for name in names}
    return [*(found or OPERATIONS).values()]


def shapes_of(model: str) -> list[tuple[int, int]]:
    """List the distinct shapes of a model's projections.

    Raises:
        ValueError: there is no such config.
    """
    configs = {path.stem: path for path in (REPO / "bench/configs").glob("*.json")}
    path = configs.get(model, Path(model))
    if not path.is_file():
        names = ", ".join(sorted(configs))
        raise ValueError(f"--model: no file {model!r}, and none of {names}")
    from sparsefw.estimate.plan import describe

    # A CPU would convert the whole model to fp32 for it.
    kinds = describe(str(path), torch.device("cuda")).shape.kinds
    return [*dict.fromkeys((layer.rows, layer.d) for kind in kinds for layer in kind.layers)]


def cases(
    operations: Sequence[Operation], settings: Sequence[str] | None, sizes: Sequence[Size], roofs: dict[str, float]
) -> list[tuple[Operation, str, Size]]:
    """List what is measured. Operations that ignore the rows, say, are measured once for all of them.

    Without `settings` those are left out, and named, that ask for a precision without a roof on this machine.
    """
    found, left_out = {}, {}
    for operation, size in product(operations, sizes):
        for label, setting in operation.settings.items():
            arguments = operation.example(replace(size, device="meta"), **setting)
            if not settings and "precision" in setting and operation.cost_of(arguments).unit not in roofs:
                left_out[f"{operation.name} {label}"] = None
            elif not settings or label in settings:
                found.setdefault((operation.name, label, repr(arguments)), (operation, label, size))
    if left_out:
        print(f"\nLeft out, since this machine has no roof of their precision: {', '.join(left_out)}")
    return [*found.values()]


def catalogue(operations: Iterable[Operation] = OPERATIONS.values()) -> str:
    """Write the Markdown table of operations, with the cost of their first setting for a weight of 8192 x 8192."""
    rows, size = [], Size(8192, 8192)
    for operation in operations:
        cost = operation.cost_of(operation.example(size, **next(iter(operation.settings.values()))))
        numbers = (cost.flops / 1e9, cost.bytes / 1e6, cost.flops / cost.bytes)
        name = f"[`{operation.name}`](../kernels/{operation.run.__module__.rpartition('.')[2]}.py)"
        settings = ", ".join(filter(None, operation.settings))
        rows.append([name, operation.does, settings, *(f"{float(f'{x:.3g}'):,g}" for x in numbers)])
    return report.markdown(["operation", "what it does", "settings", "Gflop", "MB", "flops / byte"], rows, texts=3)


def work() -> int:
    """Answer each line of the input by the time of a call, see `base.Worker`."""

    @lru_cache(maxsize=1)
    def timer(operation: str, setting: str, **size: Any) -> Callable[[], float]:
        case = Case(OPERATIONS[operation], setting, size_of(**size))
        run = functions(case.operation)["ours"]
        # It also compiles, and leaves the process's memory as a check leaves that of the others.
        if wrong := case.check(run)[1]:
            raise ValueError(wrong)
        return Stopwatch(run, case.fresh)

    for line in sys.stdin:
        try:
            answer = {"seconds": timer(**json.loads(line))()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    return 0


def run(
    operations: Sequence[Operation],
    shapes: Sequence[Sequence[int]],
    arguments: argparse.Namespace,
    worker: Worker | None,
) -> int:
    """Measure, print and write; returns 1 if a kernel of ours has failed or is wrong."""
    failed = False
    roofs = machine.roofs(min(2.0, arguments.seconds))
    saved = dict(machine=machine.describe(), command=arguments.command, roofs=roofs, rows=[])
    print(report.heading(saved))
    sizes = [size_of(rows, d, arguments.tokens, DTYPES[arguments.dtype]) for rows, d in shapes]
    for operation, setting, size in cases(operations, arguments.setting, sizes, roofs):
        try:
            case = Case(operation, setting, size)
            print(f"\n{report.title(case.label | vars(case.cost), roofs)}\n", flush=True)
            rows = measure(case, arguments.providers, roofs, arguments.seconds, worker)
        except torch.OutOfMemoryError as error:
            print(f"not measured: {str(error).splitlines()[0]}")
            continue
        # A rival that fails or is wrong gets no time, and is no fault of ours.
        failed |= any(row["wrong"] and row["provider"] == "ours" for row in rows)
        saved["rows"] += rows
        if arguments.json:
            # All results so far.
            arguments.json.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        if not GPU:
            # The interpreter shows what a kernel computes, and not its time.
            error, wrong = Case(operation, setting, TINY).check(operation.run)
            line = wrong or f"checked in the interpreter at {TINY.rows}x{TINY.d}, error {error:.0e}"
            rows = [*rows, dict(provider="triton", wrong=line)]
            failed |= wrong is not None
        print(report.table(rows, saved["machine"]), flush=True)
    print(f"\n{report.summary(saved['rows'])}")
    if arguments.plot:
        arguments.plot([saved])
    return int(failed)


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns 1 if a kernel of ours has failed or is wrong."""
    if argv[:1] == ["report"]:
        return report.main(argv[1:])
    flags = parser()
    arguments = flags.parse_args(argv)
    arguments.command = shlex.join(["python", "-m", "bench", *argv])
    torch.set_num_threads(arguments.threads)
    with ExitStack() as opened, torch.no_grad():
        try:
            operations = named(arguments.operations)
            labels = [label for operation in operations for label in operation.settings]
            for words, known in ((arguments.providers, PROVIDERS), (arguments.setting or [], labels)):
                if unknown := {*words} - {*known}:
                    there_are = ", ".join(filter(None, dict.fromkeys(known)))
                    raise ValueError(f"unknown {', '.join(sorted(unknown))}; there are {there_are}")
            shapes = arguments.shape or (shapes_of(arguments.model) if arguments.model else SHAPES)
            worker = opened.enter_context(start(arguments.base, arguments.threads)) if arguments.base else None
        except ValueError as error:
            flags.error(str(error))
        if arguments.list:
            print(catalogue(operations))
            return 0
        return work() if arguments.worker else run(operations, shapes, arguments, worker)


if __name__ == "__main__":
    # `| head` ends the command without a word.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\npython -m bench: interrupted")
