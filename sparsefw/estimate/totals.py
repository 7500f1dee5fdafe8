"""Totals of a run: flops and bytes by phase, traffic on the disk, and seconds at given rates."""

from collections import Counter, defaultdict
from collections.abc import Iterable

from sparsefw.estimate import rates
from sparsefw.estimate.flops import head, operations
from sparsefw.estimate.operation import Operation
from sparsefw.estimate.passes import fits_predictions, is_forked, passes
from sparsefw.estimate.rates import Rates
from sparsefw.estimate.traffic import traffic
from sparsefw.estimate.workload import PlannedRun
from sparsefw.model.shapes import BlockShape

# In the order of the driver. "read" and "write" use the disk alone. In "exchange" ranks send each other what they have.
# The others are those of `operation.Operation`.
PHASES = ("read", "calibrate", "exchange", "solve", "reconstruct", "forward", "evaluate", "write")

# Weights outside of the blocks are read twice: to embed the windows, and for the logits; once more where the last block
# is fitted by these. All of them are read to be written.
READ_OUTSIDE = 2


def phases(run: PlannedRun) -> dict[str, dict[str, Counter[str]]]:
    """Flops and bytes by phase and in "all": of the "block" with the most flops, of the whole "run", on the "disk".

    The last block has more passes than the others. It is the "block" only if there is no other.
    Of several ranks, flops and bytes are those of one that has the most to do in every stage. The disk is that of all.
    """
    counts, on_disk = run.block_counts, disk_traffic(run)
    by_block = {block: operations(run, block) for block in counts}
    flops = {block: sum(operation.cost.flops for operation in listed) for block, listed in by_block.items()}
    largest = by_block[max(counts, key=lambda block: (not block.predicts, flops[block]))]
    rows: dict[str, dict[str, Counter[str]]] = {}
    for phase in PHASES:
        whole = _sum(head(run), phase)
        for block, count in counts.items():
            whole += Counter({what: count * amount for what, amount in _sum(by_block[block], phase).items()})
        if whole or on_disk[phase]:
            rows[phase] = {"block": _sum(largest, phase), "run": whole, "disk": Counter(bytes=on_disk[phase])}
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
    """Bytes read and written by phase; activations only where they are in a file.

    Every machine reads all blocks once: its ranks share the cache of its files. Each shard is written by one rank.
    """
    shape, workload = run.shape, run.workload
    inside = sum(block.nbytes for block in shape.blocks)
    others = sum(shape.pieces)
    outside = (READ_OUTSIDE + fits_predictions(shape, workload.config)) * shape.outside
    read = int(shape.stored * (inside + outside + others))
    amounts = Counter(read=workload.machines * read, write=len(workload.config.methods) * inside + others)
    for block, count in run.block_counts.items():
        for phase, amount in _activation_traffic(run, block).items():
            amounts[phase] += count * workload.ranks * amount
    return amounts


def _activation_traffic(run: PlannedRun, block: BlockShape) -> Counter[str]:
    """Bytes of a rank's activations in a block, by phase."""
    amounts: Counter[str] = Counter()
    if run.placement.place != "file":
        return amounts
    # Hidden states alone: what blocks hand on beside them is known at most, and this is a lower bound.
    window = run.shape.of_stream(run.workload.seqlen)[0]
    for windows_pass in passes(block, run.workload, run.placement):
        # Windows that move are written, too.
        times = 1 + windows_pass.moves + windows_pass.compared
        amounts[windows_pass.phase] += windows_pass.windows * window * times
    if is_forked(run.workload.config):
        # They are read and written.
        amounts["reconstruct"] += run.workload.windows_of_rank * window * 2
    return amounts


def phase_seconds(run: PlannedRun, speed: Rates, link: float | None = None) -> dict[str, float]:
    """Least seconds of each phase by itself.

    Args:
        run: the run.
        speed: rates of a rank's device, and of a machine's disk.
        link: bytes per second that a rank sends, see `Links`; None: transfers take no time.
    """
    on_disk, machines = disk_traffic(run), run.workload.machines
    total: dict[str, float] = defaultdict(
        float, {name: speed.on_disk(on_disk[name] / machines) for name in ("read", "write")}
    )
    for block, count in run.block_counts.items():
        for operation in operations(run, block):
            total[operation.phase] += count * rates.seconds([operation], speed)
        if sent := transfer_seconds(run, block, link):
            total["exchange"] += count * sent
    for operation in head(run):
        total[operation.phase] += rates.seconds([operation], speed)
    return dict(total)


def transfer_seconds(run: PlannedRun, block: BlockShape, link: float | None) -> float:
    """Least seconds in which ranks send each other what they do for a block. They wait for it meanwhile."""
    return traffic(run, block).waited / link if link else 0.0


def seconds(run: PlannedRun, speed: Rates, link: float | None = None) -> float:
    """Least seconds of the run. While a block is worked on, the next one is read and the last one written.

    For the arguments see `phase_seconds`.
    """
    shape, methods, ahead = run.shape, len(run.workload.config.methods), run.placement.ahead
    machines, here = run.workload.machines, run.workload.ranks_here
    work = {
        block: rates.seconds(operations(run, block), speed) + transfer_seconds(run, block, link)
        for block in run.block_counts
    }
    files = {block: speed.on_disk(here * _activation_traffic(run, block).total()) for block in run.block_counts}
    sizes = [block.nbytes for block in shape.blocks]
    reads = [int(shape.stored * size) for size in sizes]
    on_disk = disk_traffic(run)
    # Bytes that are read or written beside the work: all blocks but the first are read, all but the last are written.
    # Machines write at the same time.
    read_beside, written_beside = (sum(reads[1:]), methods * sum(sizes[:-1])) if ahead else (0, 0)
    read, written = on_disk["read"] // machines - read_beside, on_disk["write"] - written_beside
    total = speed.on_disk(read + written / machines)
    for block, read, written in zip(shape.blocks, [*reads[1:], 0], [0, *sizes[:-1]], strict=True):
        beside = files[block] + (speed.on_disk(read + methods * written / machines) if ahead else 0)
        total += max(work[block], beside)
    return total + rates.seconds(head(run), speed)
