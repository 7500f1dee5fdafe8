"""Count the peak memory and the disk space of a run. The run stays below these counts, and the plan prints them.

Memory holds the weights of one block, the Gram and cross matrices of one stage, and the state of a solve for a chunk of
rows. The activations of one micro-batch are on the device, and those of all windows are where the placement puts them.
The bytes of a forward were counted when the shape of the model was found. Without a GPU everything is on the host. Of
several ranks, the one with most windows counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from sparsefw.checkpoint.quantization import BYTES_OF_CHUNK, CHUNK
from sparsefw.data.windows import reading_bytes
from sparsefw.estimate.gradients import forward_bytes, reconstruction_bytes, recovery_bytes
from sparsefw.estimate.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.memory import pinned_bytes
from sparsefw.model.activations import Placement
from sparsefw.solver.config import METHODS, PruneConfig
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT, cpu_rows

GIB = 2**30

# Safety margins on a GPU and on a CPU, as a share of the tensors' bytes. The CPU's margin is larger: torch enforces the
# limit of a GPU, but the system kills a run that fills the host.
GPU_MARGIN, CPU_MARGIN = 0.05, 0.15

# Bytes of the code and the buffers of a CPU's libraries. oneDNN takes CODE_OF_EXPERTS more for mixtures of experts: it
# generates code in half precision for each number of tokens that the router sends to an expert.
LIBRARIES, CODE_OF_EXPERTS = 2**26, 2**29

# Bytes of a solve for each entry of a layer that is not cut into chunks of rows: by Frank-Wolfe, and by SparseGPT.
BYTES_OF_WHOLE, BYTES_OF_SWEEP = 48, 20
# Bytes before a solve for each entry of a layer. BYTES_OF_SALIENCY: the saliencies of rows that ranks share.
# BYTES_OF_BUDGETS: the saliencies of a whole matrix, and the choice of budgets.
BYTES_OF_SALIENCY, BYTES_OF_BUDGETS = 4, 23

# Bytes of the hidden states of a recovery's chunk: at least, and as a share of the whole model's. A recovery holds out
# MOST_HELD_OUT windows at most, besides the chunk.
LEAST_CHUNK, CHUNK_SHARE, MOST_HELD_OUT = 2**26, 1 / 8, 16

# Bytes for each entry of the vocabulary to sample a token: logits, sorted likelihoods and their cumulative sums.
BYTES_OF_SAMPLING = 40


@dataclass(frozen=True)
class MemoryNeeds:
    """Peak bytes.

    Attributes:
        phases: by phase, (bytes on the GPU, bytes on the host); without a GPU the bytes on the GPU are 0.
    """

    phases: dict[str, tuple[int, int]]

    @property
    def gpu(self) -> int:
        """Return the peak bytes on the GPU."""
        return max(gpu for gpu, _ in self.phases.values())

    @property
    def host(self) -> int:
        """Return the peak bytes on the host."""
        return max(host for _, host in self.phases.values())


def memory_needs(shape: ModelShape, workload: Workload, placement: Placement) -> MemoryNeeds:
    """Count the peak bytes of a run; with several ranks, of the rank that takes most.

    Args:
        shape: shape of the model, with the layers that are pruned.
        workload: the work.
        placement: how much is in memory at a time, and where.
    """
    config, gpu, seqlen = workload.config, workload.gpu, workload.seqlen
    tokens = min(placement.batch, workload.most_windows) * seqlen
    weights = shape.largest * (2 if config.uses_dense_target or len(config.methods) > 1 else 1)
    forward = max(forward_bytes(block, shape, seqlen, tokens) for block in shape.kinds)
    loading = _loading_bytes(shape, gpu)
    # Weights are copied to a GPU through pinned memory of the host.
    passing = _outside_pinned(shape) if gpu else 0
    others = _other_blocks(shape, workload, placement)
    kept, kept_on_host = _kept_inputs(shape, workload, placement, tokens)
    peaks = [_block_peaks(block, shape, workload, placement, tokens) for block in shape.kinds]
    measure, solve = map(max, zip(*peaks, strict=True))
    # For each phase: bytes on the device, and further bytes on the host.
    phases = {
        "start": (shape.outside + shape.blocks[0].nbytes + max(forward, loading), passing),
        "calibrate": (weights + max(loading, kept + measure), others + kept_on_host),
        "solve": (weights + kept + solve, others + kept_on_host),
    }
    if config.reconstruct:
        of_step = min(placement.step or placement.batch, workload.most_windows) * seqlen
        # Measuring the loss takes the hidden states of a micro-batch in both models, and four copies in fp32.
        loss = max(forward, 16 * tokens * shape.hidden) + 2 * tokens * shape.hidden * shape.itemsize
        fit = config.pattern, seqlen, of_step, loss
        fitted = max(block.nbytes + reconstruction_bytes(block, shape, *fit) for block in shape.kinds)
        phases["reconstruct"] = fitted, others + passing
    logits = (seqlen if shape.by_window else tokens) * shape.vocabulary * (shape.itemsize + 8)
    end = shape.outside + max(logits if workload.evaluation else 0, loading)
    # The tensors outside of the blocks are written at the end: piece by piece, from the checkpoint to the output.
    piece = max(shape.pieces, default=0) + shape.quantized_bytes
    phases["end"] = end, max(passing, piece) if gpu else max(0, piece - end)
    near, far = _activations(shape, workload, placement)
    # One rank reads the texts of all ranks.
    read = [workload.ranks * n for n in (workload.windows, *workload.evaluation)]
    needs = {"texts": (0, workload.process + reading_bytes(read[0], read[1:], seqlen))}
    if workload.generated:
        # There are no activations yet. Two blocks at a time are on their way to a GPU.
        state = seqlen * shape.cache + BYTES_OF_SAMPLING * shape.vocabulary
        on_device = shape.whole_bytes + loading + workload.generated * state
        needs["generate"] = _peak(shape, workload, on_device, passing + 2 * shape.largest if gpu else 0)
    for phase, (on_device, on_host) in phases.items():
        needs[phase] = _peak(shape, workload, on_device + near, on_host + far)
    return MemoryNeeds(needs)


def recovery_needs(shape: ModelShape, workload: Workload, reruns: bool) -> MemoryNeeds:
    """Count the peak bytes of a recovery: a step of the whole model, and the hidden states of a chunk or a text.

    `reruns` tells whether blocks run again in the backward.
    """
    nbytes, windows = pinned_bytes if workload.gpu else int, chunk_windows(shape, workload.seqlen) + MOST_HELD_OUT
    # Windows are held before the first block, and after the last one.
    host = max(2 * windows, *workload.evaluation, 0) * sum(map(nbytes, shape.window_bytes(workload.seqlen)))
    if workload.gpu:
        # Pinned memory for weights on their way to the GPU or back.
        host += 2 * pinned_bytes(shape.largest) + _outside_pinned(shape)
    step = recovery_bytes(shape, workload.config.pattern, workload.seqlen, workload.gpu, reruns)
    return MemoryNeeds({"recover": _peak(shape, workload, step, host)})


def chunk_windows(shape: ModelShape, seqlen: int) -> int:
    """Choose how many windows of a recovery go through the dense model together.

    The dense model is read once for each chunk, so a larger model has larger chunks.
    """
    most = max(LEAST_CHUNK, int(CHUNK_SHARE * shape.whole_bytes))
    return max(1, most // sum(shape.window_bytes(seqlen)))


def disk_space(shape: ModelShape, workload: Workload, placement: Placement) -> dict[str, int]:
    """Count bytes on the disk.

    Returns:
        "output": the checkpoint. "kept": the blocks of compared methods, and the pruned blocks before a recovery, which
            stay until the end of the run.
        "activations": the activations of all ranks, if they are placed in a file.
    """
    inside = int(shape.written_ratio * sum(block.nbytes for block in shape.blocks))
    return {
        "output": inside + sum(shape.pieces),
        "kept": (len(workload.config.methods) - 1 + (workload.config.recover != 0)) * inside,
        "activations": workload.ranks * _activation_bytes(shape, workload) if placement.place == "file" else 0,
    }


def kept_widths(block: BlockShape, config: PruneConfig, most: float = math.inf) -> list[int]:
    """List, for each stage of a block, the width of the input that is kept for the next stage's run; 0: not kept.

    Args:
        block: the block.
        config: how the block is pruned.
        most: the widest input that is kept, see `Placement.kept_width`.
    """
    if not config.uses_dense_target:
        return []
    widths = [stage[0].d if stage[0].role.cacheable and stage[0].d <= most else 0 for stage in block.stages]
    # A reconstruction starts at the block's input, so the last stage's input is not needed again.
    return widths[:-1] if config.goes_back else widths


def state_bytes(shape: ModelShape, workload: Workload) -> int:
    """Count the bytes of a solve's state if memory has no limit."""
    most, threads = 0, torch.get_num_threads() if workload.config.kernel == "torch" and not workload.gpu else 1
    for stage in (stage for block in shape.kinds for stage in block.stages):
        d, rows = stage[0].d, sum(layer.rows for layer in stage)
        if not workload.gpu:
            rows = min(rows, threads * cpu_rows(d))
        # All threads have the same number of rows.
        most = max(most, BYTES_PER_ENTRY * d * _up_to(rows, threads * ROW_UNIT))
    return most


def _peak(shape: ModelShape, workload: Workload, on_device: int, on_host: int) -> tuple[int, int]:
    """Add the process and a margin to the bytes of tensors; returns the peaks on the GPU and on the host.

    Args:
        shape, workload: the model, and the work.
        on_device, on_host: bytes of tensors on the device, and of further tensors on the host.
    """
    if workload.gpu:
        device, host = (int((1 + GPU_MARGIN) * nbytes) for nbytes in (on_device, on_host))
        return workload.held + device, workload.process + host
    libraries = LIBRARIES
    if shape.itemsize == 2 and any(layer.experts for block in shape.kinds for layer in block.all_layers):
        libraries += CODE_OF_EXPERTS
    return 0, workload.process + libraries + int((1 + CPU_MARGIN) * (on_device + on_host))


def _loading_bytes(shape: ModelShape, gpu: bool) -> int:
    """Count the bytes on the device of stored tensors while a block is dequantized and joined from them."""
    # Quantized tensors are dequantized in chunks, and joined after that.
    chunk = BYTES_OF_CHUNK * CHUNK["cuda" if gpu else "cpu"] if shape.quantized_bytes else 0
    return max(shape.quantized_bytes + chunk, shape.joined_bytes)


def _outside_pinned(shape: ModelShape) -> int:
    """Count the pinned memory of the tensors outside of the blocks: mostly tables of the vocabulary's size."""
    table = shape.vocabulary * shape.hidden * shape.itemsize or shape.outside or 1
    return shape.outside // table * pinned_bytes(table) + shape.outside % table


def _other_blocks(shape: ModelShape, workload: Workload, placement: Placement) -> int:
    """Count the bytes of further blocks on the host: the next one, the one being written, those of compared methods."""
    methods = len(workload.config.methods)
    if not workload.gpu:
        return shape.largest * (min(placement.ahead + 1, len(shape.blocks) - 1) + methods - 1)
    pinned = 0
    for block in shape.kinds:
        sizes = [layer.rows * layer.d * shape.itemsize for layer in block.all_layers for _ in range(layer.count)]
        pinned = max(pinned, sum(map(pinned_bytes, sizes)) + max(0, block.nbytes - sum(sizes)))
    # torch caches the pinned memory of a block, and reuses it for the next block.
    return pinned * (methods + placement.ahead)


def _streams(workload: Workload) -> list[int]:
    """List the number of windows of each stream: one text between two blocks of the dense model or of a pruned one."""
    config, methods = workload.config, len(workload.config.methods)
    calibration = methods + config.uses_dense_stream + config.goes_back
    return [workload.windows] * calibration + [*workload.evaluation] * (methods + 1)


def _activation_bytes(shape: ModelShape, workload: Workload) -> int:
    """Count the bytes of all tensors between two blocks, for all streams of a rank."""
    return sum(_streams(workload)) * sum(shape.window_bytes(workload.seqlen))


def _activations(shape: ModelShape, workload: Workload, placement: Placement) -> tuple[int, int]:
    """Count the bytes of the tensors between two blocks: on the device, and further bytes on the host."""
    everything = _activation_bytes(shape, workload)
    if placement.place == "gpu":
        return everything, 0
    batch, sizes = min(placement.batch, workload.most_windows), shape.window_bytes(workload.seqlen)
    # Micro-batches on the device: of the pruned model one that arrives, two in use and two that leave; of the dense
    # model two.
    moving = min(everything, 7 * batch * sum(sizes))
    if placement.place == "file":
        return moving, moving
    if not workload.gpu:
        return moving, everything
    # Every tensor of a micro-batch has its own pinned memory, whose size is rounded up.
    batches = sum(-(-windows // batch) for windows in _streams(workload))
    return moving, batches * sum(pinned_bytes(batch * nbytes) for nbytes in sizes)


def _kept_inputs(shape: ModelShape, workload: Workload, placement: Placement, tokens: int) -> tuple[int, int]:
    """Count the bytes of kept inputs: on the device, and further bytes on the host. A micro-batch has `tokens`."""
    found = [kept_widths(block, workload.config, placement.kept_width) for block in shape.kinds]
    # The inputs of a stage are kept while those of the stage before it are still there.
    widest = max((a + b for widths in found for a, b in pairwise([0, *widths])), default=0)
    nbytes = shape.itemsize * workload.windows * workload.seqlen * widest
    if placement.place == "gpu" or not workload.gpu:
        return nbytes, 0
    # torch caches pinned memory by size. On the device are one micro-batch that arrives and one in use.
    batches = -(-workload.windows // placement.batch)
    each = {pinned_bytes(tokens * width * shape.itemsize) for widths in found for width in widths}
    return min(nbytes, 2 * tokens * shape.itemsize * widest), batches * sum(each)


def _cross_bytes(stage: Sequence[LayerShape], dense: bool) -> int:
    """Count the bytes of a stage's cross matrices. Layers that do not write to the stream share one of (d, d)."""
    if not dense or stage[0].experts:
        return 0
    watched = any(layer.role.input is None for layer in stage)
    own = [layer.rows for layer in stage if watched or layer.role.write]
    shared = stage[0].d if len(own) < len(stage) else 0
    return 4 * stage[0].d * (sum(own) + shared)


def _block_peaks(
    block: BlockShape, shape: ModelShape, workload: Workload, placement: Placement, tokens: int
) -> tuple[int, int]:
    """Count the bytes of measuring a block's layers, and of solving them; both with Gram and cross matrices."""
    config = workload.config
    forward = forward_bytes(block, shape, workload.seqlen, tokens)
    measure, solve = forward, 0
    for method in config.methods if block.layers else ():
        dense = config.dense_target(method)
        # With the dense target stages are measured one after the other, else all in one pass.
        for group in [[stage] for stage in block.stages] if dense else [block.stages]:
            matrices = entries = 0
            for stage in group:
                d, rows = stage[0].d, sum(layer.rows for layer in stage)
                matrices += 4 * d * d * stage[0].count + _cross_bytes(stage, dense)
                # With the dense target: inputs and outputs of both models, and their gaps. Else: inputs alone.
                entries += 3 * (d + rows) if dense and not stage[0].experts else d * stage[0].inputs_per_token
            measure = max(measure, matrices + tokens * shape.itemsize * entries + forward)
            solve = max(solve, matrices + max(_solve_bytes(stage, workload, placement, method) for stage in group))
    return measure, solve


def _solve_bytes(stage: Sequence[LayerShape], workload: Workload, placement: Placement, method: str) -> int:
    """Count the bytes of a stage's solve by a method, besides its Gram and cross matrices."""
    config, d, gpu, properties = workload.config, stage[0].d, workload.gpu, METHODS[method]
    dense, stacked = config.dense_target(method), config.rows_independent(method)
    largest = rows = max(layer.rows for layer in stage)
    if stacked:
        ranks = workload.ranks if config.rows_shared(method) and not stage[0].experts else 1
        # The largest share of a rank, see `ranks.shares`.
        rows = _up_to(sum(layer.rows for layer in stage), ROW_UNIT * ranks) // ranks
        state = min(placement.solver, BYTES_PER_ENTRY * rows * d)
    elif properties.rows_independent:
        # The whole matrix has one budget, so it is solved in one piece.
        state = BYTES_OF_WHOLE * rows * d
    else:
        # SparseGPT: first the Gram matrix is factored and inverted; then the factor stays while weights are removed.
        state = max(12 * d * d, 4 * d * d + BYTES_OF_SWEEP * rows * d)
    # The damped Gram matrix; and the Gram matrix as a sum of two bf16 matrices, for exact products.
    damped = 2 if gpu and config.precision == "bf16" and config.refit and properties.refits else 4
    terms = 4 if gpu and config.precision in ("tf32", "bf16") else 0
    matrices = d * d * (damped * properties.damps(config) + terms)
    # Of an entry: weight, target gap, and the masks of --keep-zeros and of another warm start.
    entry = (2 if gpu else 4) + 4 * (dense and not config.refit) + config.keep_zeros + bool(properties.saliency)
    # Saliencies come after the cross matrices are freed.
    saliencies = max(0, 4 * rows * d - stacked * _cross_bytes(stage, dense))
    before = BYTES_OF_SALIENCY if config.rows_shared(method) else BYTES_OF_BUDGETS
    return matrices + rows * d * entry + saliencies + max(state, before * min(rows, largest) * d)


def _up_to(n: int, unit: int) -> int:
    """Round up to a multiple of a unit."""
    return -(-n // unit) * unit
