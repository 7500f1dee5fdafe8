"""report.html: the content of report.json on one page that loads nothing.

Numbers become text, paths and positions here, and page.html lays them out. Names in a checkpoint are not trusted. So
every text is escaped, characters that do not print are spelled out, and nothing is a link. The page's policy lets a
browser run only the one script of the template.
"""

import base64
import hashlib
import math
import shlex
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from sparsefw.errors import printable
from sparsefw.flags import flag_of
from sparsefw.report import charts, log
from sparsefw.report.charts import LayerAt
from sparsefw.report.content import HIDDEN, BlockRecord, Report, TextWindows, amount
from sparsefw.report.kinds import kept_dense, locate, positions_of
from sparsefw.solver.config import PruneConfig

TEMPLATE = Path(__file__).with_name("page.html")

# A longer table of layers is left to report.json: a browser would crawl.
MOST_ROWS = 2000

# Of the table of blocks.
MEMORY_COLUMNS = ("host GiB", "GPU GiB", "GPU reserved GiB")


def page(report: Report) -> str:
    """The page of a run.

    Args:
        report: report of the run.

    Returns:
        An HTML document.

    Raises:
        ValueError: a layer lies in none of the blocks.
    """
    blocks, methods, positions = report.blocks, report.methods, positions_of(report)
    located = [LayerAt(*locate(layer.name, positions), layer) for layer in report.layers]
    # A method that is its own warm start has relative errors of 1.
    flat = [m for m in methods if all(r.relative_mask == r.relative_error == 1 for r in report.layers_of(m))]
    curved = [m for m in methods if m not in flat]
    errors = charts.errors(located, curved, [block.block for block in blocks]) if curved else {}
    names = [phase for block in blocks for phase in block.seconds] + [span.phase for span in report.timeline]
    phases = charts.ordered(charts.PHASES, names)
    return _template().render(
        model=report.argument("model", str),
        sparsity=report.argument("sparsity", str),
        method=report.method,
        compare=report.compared,
        summary=_summary(report),
        texts=[text.source for text in report.evaluation],
        results=[*log.result_rows(report)],
        facts=_facts(report),
        kept_dense=kept_dense(report),
        command=_command(report),
        flat=flat,
        curved=curved,
        # Classes of the style sheet.
        method_colours={m: f"m{i}" for i, m in enumerate(reversed(methods))},
        phase_colours={phase: f"p{[*charts.PHASES, phase].index(phase)}" for phase in phases},
        errors=errors,
        bands=any(mark["class"] == "band" for chart in errors.values() for mark in chart["marks"]),
        columns=log.COLUMNS,
        layers=[log.layer_cells(layer) for layer in report.layers] if len(report.layers) <= MOST_ROWS else None,
        count=len(report.layers),
        time=charts.time(blocks, phases),
        memory=charts.memory(blocks, report.memory.limits),
        block_columns=["block", "name", *phases, *MEMORY_COLUMNS, "loss before", "loss after", "calibration"],
        block_rows=[_block_cells(block, phases) for block in blocks],
        timeline=charts.timeline(report.timeline, blocks, phases),
    )


@cache
def _template() -> Template:
    """The template, compiled once a process. A text has every character that does not print spelled out."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sha256"] = _sha256
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _sha256(text: str) -> str:
    """The source expression of an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _summary(report: Report) -> str:
    layers = report.layers_of(report.method)
    kept, size = sum(layer.kept for layer in layers), sum(math.prod(layer.shape) for layer in layers)
    dense = f"; {len(report.kept_dense):,} matrices kept dense" if report.kept_dense else ""
    return (
        f"{kept:,} of {size:,} weights kept ({kept / size:.1%}), in {len(layers):,} layers of {len(report.blocks)} "
        f"blocks{dense}"
    )


def _stated(value: object) -> str:
    """A value of a flag or of the placement, in words."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _facts(report: Report) -> dict[str, list[tuple[str, str]]]:
    """Lists of facts, (name, value), by heading."""
    texts: list[TextWindows] = [report.data, *report.evaluation]
    memory = asdict(report.memory)
    sizes = {f"{what} limit": size for what, size in memory.pop("limits").items()}
    sizes |= {f"{what} expected": size for what, size in memory.pop("expected").items()}
    sizes |= {f"peak {name.removesuffix('_bytes').replace('_', ' ')}": n for name, n in report.peak_memory.items()}
    sizes["solver"] = memory.pop("solver_bytes")
    facts = {
        "machine": [("device", report.device), *report.versions.items()],
        "texts": [
            (
                "evaluation" if n else "calibration",
                f"{amount(t.source, t.windows, t.seqlen)} of {t.source}, sha256 {t.hash}",
            )
            for n, t in enumerate(texts)
        ],
        "memory": [(name, f"{_gib(size)} GiB") for name, size in sizes.items()]
        + [(name.replace("_", " "), _stated(value)) for name, value in memory.items()],
        "ranks": [(f"rank {n}", log.rank_line(rank)) for n, rank in enumerate(report.ranks)],
        "seconds": [(phase, f"{seconds:.1f}") for phase, seconds in report.seconds.items()],
        "arguments": [(name.replace("_", "-"), _stated(value)) for name, value in report.arguments.items()],
        "source": [("note", note) for note in report.notes],
    }
    return {heading: found for heading, found in facts.items() if found}


def _command(report: Report) -> list[str]:
    """The command line of the run, flag by flag, with all defaults spelled out."""
    # The command line refuses flags that no method of the run uses.
    unused = {f.name for f in fields(PruneConfig) if f.metadata.get("frank_wolfe") and "sparsefw" not in report.methods}
    parts = ["python -m sparsefw.run"]
    for name, value in report.arguments.items():
        if name in unused or value is None or value is False:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            parts.append(flag_of(name) if item is True else f"{flag_of(name)} {shlex.quote(str(item))}")
    return parts


def _block_cells(block: BlockRecord, phases: list[str]) -> list[str]:
    """A block's seconds, peaks, and losses before and after its reconstruction."""
    seconds = [f"{block.seconds[phase]:.2f}" if phase in block.seconds else "-" for phase in phases]
    peaks = [_gib(count) for count in (block.host_bytes, block.gpu_bytes, block.gpu_reserved_bytes)]
    losses, found = ["-", "-"], block.reconstruction
    if found:
        notes = ([] if found.loss == HIDDEN else [found.loss]) + ["put back"] * found.put_back
        losses = [f"{found.before:.5f}", f"{found.after:.5f}" + (f" ({', '.join(notes)})" if notes else "")]
    return [str(block.block), block.name, *seconds, *peaks, *losses, block.way]
