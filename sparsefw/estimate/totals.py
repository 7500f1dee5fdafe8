"""What a run takes in all: flops and bytes by phase, traffic on the disk, and seconds at given rates."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from sparsefw.estimate import rates
from sparsefw.estimate.flops import Operation, Traits, head, operations, passes
from sparsefw.estimate.memory import Work
from sparsefw.estimate.rates import Rates
from sparsefw.model.placement import Placement
from sparsefw.model.shapes import BlockShape, ModelShape

# "read" and "write" are of the disk alone; the others as in `work.Operation`, in the order of the driver.
PHASES = ("read", "calibrate", "solve", "forward", "evaluate", "write")

# What lies outside of the blocks is read to embed the windows, to be written, and for the logits.
READ_OUTSIDE = 3


@dataclass(frozen=True)
class Job:
    """A run to be estimated.

    Attributes:
        shape, traits: of the model.
        work: to be done.
        placement: what is held at once, and where.
        by_changes: see `work.operations`.
    """

    shape: ModelShape
    traits: Traits
    work: Work
    placement: Placement
    by_changes: bool = False

    def of_block(self, block: BlockShape) -> list[Operation]:
        """All that is done to a block."""
        return operations(block, self.shape, self.work, self.placement, self.traits, by_changes=self.by_changes)

    def kinds(self) -> Counter[BlockShape]:
        """The different blocks, and how often each is there."""
        return Counter(self.shape.blocks)


def phases(job: Job) -> dict[str, dict[str, dict[str, int]]]:
    """Flops and bytes by phase and in "all": of the "block" with the most flops, of the whole "run", on the "disk"."""
    kinds, traffic = job.kinds(), disk_traffic(job)
    done = {block: job.of_block(block) for block in kinds}
    largest = max(done.values(), key=lambda ops: sum(one.cost.flops for one in ops))
    found = {}
    for phase in PHASES:
        run = _sum(head(job.shape, job.work), phase)
        for block, count in kinds.items():
            run += Counter({what: count * amount for what, amount in _sum(done[block], phase).items()})
        if run or traffic[phase]:
            found[phase] = {"block": _sum(largest, phase), "run": run, "disk": Counter(bytes=traffic[phase])}
    found["all"] = {of: sum((row[of] for row in found.values()), Counter()) for of in ("block", "run", "disk")}
    return found


def _sum(ops: Iterable[Operation], phase: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in ops:
        if one.phase == phase:
            found.update(flops=one.cost.flops, bytes=one.cost.bytes)
    return found


def units(job: Job) -> set[str]:
    """The units that multiply something."""
    return {one.unit for block in job.kinds() for one in [*job.of_block(block), *head(job.shape, job.work)]}


def disk_traffic(job: Job) -> Counter[str]:
    """Bytes read and written by phase; activations only where they lie in a file."""
    shape = job.shape
    inside = sum(block.nbytes for block in shape.blocks)
    # One block is asked for the form of its output before anything else.
    read = inside + READ_OUTSIDE * shape.outside + shape.blocks[0].nbytes
    found = Counter(read=read, write=len(job.work.methods) * inside + shape.outside)
    for block, count in job.kinds().items():
        for phase, amount in _activations_moved(job, block).items():
            found[phase] += count * amount
    return found


def _activations_moved(job: Job, block: BlockShape) -> Counter[str]:
    found: Counter[str] = Counter()
    if job.placement.place == "file":
        for one in passes(block, job.work, job.placement):
            size = one.windows * job.work.seqlen * job.shape.hidden * job.shape.itemsize
            found[one.phase] += size * (1 + one.advances)
        if job.work.followed and block.ahead:
            # What the dense block has put out is read where the last stage's layers should.
            found["calibrate"] += job.work.windows * job.work.seqlen * job.shape.hidden * job.shape.itemsize
    return found


def phase_seconds(job: Job, speed: Rates) -> dict[str, float]:
    """The floor of each phase by itself."""
    traffic = disk_traffic(job)
    found: dict[str, float] = defaultdict(float, {name: speed.on_disk(traffic[name]) for name in ("read", "write")})
    for block, count in job.kinds().items():
        for one in job.of_block(block):
            found[one.phase] += count * rates.seconds([one], speed)
    for one in head(job.shape, job.work):
        found[one.phase] += rates.seconds([one], speed)
    return dict(found)


def seconds(job: Job, speed: Rates) -> float:
    """The floor of the run: a block's work, and beside it the next one is read and the last one written."""
    shape, methods, ahead = job.shape, len(job.work.methods), job.placement.ahead
    work = {block: rates.seconds(job.of_block(block), speed) for block in job.kinds()}
    files = {block: speed.on_disk(_activations_moved(job, block).total()) for block in job.kinds()}
    sizes = [block.nbytes for block in shape.blocks]
    traffic = disk_traffic(job)
    # What is not beside a block's work: all but the blocks from the second on, and the written ones but the last.
    beside = (sum(sizes[1:]) + methods * sum(sizes[:-1])) if ahead else 0
    total = speed.on_disk(traffic["read"] + traffic["write"] - beside)
    for block, read, written in zip(shape.blocks, [*sizes[1:], 0], [0, *sizes[:-1]], strict=True):
        on_disk = files[block] + (speed.on_disk(read + methods * written) if ahead else 0)
        total += max(work[block], on_disk)
    return total + rates.seconds(head(shape, job.work), speed)
