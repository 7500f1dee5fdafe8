"""How much memory and disk a run takes at most, from the shapes alone: what `run` keeps to and `plan` tells.

Weights are there a block at a time; Gram and cross matrices a stage at a time; the state of a solve a chunk of rows at
a time; activations of a micro-batch at a time, of all windows where they are placed. On a machine without a GPU all of
it is on the host.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path

from sparsefw.errors import InputError
from sparsefw.model.activations import PLACES
from sparsefw.model.placement import BATCH_TOKENS, SOLVER, Placement
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.solver.layer import BYTES_PER_ENTRY, ROW_UNIT, cpu_rows
from sparsefw.solver.methods import METHODS, Settings

# Python with torch and transformers loaded and a text tokenized, as measured.
PROCESS = 570 * 2**20

# Of a solve per entry of a chunk, where no mask is chosen again for refitted weights; measured on a CPU.
BYTES_WITHOUT_ROUNDS = 56

# Of the code that oneDNN makes for products of one shape in bf16 or fp16, measured, and for how many it keeps it.
BYTES_PER_PRODUCT, PRODUCTS_KEPT = 560 * 2**10, 1024

# What the allocators keep between the tensors, as a share of what is there at the peak.
SLACK = 0.05

GIB = 2**30


@dataclass(frozen=True)
class Work:
    """What a run is to do.

    Attributes:
        windows: of calibration.
        held_out: windows of each held-out text.
        seqlen: tokens in a window.
        methods: compared ones, and the one that is written.
        settings: how masks and weights are chosen.
        gpu: whether there is a GPU.
        threads: of torch, on a CPU.
        process: bytes that the process has before it begins.
    """

    windows: int
    held_out: tuple[int, ...]
    seqlen: int
    methods: tuple[str, ...]
    settings: Settings
    gpu: bool
    threads: int
    process: int = PROCESS

    @property
    def followed(self) -> bool:
        """Whether the calibration windows also go through the dense model."""
        return self.settings.target == "dense" and "sparsefw" in self.methods


@dataclass(frozen=True)
class Needs:
    """Bytes at the peak, in all and by phase (GPU, host); without a GPU the first is 0."""

    phases: dict[str, tuple[int, int]]

    @property
    def gpu(self) -> int:
        """Bytes on the GPU."""
        return max(gpu for gpu, _ in self.phases.values())

    @property
    def host(self) -> int:
        """Bytes on the host."""
        return max(host for _, host in self.phases.values())


def stages(block: BlockShape) -> list[list[LayerShape]]:
    """The layers of a block by stage, in the order of use."""
    return [list(alike) for _, alike in groupby(block.layers, key=lambda layer: layer.gram)]


def activation_bytes(shape: ModelShape, work: Work) -> int:
    """Of all streams, between two blocks."""
    streams = work.windows * (len(work.methods) + work.followed)
    streams += sum(work.held_out) * (len(work.methods) + 1)
    return streams * work.seqlen * shape.hidden * shape.itemsize


def disk_space(shape: ModelShape, work: Work, placement: Placement) -> dict[str, int]:
    """Bytes on the disk: of the "output"; "kept" beside it until the end, blocks of compared methods; and of
    "activations"."""
    inside = sum(block.nbytes for block in shape.blocks)
    return {
        "output": inside + shape.outside,
        "kept": (len(work.methods) - 1) * inside,
        "activations": activation_bytes(shape, work) if placement.place == "file" else 0,
    }


def needs(shape: ModelShape, work: Work, placement: Placement) -> Needs:
    """The peaks of a run.

    Args:
        shape: of the model.
        work: to be done.
        placement: what is held at once, and where.
    """
    kept = activation_bytes(shape, work)
    tokens = min(placement.batch, max(work.windows, *work.held_out, 0)) * work.seqlen
    # Of what lies elsewhere one micro-batch is on its way in; two are, and two out, where the next one is launched
    # before the last one is looked at.
    near = min(kept, 5 * tokens * shape.hidden * shape.itemsize)
    held = {"gpu": (kept, 0), "host": (near, kept), "file": (near, near)}[placement.place]
    block = max(b.nbytes for b in shape.blocks)
    copies = 1 + (work.followed or len(work.methods) > 1)
    # On the host: the next block, the last one (still being written), and those of compared methods.
    beside = block * (min(placement.ahead + 1, len(shape.blocks) - 1) + len(work.methods) - 1)
    weights = block * copies
    logits = work.seqlen * shape.vocabulary * (shape.itemsize + 8)
    work_of_block = max(_forward(b, shape, tokens, work) for b in shape.blocks)
    # Read into host memory first.
    through = shape.outside if work.gpu else 0
    on_gpu = {
        "start": shape.outside + shape.blocks[0].nbytes + work_of_block,
        "calibrate": weights + max(_calibrate(b, shape, work, tokens) for b in shape.blocks),
        "solve": weights + max(_solve(b, work, placement) for b in shape.blocks),
        "write": weights,
        "end": shape.outside + (logits if work.held_out else 0),
    }
    on_host = {"start": through, "calibrate": beside, "solve": beside, "write": beside + through, "end": through}
    phases, process = {}, work.process + _made_by_products(shape, tokens, work)
    for phase, gpu in on_gpu.items():
        gpu, host = (1 + SLACK) * (gpu + held[0]), (1 + SLACK) * (on_host[phase] + held[1])
        phases[phase] = (int(gpu), int(host) + process) if work.gpu else (0, int(gpu + host) + process)
    return Needs(phases)


def _made_by_products(shape: ModelShape, tokens: int, work: Work) -> int:
    """Of what a CPU's library makes for products in half precision, by the number of tokens: experts are sent any."""
    if work.gpu or shape.itemsize != 2:
        return 0
    experts = {(layer.rows, layer.d) for block in shape.blocks for layer in block.layers if layer.experts}
    return BYTES_PER_PRODUCT * min(PRODUCTS_KEPT, len(experts) * min(tokens, PRODUCTS_KEPT // 2))


def _forward(block: BlockShape, shape: ModelShape, tokens: int, work: Work) -> int:
    """Of one micro-batch inside a block: the residual stream and what is made of it, three times the widest output."""
    widest = max(layer.rows for layer in block.layers)
    scores = shape.heads * work.seqlen * tokens * (4 + shape.itemsize)
    return tokens * shape.itemsize * (4 * shape.hidden + 3 * widest) + scores


def _grams(stage: list[LayerShape]) -> int:
    """Gram matrices of a stage: one, or one for each expert."""
    return 4 * stage[0].d ** 2 * max(1, stage[0].experts)


def _crosses(stage: list[LayerShape], work: Work) -> int:
    return sum(4 * layer.rows * layer.d for layer in stage if not layer.experts) if work.followed else 0


def _groups(block: BlockShape, work: Work) -> Iterator[list[list[LayerShape]]]:
    """The stages that are measured at once: one by one, or all of a block."""
    yield from ([stage] for stage in stages(block)) if work.followed else [stages(block)]


def _calibrate(block: BlockShape, shape: ModelShape, work: Work, tokens: int) -> int:
    peak = running = _forward(block, shape, tokens, work)
    if work.followed:
        # To find the stages all of them are watched at once.
        whole = sum(stage[0].d + sum(layer.rows for layer in stage) for stage in stages(block))
        peak += tokens * whole * shape.itemsize
    for group in _groups(block, work):
        state = sum(_grams(stage) + _crosses(stage, work) for stage in group)
        d, rows = max(s[0].d for s in group), max(layer.rows for s in group for layer in s)
        outputs = sum(layer.rows for stage in group for layer in stage if not layer.experts) if work.followed else 0
        inputs = sum(stage[0].d for stage in group)
        # Kept while the rest of the block runs; then, or with the dense model's too, operands are made of them: what an
        # output lacks, and on a CPU both operands in fp32.
        watched = (inputs + outputs) * shape.itemsize
        lacks = (outputs + rows) * shape.itemsize if work.followed else 0
        operands = 0 if work.gpu else 4 * (d + (rows if work.followed else 0))
        peak = max(peak, state + tokens * watched + max(running, tokens * (lacks + operands)))
    return peak


def _solve(block: BlockShape, work: Work, placement: Placement) -> int:
    peak = 0
    for group in _groups(block, work):
        waiting = sum(_grams(stage) + _crosses(stage, work) for stage in group)
        for stage in group:
            d, rows = stage[0].d, sum(layer.rows for layer in stage)
            rows = -(-rows // ROW_UNIT) * ROW_UNIT
            weight = 4 if not work.gpu else 2
            damped = 4 * d * d if any(METHODS[m].damps for m in work.methods) and work.settings.damp else 0
            operand = 2 * d * d if work.gpu and work.settings.precision == "bf16" else 0
            crosses = _crosses(stage, work)
            # Weight and cross matrix while targets are found; then weight and saliency.
            stacked = rows * d * (weight + 4) + (crosses if len(stage) > 1 else 0)
            if work.settings.target == "dense" and not work.settings.refit:
                stacked += 4 * rows * d
            peak = max(peak, waiting - crosses + damped + operand + stacked + _chunks(rows, d, work, placement))
    return peak


def _chunks(rows: int, d: int, work: Work, placement: Placement) -> int:
    """The state of the rows that are solved at once; the solver makes chunks as if every entry took the most."""
    rows = min(rows, max(ROW_UNIT, placement.solver // (BYTES_PER_ENTRY * d) // ROW_UNIT * ROW_UNIT))
    if not work.gpu:
        rows = min(rows, work.threads * cpu_rows(d))
    most = BYTES_PER_ENTRY if work.settings.refit and work.settings.rounds else BYTES_WITHOUT_ROUNDS
    return most * rows * d


def place(
    shape: ModelShape,
    work: Work,
    budgets: dict[str, int],
    folder: Path | None = None,
    fixed: dict[str, int] | None = None,
) -> tuple[Placement, Needs]:
    """The placement that costs least time among those that fit.

    Args:
        shape: of the model.
        work: to be done.
        budgets: bytes, "host" and with a GPU "gpu".
        folder: for activations in a file.
        fixed: fields of `Placement` that are settled.

    Raises:
        InputError: none fits; names the smallest budget that could.
    """
    batch = max(1, BATCH_TOKENS // work.seqlen)
    least = BYTES_PER_ENTRY * ROW_UNIT * max(layer.d for block in shape.blocks for layer in block.layers)
    choices = {
        "batch": [batch >> n for n in range(batch.bit_length())],
        "place": PLACES if work.gpu else PLACES[1:],
        "ahead": [True, False],
        "solver": sorted({max(least, SOLVER >> n) for n in range(8)}, reverse=True),
    }
    choices |= {name: [value] for name, value in (fixed or {}).items()}
    # What is named last is given up first.
    order = ("ahead", "batch", "solver", "place") if work.gpu else ("batch", "place", "ahead", "solver")
    found = []
    for values in product(*(choices[name] for name in order)):
        placement = Placement(folder=folder, **dict(zip(order, values, strict=True)))
        needed = needs(shape, work, placement)
        if needed.gpu <= budgets.get("gpu", 0) and needed.host <= budgets["host"]:
            return placement, needed
        found.append(needed)
    for what in ("gpu", "host"):
        least = min(getattr(needed, what) for needed in found)
        if least > budgets.get(what, 0):
            # Rounded up, so that what is named is enough.
            enough = math.ceil(100 * least / GIB) / 100
            raise InputError(
                f"--{what}-memory {budgets.get(what, 0) / GIB:.2f}: this run needs at least {enough:.2f} GiB of "
                f"{what.replace('gpu', 'GPU')} memory; give more, or fewer or shorter windows (--nsamples, --seqlen)"
            )
        found = [needed for needed in found if getattr(needed, what) <= budgets.get(what, 0)]
    raise AssertionError("a placement fits each budget, and none fits both")
