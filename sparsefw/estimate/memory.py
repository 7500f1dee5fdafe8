"""How much memory and disk a run takes at most, from the shapes alone: the run keeps to it, and the plan prints it.

Weights are held a block at a time, Gram and cross matrices a stage at a time, the state of a solve a chunk of rows at a
time. Activations are held a micro-batch at a time where they are used, and of all windows where they are placed. On a
machine without a GPU all of it is on the host. Of several ranks, all of this is what the one with the most takes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sparsefw import data
from sparsefw.estimate.forward_memory import (
    SLACK,
    forward_bytes,
    libraries_bytes,
    outside_page_locked,
    page_locked_of_block,
)
from sparsefw.estimate.passes import fits_predictions, is_forked, is_kept, stages
from sparsefw.estimate.reconstruction_memory import prediction_bytes, reconstruction_bytes
from sparsefw.estimate.sharing import Group, approximates_dense, grams_of_rank, groups
from sparsefw.estimate.solve_memory import cross_bytes, rows_of_rank, stage_bytes
from sparsefw.estimate.workload import Workload
from sparsefw.memory import pinned_bytes
from sparsefw.model import Placement
from sparsefw.model.layers import first_segments, is_watched
from sparsefw.model.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.ranks import panels
from sparsefw.solver import PruneConfig

GIB = 2**30


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes at the peak.

    Attributes:
        phases: (bytes on the GPU, bytes on the host) by phase; without a GPU the first is 0.
    """

    phases: dict[str, tuple[int, int]]

    @property
    def gpu(self) -> int:
        """Bytes on the GPU."""
        return max(gpu for gpu, _ in self.phases.values())

    @property
    def host(self) -> int:
        """Bytes on the host."""
        return max(host for _, host in self.phases.values())


def memory_needs(shape: ModelShape, workload: Workload, placement: Placement) -> MemoryNeeds:
    """The peaks of a run; of several ranks, those of the one that takes most.

    Args:
        shape: shape of the model.
        workload: the work.
        placement: what is held at once, and where.
    """
    # Most blocks of a model are alike.
    config, blocks = workload.config, list(dict.fromkeys(shape.blocks))
    most = max(workload.windows_of_rank, *workload.evaluation_of_rank, 0)
    tokens = min(placement.batch, most) * workload.seqlen
    near, far = _activations(shape, workload, placement)
    kept = _Kept.of(shape, workload, placement, tokens)
    block = max(b.nbytes for b in blocks)
    weights = block * (1 + (config.uses_dense_target or len(config.methods) > 1))
    others = _other_blocks(shape, workload, placement)
    logits = (workload.seqlen if shape.by_window else tokens) * shape.vocabulary * (shape.itemsize + 8)
    forward = max(forward_bytes(b, shape, workload.seqlen, tokens) for b in blocks)
    # Weights go to a GPU through page-locked host memory.
    passing = outside_page_locked(shape) if workload.gpu else 0
    on_device = {
        "start": shape.outside + blocks[0].nbytes + max(forward, shape.loading),
        "calibrate": max(
            weights + max(_calibration_bytes(b, shape, workload, tokens, kept) for b in blocks),
            # While a block is loaded.
            block + shape.loading,
        ),
        "solve": weights + max(_solve_bytes(b, shape, workload, placement, kept) for b in blocks),
        "reconstruct": max(
            block + max(reconstruction_bytes(b, shape, workload, tokens) for b in blocks),
            prediction_bytes(shape, workload, tokens),
        ),
        "write": weights,
        "end": shape.outside + max(logits if workload.evaluation else 0, shape.quantized),
    }
    pruning = others + kept.far
    # All tensors outside of the blocks are written at the end, piece by piece. They are not loaded for it.
    piece = max(shape.pieces) + shape.quantized
    on_host = {
        "start": passing,
        "calibrate": pruning,
        "solve": pruning,
        "reconstruct": others + (passing if fits_predictions(shape, config) else 0),
        "write": others,
        "end": max(passing, piece),
    }
    if not workload.gpu:
        on_host["end"] = max(0, piece - on_device["end"])
    process = workload.process
    if not workload.gpu:
        process += libraries_bytes(
            shape, workload.threads, tokens, _batches(workload, placement), config.reconstruct > 0
        )
    texts = data.reading_bytes(workload.windows, workload.evaluation, workload.seqlen)
    if not config.reconstruct:
        del on_device["reconstruct"]
    phases = {"texts": (0, max(texts + workload.process, workload.peak))}
    for phase in on_device:
        device, host = (1 + SLACK) * (on_device[phase] + near), (1 + SLACK) * (on_host[phase] + far)
        apart = int(device) + workload.held, int(host) + process
        phases[phase] = apart if workload.gpu else (0, int(device + host) + process)
    return MemoryNeeds(phases)


def disk_space(shape: ModelShape, workload: Workload, placement: Placement) -> dict[str, int]:
    """Bytes on the disk: "output"; "kept", the blocks of compared methods until the end; and "activations".

    Activations are those of all ranks.
    """
    alone = replace(workload, ranks=1)
    inside = sum(block.nbytes for block in shape.blocks)
    return {
        "output": inside + sum(shape.pieces),
        "kept": (len(workload.config.methods) - 1) * inside,
        "activations": activation_bytes(shape, alone) if placement.place == "file" else 0,
    }


def activation_bytes(shape: ModelShape, workload: Workload) -> int:
    """All that lies between two blocks, of a rank's windows, of every method and, where it is used, the dense model."""
    of_stream, of_text = sum(shape.of_stream(workload.seqlen)), sum(shape.of_text(workload.seqlen))
    return sum(windows * (streams * of_stream + of_text) for windows, streams in _texts(workload))


def _texts(workload: Workload) -> list[tuple[int, int]]:
    """For the calibration text and each evaluation text, a rank's windows, and the number of streams with them."""
    methods = len(workload.config.methods)
    config = workload.config
    # A reconstruction begins where stages have begun to move the windows on.
    calibration = workload.windows_of_rank, methods + config.uses_dense_stream + is_forked(config)
    return [calibration, *((windows, methods + 1) for windows in workload.evaluation_of_rank)]


@dataclass(frozen=True)
class _Kept:
    """Inputs that are kept for the next run of the calibration windows.

    Attributes:
        placement: says which are.
        near: bytes on the device for each entry a token.
        far: bytes on the host beside it.
    """

    placement: Placement
    near: int
    far: int

    @classmethod
    def of(cls, shape: ModelShape, workload: Workload, placement: Placement, tokens: int) -> "_Kept":
        """The inputs that a placement keeps; `tokens` are those of a micro-batch."""
        everything = workload.windows_of_rank * workload.seqlen * shape.itemsize
        if placement.place == "gpu" or not workload.gpu:
            return cls(placement, everything, 0)
        # Every micro-batch is a page-locked tensor, and torch keeps its memory for the next tensor of this size.
        widths = [width for width in keepable_widths(shape, workload) if width <= placement.kept_width]
        batches = -(-workload.windows_of_rank // placement.batch)
        far = sum(batches * pinned_bytes(tokens * width * shape.itemsize) for width in widths)
        # One micro-batch is on its way to the GPU, and one is at work.
        return cls(placement, min(everything, 2 * tokens * shape.itemsize), far)

    def by_stage(self, block: BlockShape) -> list[int]:
        """Bytes on the device while each stage is measured and solved: its inputs, and those of the stage before."""
        order = stages(block.layers)
        segments = first_segments([[layer.role for layer in stage] for stage in order])
        own = [
            stage[0].d if is_kept(stage, segment, self.placement) else 0
            for stage, segment in zip(order, segments, strict=True)
        ]
        return [self.near * (width + before) for width, before in zip(own, [0, *own], strict=False)]


def keepable_widths(shape: ModelShape, workload: Workload) -> set[int]:
    """Widths of the inputs that can be kept."""
    if not workload.config.uses_dense_target:
        return set()
    return {layer.d for block in shape.blocks for layer in block.layers if layer.role.keepable}


def _activations(shape: ModelShape, workload: Workload, placement: Placement) -> tuple[int, int]:
    """Bytes of what lies between two blocks on the device, and on the host beside it."""
    everything, texts, seqlen = activation_bytes(shape, workload), _texts(workload), workload.seqlen
    of_stream, of_text = shape.of_stream(seqlen), shape.of_text(seqlen)
    batch = min(placement.batch, max(windows for windows, _ in texts))
    # Five micro-batches at most. One is on its way in. The next one is launched before the last one is checked, so two
    # are inputs of the block, and two are on their way out.
    moving = min(everything, 5 * batch * sum(of_stream + of_text))
    if not workload.gpu:
        return {"gpu": (everything, 0), "host": (moving, everything), "file": (moving, moving)}[placement.place]

    def locked(windows: int, sizes: list[int]) -> int:
        # On the host of a GPU every micro-batch is a page-locked tensor; the last one of a text may be smaller.
        whole, rest = divmod(windows, placement.batch)
        return sum(whole * pinned_bytes(placement.batch * n) + pinned_bytes(rest * n) for n in sizes)

    all_locked = sum(count * locked(n, of_stream) + locked(n, of_text) for n, count in texts)
    locked_moving = min(all_locked, sum(5 * pinned_bytes(batch * n) for n in of_stream + of_text))
    return {"gpu": (everything, 0), "host": (moving, all_locked), "file": (moving, locked_moving)}[placement.place]


def _batches(workload: Workload, placement: Placement) -> set[int]:
    """The different numbers of windows in micro-batches: the last one of a text may be smaller."""
    return {n for count, _ in _texts(workload) for n in (min(count, placement.batch), count % placement.batch)}


def _other_blocks(shape: ModelShape, workload: Workload, placement: Placement) -> int:
    """Bytes of blocks on the host beside the one at work: the next one, the one being written, and compared ones."""
    block, methods = max(b.nbytes for b in shape.blocks), len(workload.config.methods)
    if not workload.gpu:
        return block * (min(placement.ahead + 1, len(shape.blocks) - 1) + methods - 1)
    # torch keeps the page-locked memory of a block for the next one, unless blocks come one after another.
    locked, written = max(page_locked_of_block(b, shape) for b in shape.blocks), block * methods
    return locked + written if placement.ahead else max(locked, written)


def _gram_bytes(stage: Sequence[LayerShape]) -> int:
    """Gram matrices of a stage: one, or one for each expert."""
    return 4 * stage[0].d ** 2 * max(1, stage[0].experts)


def _groups(block: BlockShape, config: PruneConfig, kept: _Kept) -> Iterator[tuple[str, Group, int]]:
    """For each method, the stages whose inputs are measured together, and the bytes of kept inputs."""
    for method in config.methods:
        found = groups(block, config, method)
        sizes = kept.by_stage(block) if approximates_dense(config, method) else [0] * len(found)
        for group, size in zip(found, sizes, strict=True):
            yield method, group, size


def _calibration_bytes(block: BlockShape, shape: ModelShape, workload: Workload, tokens: int, kept: _Kept) -> int:
    """Gram and cross matrices, and the inputs and outputs that they are made of."""
    config = workload.config
    peak = forward = forward_bytes(block, shape, workload.seqlen, tokens)
    if config.uses_dense_target:
        # All stages are watched at once to find them.
        watched = sum(stage[0].d * stage[0].parts + sum(x.rows for x in stage) for stage in stages(block.layers))
        peak += tokens * watched * shape.itemsize
    for method, group, kept_bytes in _groups(block, config, kept):
        dense = approximates_dense(config, method)
        matrices = sum(_gram_bytes(stage) + cross_bytes(stage, config, method) for stage in group)
        d, rows = max(stage[0].d for stage in group), max(layer.rows for stage in group for layer in stage)
        held = tokens * shape.itemsize * sum(_held(stage, shape, dense) for stage in group)
        # Operands are made of them while the rest of the block runs, or afterwards. On a CPU both are in fp32.
        operands = 0 if workload.gpu else 4 * tokens * (d + (rows if dense else 0))
        peak = max(peak, matrices + kept_bytes + held + max(forward, operands))
    return peak


def _held(stage: Sequence[LayerShape], shape: ModelShape, dense: bool) -> int:
    """Entries a token that are held beside a block's forward: inputs and outputs of a stage, and their gaps."""
    d = stage[0].d
    if not dense or stage[0].experts:
        return d * stage[0].parts
    if is_watched([layer.role for layer in stage]):
        return d + 2 * sum(layer.rows for layer in stage) + max(layer.rows for layer in stage)
    writes = sum(layer.role.way == "writes" for layer in stage)
    # Both inputs and their gap, or one input, both streams and theirs.
    return d * (3 if writes < len(stage) else 1) + 3 * shape.hidden * bool(writes)


def _solve_bytes(block: BlockShape, shape: ModelShape, workload: Workload, placement: Placement, kept: _Kept) -> int:
    """The matrices of the stages that were measured together, and the solve of one of these stages."""
    peak, config = 0, workload.config
    for method, group, kept_bytes in _groups(block, config, kept):
        crosses = kept_bytes + sum(cross_bytes(stage, config, method) for stage in group)
        waiting = crosses + sum(map(_gram_bytes, group))
        if workload.ranks > 1:
            peak = max(peak, waiting + _exchange_bytes(group, shape, workload, method))
            # Those of other ranks leave memory when they are summed.
            matrices = grams_of_rank(group, config, workload.ranks)
            waiting = crosses + sum(4 * stage[0].d ** 2 * n for stage, n in zip(group, matrices, strict=True))
        for stage in group:
            peak = max(peak, waiting + stage_bytes(stage, workload, placement, method))
    return peak


def _exchange_bytes(group: Group, shape: ModelShape, workload: Workload, method: str) -> int:
    """Buffers of what is sent: two panels of a Gram matrix, then the rows of a rank, or of an owner."""
    peak = 0
    for stage in group:
        d, rows = stage[0].d, rows_of_rank(stage, workload, method)
        panel = 4 * max(part.stop * (part.stop - part.start) for part in panels(d))
        peak = max(peak, 2 * panel, rows * d * shape.itemsize)
    return peak
