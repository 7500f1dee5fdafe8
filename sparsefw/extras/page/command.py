"""Write the commands, or the call from Python, that made an output, from the arguments in its report."""

import json
import shlex
from collections.abc import Mapping

from sparsefw.data.batches import BATCHES
from sparsefw.data.text import TEXTS, TOKENS
from sparsefw.errors import flag_of
from sparsefw.inputs import name_and_share
from sparsefw.report.content import Argument, Report

# The variables that stand for data without a name in a call from Python.
VARIABLES = {TEXTS: "texts", TOKENS: "tokens", BATCHES: "batches"}


def from_python(report: Report) -> bool:
    """Tell whether a run was a call from Python that no command can repeat, since its model or text has no name."""
    return report.in_memory or not VARIABLES.keys().isdisjoint(report.argument("dataset", tuple))


def commands_of(report: Report, name: str, packed: bool = False) -> list[str]:
    """Return the lines that make an output with this name; empty if the report does not store the arguments."""
    if report.given is None:
        return []
    # A report does not store the folders that its recoveries and packing read, so they get these names.
    names = ["pruned", *(f"recovered-{n}" for n in range(1, 1 + len(report.recoveries)))]
    names = [*names[: len(report.recoveries) + packed], name]
    launcher = f"torchrun --nproc-per-node {len(report.ranks)}" if report.ranks else "python"
    lines = [" ".join([launcher, "-m sparsefw.run", *flags_of({**report.given, "output": names[0]})])]
    if from_python(report):
        lines = ["from sparsefw import prune", "", _call(report, report.given, names[0])]
    later = []
    for n, one in enumerate(report.recoveries):
        tokens = one.tokens or one.data.windows * one.data.seqlen
        given: dict[str, Argument] = {"dataset": one.dataset, "recover": tokens, "seed": one.data.seed}
        if report.in_memory or one.model != report.argument("model", str):
            given = {"model": one.model, **given}
        if one.data.seqlen != report.argument("seqlen", int):
            given |= {"seqlen": one.data.seqlen}
        later.append(["python -m sparsefw.recover", *map(shlex.quote, names[n : n + 2]), *flags_of(given)])
    if packed:
        later.append(["python -m sparsefw.pack", *map(shlex.quote, names[-2:])])
    return [*lines, *(f"{'# ' if from_python(report) else ''}{' '.join(words)}" for words in later)]


def flags_of(arguments: Mapping[str, Argument]) -> list[str]:
    """Write arguments as flags for a shell, one string for each flag."""
    flags = []
    for name, value in arguments.items():
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and item is not False:
                flags.append(flag_of(name) if item is True else f"{flag_of(name)} {shlex.quote(str(item))}")
    return flags


def _call(report: Report, given: Mapping[str, Argument], name: str) -> str:
    """Write the call of `prune`; `name` is the output."""
    words = ["model" if report.in_memory else json.dumps(report.argument("model", str)), json.dumps(name)]
    passed_over = {"model"}
    if report.argument("dataset", tuple) == (BATCHES,):
        words.append("calibration=batches")
        passed_over |= {"dataset", "nsamples", "seqlen"}
    for key, value in given.items():
        if key in passed_over:
            continue
        values = value if isinstance(value, tuple) else (value,)
        texts = [VARIABLES.get(x) or json.dumps(x) if isinstance(x, str) else repr(x) for x in values]
        if key == "dataset" and len(texts) > 1:
            words.append(f"dataset={json.dumps(dict(map(name_and_share, map(str, values))))}")
        else:
            words.append(f"{key}={texts[0]}" if len(texts) == 1 else f"{key}=[{', '.join(texts)}]")
    return f"prune({', '.join(words)})"
