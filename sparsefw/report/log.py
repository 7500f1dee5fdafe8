"""Make the lines that a run prints: sparsity and memory, a fixed-width row for each layer, and the table at the end.

The type of a layer is its name inside its block, with `*` for the number of an expert. So all blocks and all experts
have the same types.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, groupby
from statistics import fmean

from tqdm import tqdm

from sparsefw.caller import bar_of_blocks
from sparsefw.errors import counted
from sparsefw.estimate.memory import MemoryNeeds
from sparsefw.estimate.placement import placement_words
from sparsefw.estimate.shapes import ModelShape
from sparsefw.memory import Limits, peak_memory
from sparsefw.model.activations import Placement
from sparsefw.report.content import (
    DENSE,
    RECOVERED,
    SPARSE,
    BlockRecord,
    RankRecord,
    Reconstruction,
    Report,
    amount,
)
from sparsefw.solver import patterns
from sparsefw.solver.config import METHODS, Method, PruneConfig
from sparsefw.solver.layer import LayerResult

# Number of an expert: the index of a slice of a stacked parameter, or of a module in a list.
_EXPERT = re.compile(r"(?<![^.\[])\d+(?![^.\]])")

# Name with unit, layout in the log ("" for columns that only the page has), and text of each column.
_COLUMNS: tuple[tuple[str, str, Callable[[LayerResult], str]], ...] = (
    ("layer", "<40", lambda layer: layer.name),
    ("shape", ">12", lambda layer: "x".join(map(str, layer.shape))),
    ("method", ">9", lambda layer: layer.method),
    ("steps", ">5", lambda layer: str(layer.steps)),
    ("error", "", lambda layer: f"{layer.error:.4e}"),
    ("mask %", ">7", lambda layer: percent(layer.relative_mask)),
    ("error %", ">7", lambda layer: percent(layer.relative_error)),
    ("duality gap", "", lambda layer: "-" if layer.gap is None else f"{layer.gap:.4e}"),
    ("s", ">6", lambda layer: f"{layer.seconds:.1f}"),
)
LAYER_COLUMNS = tuple(name for name, *_ in _COLUMNS)


@dataclass(frozen=True)
class Progress:
    """Progress of a run after a block.

    Attributes:
        done: number of finished blocks, this one included.
        total: number of all blocks.
        block: name, seconds and memory of the block.
        layers: a result for each layer of the block and each method.
    """

    done: int
    total: int
    block: BlockRecord
    layers: list[LayerResult] = field(repr=False)


# Whether to show a progress bar; None: only in a terminal. A function is called with the progress in place of a bar.
Shown = bool | Callable[[Progress], None] | None

# Called with the record of each finished block and the results of its layers.
OnBlock = Callable[[BlockRecord, list[LayerResult]], None]


@contextmanager
def progress_of(blocks: int, progress: Shown) -> Iterator[OnBlock]:
    """Show progress during the `with` block; yields a function to call with each finished block.

    Args:
        blocks: number of blocks.
        progress: a function that is called with the progress, or whether a bar is shown, see `bar_of_blocks`.
    """
    if callable(progress):
        done = count(1)
        yield lambda block, layers: progress(Progress(next(done), blocks, block, layers))
        return
    with bar_of_blocks(blocks, progress) as bar:

        def update(block: BlockRecord, layers: list[LayerResult]) -> None:
            errors = [layer.relative_error for layer in layers if layer.method == layers[-1].method]
            bar.set_postfix_str(f"relative error {fmean(errors):.3f}" if errors else "", refresh=False)
            bar.update()

        yield update


def percent(share: float) -> str:
    """Write a relative error in %; "-" if the warm start has none, since the source is sparse already."""
    return f"{100 * share:.2f}" if math.isfinite(share) else "-"


def zeros_line(share: float) -> str:
    """Tell that a source is not dense."""
    return f"the source is sparse already: {100 * share:.0f} % zeros in the layers to prune of its first block"


def layer_cells(layer: LayerResult) -> list[str]:
    """Write a layer's result as a text for each of LAYER_COLUMNS."""
    return [text(layer) for *_, text in _COLUMNS]


def layer_header() -> str:
    """Write the column names above the rows of `layer_row`. The last column is the peak of memory so far."""
    return _row(LAYER_COLUMNS, "GiB")


def layer_row(layer: LayerResult, block: str) -> str:
    """Write a layer's result as a row of at most 100 characters, with the peak of memory of the GPU or else the host.

    Args:
        layer: the result.
        block: name of the layer's block. If the layer's name is too long, all but the last two parts of this are
            dropped from its beginning: layers.0 stays.
    """
    peak = peak_memory()
    name = layer.name.removesuffix(".weight").removeprefix("model.")
    if len(name) > 40:
        name = layer.name.removesuffix(".weight")[len(".".join(block.split(".")[:-2])) :].removeprefix(".")
    # Beginning and end say most about a layer.
    name = name if len(name) <= 40 else f"{name[:12]}..{name[-26:]}"
    return _row([name, *layer_cells(layer)[1:]], f"{(peak['gpu_bytes'] or peak['host_bytes']) / 2**30:.2f}")


def _row(cells: Sequence[str], peak: str) -> str:
    shown = (f"{cell:{layout}}" for cell, (_, layout, _) in zip(cells, _COLUMNS, strict=True) if layout)
    return " ".join([*shown, f"{peak:>6}"])


def block_row(blocks: Sequence[str], i: int, left: float = 0.0, found: Reconstruction | None = None) -> str:
    """Write the line at the end of a block.

    Args:
        blocks: names of all blocks.
        i: number of the block, from 0.
        left: seconds that the later blocks are expected to take; 0: there is no later block, or it is unknown.
        found: the block's reconstruction; None: it had none.
    """
    time = f", {tqdm.format_interval(left)} left" if left else ""
    line = f"block {i + 1}/{len(blocks)}{time}: {blocks[i]}"
    if not found:
        return line
    notes = "; put back" if found.put_back else ""
    notes += f"; another run may give other bits: {found.varies}" if found.varies else ""
    steps = counted(found.steps, "step")
    return f"{line}: reconstructed in {steps}, loss {found.before:.5f} -> {found.after:.5f}{notes}"


def result_columns(report: Report) -> list[str]:
    """Return the names of the columns of `result_rows`."""
    several = len(report.evaluation) > 1
    texts = [f"perplexity {n}" if several else "perplexity" for n, _ in enumerate(report.evaluation, 1)]
    return [*texts, "mask only, %", "error, %", "done"]


def result_notes(report: Report) -> Iterator[str]:
    """Explain the columns of `result_rows`, a line for each."""
    for name, text in zip(result_columns(report), report.evaluation, strict=False):
        yield f"{name}: {amount(text.source, text.windows, text.seqlen)} of {text.source}"
    if report.zeros > SPARSE:
        yield zeros_line(report.zeros)
    yield "error: relative to that of the warm start's mask, mean of layers; mask only: before weight updates"
    if line := reconstruction_line(report):
        yield line
    yield from recovery_lines(report)


def result_rows(report: Report) -> Iterator[tuple[str, list[str]]]:
    """Yield the dense model, every method and the recovered model, with the cells of `result_columns`.

    The errors in %, means over layers, are those of the mask and those of the weights after a solve.
    """
    recovered = [RECOVERED] if report.all_recoveries else []
    for name in ([DENSE] if report.evaluation else []) + report.methods + recovered:
        layers = report.layers_of(name)
        errors = ([layer.relative_mask for layer in layers], [layer.relative_error for layer in layers])
        # Neither the dense nor the recovered model has errors.
        cells = [percent(fmean(of_layers)) if of_layers else "" for of_layers in errors]
        shown = "source" if name == DENSE and report.zeros > SPARSE else name
        yield shown, [*(f"{text.perplexity[name]:.3f}" for text in report.evaluation), *cells, _done(report, name)]


def _done(report: Report, name: str) -> str:
    """List what was done to the weights of a row of `result_rows`."""
    if name == DENSE:
        return ""
    own = name in (report.method, RECOVERED)
    method = METHODS.get(report.method if own else name, Method())
    done = {
        "mask": True,
        "weight updates": method.changes_weights,
        "refit": method.refits and report.argument("refit", int),
        "reconstruction": own and any(block.reconstruction for block in report.blocks),
        "recovery": name == RECOVERED,
    }
    return ", ".join(step for step, was_done in done.items() if was_done)


def summary(report: Report) -> Iterator[str]:
    """Write the table at the end of a run, with notes on its columns, peaks of memory, and seconds."""
    for name, cells in [("", result_columns(report)), *result_rows(report)]:
        *numbers, done = cells
        yield f"{name:14}{''.join(f'{cell:>14}' for cell in numbers)}  {done}".rstrip()
    yield ""
    yield from result_notes(report)
    yield f"peak memory: {_peaks(report)}"
    yield f"seconds: {_seconds(report.seconds)}"
    yield from (f"rank {n}: {rank_line(rank)}" for n, rank in enumerate(report.ranks))


def reconstruction_line(report: Report) -> str:
    """Write the gain of the reconstruction on held-out windows; empty if no block was reconstructed."""
    found = [block.reconstruction for block in report.blocks if block.reconstruction]
    if not found:
        return ""
    ratios = [1.0 if one.put_back or not one.before else one.after / one.before for one in found]
    back = sum(one.put_back for one in found)
    return (
        f"reconstruction: {counted(len(found), 'block')}, loss on held-out windows x {fmean(ratios):.3f} in the mean; "
        f"{back} put back. Errors of layers are those before it"
    )


def recovery_lines(report: Report) -> Iterator[str]:
    """Write the gain of each recovery."""
    for one in report.all_recoveries:
        yield (
            f"recovered on {amount(one.data.source, one.data.windows, one.data.seqlen)} of {one.data.source}: "
            f"divergence of predictions on held-out windows {one.before:.4g} to {one.after:.4g}"
        )
    if report.all_recoveries and not reconstruction_line(report):
        yield "errors of layers are those before it was recovered"


def rank_line(rank: RankRecord) -> str:
    """Write the windows, the waits, the memory and the seconds of a rank."""
    return (
        f"{counted(rank.windows, 'window')}; {rank.waited:.1f} s waited for others; "
        f"{rank.peak_memory['host_bytes'] / 2**30:.2f} GiB (host); seconds: {_seconds(rank.seconds)}; "
        f"{rank.device} of {rank.machine}"
    )


def _seconds(by_phase: dict[str, float]) -> str:
    return ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in by_phase.items())


def _peaks(report: Report) -> str:
    """Write the measured peaks and their limits. On a GPU the limit is compared with the memory torch has reserved."""
    peak, limits = ({name: n / 2**30 for name, n in of.items()} for of in (report.peak_memory, report.memory.limits))
    text = f"{peak['host_bytes']:.2f} of {limits['host']:.2f} GiB (host)"
    if "gpu" in limits:
        text += f", {peak['gpu_reserved_bytes']:.2f} of {limits['gpu']:.2f} GiB (gpu; {peak['gpu_bytes']:.2f} in use)"
    return text


def kept_dense_line(report: Report) -> str:
    """Write which matrices of blocks stayed dense, by type; empty if all were pruned."""
    kinds = [
        f"{count} x {kind} (block{'' if blocks.isdecimal() else 's'} {blocks})"
        for kind, count, blocks in kept_dense(report)
    ]
    return f"kept dense: {', '.join(kinds)}" if kinds else ""


def kept_line(report: Report) -> str:
    """Write the number of kept weights, of layers, and of matrices that stayed dense."""
    layers = report.layers_of(report.method)
    kept, size = sum(layer.kept for layer in layers), sum(math.prod(layer.shape) for layer in layers)
    dense = f"; {len(report.kept_dense):,} matrices kept dense" if report.kept_dense else ""
    return (
        f"{kept:,} of {size:,} weights kept ({kept / size:.1%}), in {len(layers):,} layers of {len(report.blocks)} "
        f"blocks{dense}"
    )


def placement_line(placement: Placement, needs: MemoryNeeds, limits: Limits, of_batches: bool) -> str:
    """Write the memory that a run is expected to take.

    Args:
        placement: sizes of micro-batches and solves, and the place of activations.
        needs: bytes expected at the peak, by place.
        limits: memory limits in bytes, by place.
        of_batches: whether a caller's batches run through the model in place of windows.
    """
    peaks = [f"{getattr(needs, what) / 2**30:.2f} of {n / 2**30:.2f} GiB ({what})" for what, n in limits.items()]
    words = placement_words(placement, "gpu" in limits, "batch" if of_batches else "window")
    return f"memory: {', '.join(peaks)} expected at the peak; {words}"


def sparsity_line(config: PruneConfig, shape: ModelShape, whole: ModelShape) -> str:
    """Write the share of the weights that is removed, which may differ a little from --sparsity.

    A row, a group or a matrix loses a whole number of weights. A compared method is named if it removes another share.

    Args:
        config: pattern, methods and selection of layers.
        shape: shape of the model with the layers that are pruned.
        whole: shape of the model with all prunable layers.
    """
    weights, prunable = _weights(shape), _weights(whole).total()
    total, removed = weights.total(), {}
    for method in config.methods:
        kept = 0
        for (rows, d), n in weights.items():
            size, kept_of_size = patterns.budget(config.pattern, rows, d, METHODS[method].rows_independent)
            kept += n // size * kept_of_size
        removed[method] = f"{1 - kept / total:.2%}"
    own = removed[config.method]
    line = f"sparsity: {own} of {total:,} weights"
    line += "".join(f"; {method}: {share}" for method, share in removed.items() if share != own)
    if config.include or config.ignore:
        line += f"; selected: {total:,} of {prunable:,} prunable weights ({total / prunable:.2%})"
    return line


def _weights(shape: ModelShape) -> Counter[tuple[int, int]]:
    """Count the weights of a model's layers by the shape (rows, d) of their matrices."""
    counts = Counter[tuple[int, int]]()
    for block in shape.blocks:
        for layer in block.layers:
            counts[layer.rows, layer.d] += layer.rows * layer.d * layer.count
    return counts


def positions_of(report: Report) -> dict[str, int]:
    """Return the position of every block by its name."""
    return {block.name: i for i, block in enumerate(report.blocks)}


def locate(name: str, positions: dict[str, int]) -> tuple[int, str]:
    """Find the position of a tensor's block, and the tensor's type.

    Args:
        name: name of the tensor.
        positions: positions of the blocks, see `positions_of`.

    Raises:
        ValueError: the tensor is in no block.
    """
    for dot in re.finditer(r"\.", name):
        if (prefix := name[: dot.start()]) in positions:
            return positions[prefix], _EXPERT.sub("*", name[dot.end() :].removesuffix(".weight"))
    raise ValueError(f"{name}: belongs to no block")


def kept_dense(report: Report) -> list[tuple[str, str, str]]:
    """List the types of matrices that stayed dense: type, number, and blocks.

    A matrix in a block that text does not run through has a type of its own, its full name.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    positions, idle = positions_of(report), Counter[str]()
    for name in report.kept_dense:
        try:
            position, kind = locate(name, positions)
        except ValueError:
            idle[_EXPERT.sub("*", name.removesuffix(".weight"))] += 1
            continue
        numbers[kind].append(report.blocks[position].block)
    rows = [(kind, f"{len(blocks):,}", _ranges(blocks)) for kind, blocks in numbers.items()]
    return rows + [(kind, f"{count:,}", "text does not run through them") for kind, count in idle.items()]


def _ranges(numbers: list[int]) -> str:
    """Write whole numbers in ascending order, with runs of three or more abridged: "0 to 3, 7, 8"."""
    # In a run, numbers rise by the same steps as their positions.
    by_run = groupby(enumerate(sorted(set(numbers))), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in run] for _, run in by_run]
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
