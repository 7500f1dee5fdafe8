"""Totals of a run: flops and bytes by phase, traffic on the disk, and seconds at given rates."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from sparsefw.estimate import rates
from sparsefw.estimate.flops import head, operations
from sparsefw.estimate.operation import Operation
from sparsefw.estimate.passes import passes
from sparsefw.estimate.rates import Rates
from sparsefw.estimate.workload import PlannedRun
from sparsefw.model.shapes import BlockShape

# In the order of the driver. "read" and "write" use the disk alone; the others are those of `operation.Operation`.
PHASES = ("read", "calibrate", "solve", "forward", "evaluate", "write")

# Weights outside of the blocks are read twice: to embed the windows, and for the logits. All of them are read to be
# written.
READ_OUTSIDE = 2


def phases(run: PlannedRun) -> dict[str, dict[str, Counter[str]]]:
    """Flops and bytes by phase and in "all": of the "block" with the most flops, of the whole "run", on the "disk"."""
    counts, traffic = run.block_counts, disk_traffic(run)
    by_block = {block: operations(run, block) for block in counts}
    largest = max(by_block.values(), key=lambda listed: sum(operation.cost.flops for operation in listed))
    rows: dict[str, dict[str, Counter[str]]] = {}
    for phase in PHASES:
        whole = _sum(head(run), phase)
        for block, count in counts.items():
            whole += Counter({what: count * amount for what, amount in _sum(by_block[block], phase).items()})
        if whole or traffic[phase]:
            rows[phase] = {"block": _sum(largest, phase), "run": whole, "disk": Counter(bytes=traffic[phase])}
    rows["all"] = {part: sum((row[part] for row in rows.values()), Counter()) for part in ("block", "run", "disk")}
    return rows


def _sum(listed: Iterable[Operation], phase: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for operation in listed:
        if operation.phase == phase:
            total.update(flops=operation.cost.flops, bytes=operation.cost.bytes)
    return total


def units(run: PlannedRun) -> set[str]:
    """The units that multiply something."""
    in_blocks = {operation.unit for block in run.block_counts for operation in operations(run, block)}
    return in_blocks | {operation.unit for operation in head(run)}


def disk_traffic(run: PlannedRun) -> Counter[str]:
    """Bytes read and written by phase; activations only where they are in a file."""
    shape = run.shape
    inside = sum(block.nbytes for block in shape.blocks)
    others = sum(shape.pieces)
    read = int(shape.stored * (inside + READ_OUTSIDE * shape.outside + others))
    traffic = Counter(read=read, write=len(run.workload.config.methods) * inside + others)
    for block, count in run.block_counts.items():
        for phase, amount in _activation_traffic(run, block).items():
            traffic[phase] += count * amount
    return traffic


def _activation_traffic(run: PlannedRun, block: BlockShape) -> Counter[str]:
    traffic: Counter[str] = Counter()
    if run.placement.place != "file":
        return traffic
    # Hidden states alone: what blocks hand on beside them is known at most, and this is a lower bound.
    window = run.shape.of_stream(run.workload.seqlen)[0]
    for windows_pass in passes(block, run.workload, run.placement):
        # Windows that move are written, too.
        traffic[windows_pass.phase] += windows_pass.windows * window * (1 + windows_pass.moves)
    return traffic


def phase_seconds(run: PlannedRun, speed: Rates) -> dict[str, float]:
    """Least seconds of each phase by itself."""
    traffic = disk_traffic(run)
    total: dict[str, float] = defaultdict(float, {name: speed.on_disk(traffic[name]) for name in ("read", "write")})
    for block, count in run.block_counts.items():
        for operation in operations(run, block):
            total[operation.phase] += count * rates.seconds([operation], speed)
    for operation in head(run):
        total[operation.phase] += rates.seconds([operation], speed)
    return dict(total)


def seconds(run: PlannedRun, speed: Rates) -> float:
    """Least seconds of the run. While a block is worked on, the next one is read and the last one written."""
    shape, methods, ahead = run.shape, len(run.workload.config.methods), run.placement.ahead
    work = {block: rates.seconds(operations(run, block), speed) for block in run.block_counts}
    files = {block: speed.on_disk(_activation_traffic(run, block).total()) for block in run.block_counts}
    sizes = [block.nbytes for block in shape.blocks]
    reads = [int(shape.stored * size) for size in sizes]
    traffic = disk_traffic(run)
    # Bytes that are read or written beside the work: all blocks but the first are read, all but the last are written.
    beside = (sum(reads[1:]) + methods * sum(sizes[:-1])) if ahead else 0
    total = speed.on_disk(traffic["read"] + traffic["write"] - beside)
    for block, read, written in zip(shape.blocks, [*reads[1:], 0], [0, *sizes[:-1]], strict=True):
        on_disk = files[block] + (speed.on_disk(read + methods * written) if ahead else 0)
        total += max(work[block], on_disk)
    return total + rates.seconds(head(run), speed)
