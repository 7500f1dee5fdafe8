"""Count the memory and the disk that a run takes at most. The run keeps to it, and the plan prints it.

In memory are the weights of one block, Gram and cross matrices of one stage, and the state of a solve for a chunk of
rows. Activations of one micro-batch are where they are used, those of all windows where they are placed. What a forward
takes is counted when the shape of the model is found. Without a GPU all of it is on the host. Of several ranks, the one
with most windows counts.
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
from sparsefw.model import Placement
from sparsefw.solver.config import METHODS, PruneConfig
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT, cpu_rows

GIB = 2**30

# Share of the tensors' bytes that is added to them, on a GPU and on a CPU. On a GPU torch keeps to the limit. A run
# cannot go on when the host is full.
GPU_MARGIN, CPU_MARGIN = 0.05, 0.15

# Bytes of the code and the buffers of a CPU's libraries; and of the code that oneDNN generates for products in half
# precision, for each number of tokens that experts are sent.
LIBRARIES, CODE_OF_EXPERTS = 2**26, 2**29

# Bytes of a solve for each entry of a layer that is solved as a whole, by Frank-Wolfe and by SparseGPT.
BYTES_OF_WHOLE, BYTES_OF_SWEEP = 48, 20
# Bytes before a solve for each entry of a layer: saliencies of rows that ranks may share; and saliencies of a whole
# matrix, with the choice of budgets.
BYTES_OF_SALIENCY, BYTES_OF_BUDGETS = 4, 23

# Bytes for each entry of the vocabulary to sample a token: logits, likelihoods in order and their sums.
BYTES_OF_SAMPLING = 40


@dataclass(frozen=True)
class MemoryNeeds:
    """Bytes at the peak.

    Attributes:
        phases: (bytes on the GPU, bytes on the host) by phase; without a GPU the first is 0.
    """

    phases: dict[str, tuple[int, int]]

    @property
    def gpu(self) -> int:
        """Return the bytes on the GPU."""
        return max(gpu for gpu, _ in self.phases.values())

    @property
    def host(self) -> int:
        """Return the bytes on the host."""
        return max(host for _, host in self.phases.values())


def memory_needs(shape: ModelShape, workload: Workload, placement: Placement) -> MemoryNeeds:
    """Count the peaks of a run; of several ranks, those of the one that takes most.

    Args:
        shape: shape of the model, with the layers that are pruned.
        workload: the work.
        placement: what is held at once, and where.
    """
    config, gpu, seqlen = workload.config, workload.gpu, workload.seqlen
    tokens = min(placement.batch, workload.most_windows) * seqlen
    weights = shape.largest * (2 if config.uses_dense_target or len(config.methods) > 1 else 1)
    forward = max(forward_bytes(block, shape, seqlen, tokens) for block in shape.kinds)
    loading = _loading_bytes(shape, gpu)
    # Weights go to a GPU through pinned memory of the host.
    passing = _outside_pinned(shape) if gpu else 0
    others = _other_blocks(shape, workload, placement)
    kept, kept_on_host = _kept_inputs(shape, workload, placement, tokens)
    peaks = [_block_peaks(block, shape, workload, placement, tokens) for block in shape.kinds]
    measure, solve = map(max, zip(*peaks, strict=True))
    # By phase: bytes on the device, and bytes on the host besides.
    phases = {
        "start": (shape.outside + shape.blocks[0].nbytes + max(forward, loading), passing),
        "calibrate": (weights + max(loading, kept + measure), others + kept_on_host),
        "solve": (weights + kept + solve, others + kept_on_host),
    }
    if config.reconstruct:
        of_step = min(placement.step or placement.batch, workload.most_windows) * seqlen
        # To measure the loss, hidden states of a micro-batch in both models are there, and four copies in fp32.
        loss = max(forward, 16 * tokens * shape.hidden) + 2 * tokens * shape.hidden * shape.itemsize
        fit = config.pattern, seqlen, of_step, loss, gpu
        fitted = max(block.nbytes + reconstruction_bytes(block, shape, *fit) for block in shape.kinds)
        phases["reconstruct"] = fitted, others + passing
    logits = (seqlen if shape.by_window else tokens) * shape.vocabulary * (shape.itemsize + 8)
    end = shape.outside + max(logits if workload.evaluation else 0, loading)
    # The tensors outside of the blocks are written at the end, piece by piece. They are not loaded for it.
    piece = max(shape.pieces, default=0) + shape.quantized_bytes
    phases["end"] = end, max(passing, piece) if gpu else max(0, piece - end)
    near, far = _activations(shape, workload, placement)
    # One rank reads the texts of all.
    read = [workload.ranks * n for n in (workload.windows, *workload.evaluation)]
    needs = {"texts": (0, workload.process + reading_bytes(read[0], read[1:], seqlen))}
    if workload.generated:
        # No activations are there yet. Two blocks are on their way to a GPU.
        state = seqlen * shape.cache + BYTES_OF_SAMPLING * shape.vocabulary
        on_device = shape.whole_bytes + loading + workload.generated * state
        needs["generate"] = _peak(shape, workload, on_device, passing + 2 * shape.largest if gpu else 0)
    for phase, (on_device, on_host) in phases.items():
        needs[phase] = _peak(shape, workload, on_device + near, on_host + far)
    return MemoryNeeds(needs)


def recovery_needs(shape: ModelShape, workload: Workload) -> MemoryNeeds:
    """Count what a recovery takes: a step of all blocks together, and the dense model's windows on the host."""
    nbytes = pinned_bytes if workload.gpu else int
    host = workload.windows * sum(map(nbytes, shape.window_bytes(workload.seqlen)))
    if workload.gpu:
        # Weights on their way to the GPU, or from there.
        host += 2 * pinned_bytes(shape.largest) + _outside_pinned(shape)
    step = recovery_bytes(shape, workload.config.pattern, workload.seqlen, workload.gpu)
    return MemoryNeeds({"recover": _peak(shape, workload, step, host)})


def disk_space(shape: ModelShape, workload: Workload, placement: Placement) -> dict[str, int]:
    """Count bytes on the disk: "output"; "kept", the blocks of compared methods until the end; and "activations".

    Activations are those of all ranks.
    """
    inside = int(shape.written_ratio * sum(block.nbytes for block in shape.blocks))
    return {
        "output": inside + sum(shape.pieces),
        "kept": (len(workload.config.methods) - 1) * inside,
        "activations": workload.ranks * _activation_bytes(shape, workload) if placement.place == "file" else 0,
    }


def kept_widths(block: BlockShape, config: PruneConfig, most: float = math.inf) -> list[int]:
    """List the widths of the inputs that the stages of a block keep for the next run of the windows; 0: none.

    Args:
        block: the block.
        config: how it is pruned.
        most: inputs of more entries than these are not kept, see `Placement.kept_width`.
    """
    if not config.uses_dense_target:
        return []
    widths = [stage[0].d if stage[0].role.cacheable and stage[0].d <= most else 0 for stage in block.stages]
    # A reconstruction begins at the block's input.
    return widths[:-1] if config.goes_back else widths


def state_bytes(shape: ModelShape, workload: Workload) -> int:
    """Count the bytes that the state of a solve takes where memory has no limit."""
    most, threads = 0, torch.get_num_threads() if workload.config.kernel == "torch" and not workload.gpu else 1
    for stage in (stage for block in shape.kinds for stage in block.stages):
        d, rows = stage[0].d, sum(layer.rows for layer in stage)
        if not workload.gpu:
            rows = min(rows, threads * cpu_rows(d))
        # Each thread has as many rows.
        most = max(most, BYTES_PER_ENTRY * d * _up_to(rows, threads * ROW_UNIT))
    return most


def _peak(shape: ModelShape, workload: Workload, on_device: int, on_host: int) -> tuple[int, int]:
    """Count the bytes of the GPU and of the host, with the process and a margin.

    Args:
        shape, workload: the model, and the work.
        on_device, on_host: bytes of tensors on the device, and of others on the host.
    """
    if workload.gpu:
        device, host = (int((1 + GPU_MARGIN) * nbytes) for nbytes in (on_device, on_host))
        return workload.held + device, workload.process + host
    libraries = LIBRARIES
    if shape.itemsize == 2 and any(layer.experts for block in shape.kinds for layer in block.all_layers):
        libraries += CODE_OF_EXPERTS
    return 0, workload.process + libraries + int((1 + CPU_MARGIN) * (on_device + on_host))


def _loading_bytes(shape: ModelShape, gpu: bool) -> int:
    """Count the bytes on the device of tensors as they are stored, while a block is made of them."""
    # They are dequantized by chunks, before they are joined.
    chunk = BYTES_OF_CHUNK * CHUNK["cuda" if gpu else "cpu"] if shape.quantized_bytes else 0
    return max(shape.quantized_bytes + chunk, shape.joined_bytes)


def _outside_pinned(shape: ModelShape) -> int:
    """Count the pinned memory of the tensors outside of the blocks: embeddings, a head, and little else."""
    table = shape.vocabulary * shape.hidden * shape.itemsize or shape.outside or 1
    return shape.outside // table * pinned_bytes(table) + shape.outside % table


def _other_blocks(shape: ModelShape, workload: Workload, placement: Placement) -> int:
    """Count the bytes of further blocks on the host: the next one, the one that is written, and compared ones."""
    methods = len(workload.config.methods)
    if not workload.gpu:
        return shape.largest * (min(placement.ahead + 1, len(shape.blocks) - 1) + methods - 1)
    pinned = 0
    for block in shape.kinds:
        sizes = [layer.rows * layer.d * shape.itemsize for layer in block.all_layers for _ in range(layer.count)]
        pinned = max(pinned, sum(map(pinned_bytes, sizes)) + max(0, block.nbytes - sum(sizes)))
    # torch keeps the pinned memory of a block for the next one.
    return pinned * (methods + placement.ahead)


def _streams(workload: Workload) -> list[int]:
    """List the windows of each stream: those of a text between two blocks of the dense model, or of a method's."""
    config, methods = workload.config, len(workload.config.methods)
    calibration = methods + config.uses_dense_stream + config.goes_back
    return [workload.windows] * calibration + [*workload.evaluation] * (methods + 1)


def _activation_bytes(shape: ModelShape, workload: Workload) -> int:
    """Count the bytes of all tensors between two blocks, of a rank's windows."""
    return sum(_streams(workload)) * sum(shape.window_bytes(workload.seqlen))


def _activations(shape: ModelShape, workload: Workload, placement: Placement) -> tuple[int, int]:
    """Count the bytes of the tensors between two blocks on the device, and on the host besides."""
    everything = _activation_bytes(shape, workload)
    if placement.place == "gpu":
        return everything, 0
    batch, sizes = min(placement.batch, workload.most_windows), shape.window_bytes(workload.seqlen)
    # Of the pruned model, one micro-batch is on its way in, two are at work and two on their way out. Of the dense
    # model, two are read.
    moving = min(everything, 7 * batch * sum(sizes))
    if placement.place == "file":
        return moving, moving
    if not workload.gpu:
        return moving, everything
    # Every tensor of a micro-batch is pinned by itself.
    batches = sum(-(-windows // batch) for windows in _streams(workload))
    return moving, batches * sum(pinned_bytes(batch * nbytes) for nbytes in sizes)


def _kept_inputs(shape: ModelShape, workload: Workload, placement: Placement, tokens: int) -> tuple[int, int]:
    """Count the bytes of kept inputs on the device, and on the host besides; `tokens` are those of a micro-batch."""
    found = [kept_widths(block, workload.config, placement.kept_width) for block in shape.kinds]
    # The inputs of a stage, and those of the stage before it.
    widest = max((a + b for widths in found for a, b in pairwise([0, *widths])), default=0)
    nbytes = shape.itemsize * workload.windows * workload.seqlen * widest
    if placement.place == "gpu" or not workload.gpu:
        return nbytes, 0
    # torch keeps the pinned memory of a micro-batch for the next one of its size. One is on its way, and one at work.
    batches = -(-workload.windows // placement.batch)
    each = {pinned_bytes(tokens * width * shape.itemsize) for widths in found for width in widths}
    return min(nbytes, 2 * tokens * shape.itemsize * widest), batches * sum(each)


def _cross_bytes(stage: Sequence[LayerShape], dense: bool) -> int:
    """Count the bytes of a stage's cross matrices. Layers that do not write to the stream share a square one."""
    if not dense or stage[0].experts:
        return 0
    watched = any(layer.role.input is None for layer in stage)
    own = [layer.rows for layer in stage if watched or layer.role.write]
    shared = stage[0].d if len(own) < len(stage) else 0
    return 4 * stage[0].d * (sum(own) + shared)


def _block_peaks(
    block: BlockShape, shape: ModelShape, workload: Workload, placement: Placement, tokens: int
) -> tuple[int, int]:
    """Count the bytes to measure the layers of a block, and to solve them, with their Gram and cross matrices."""
    config = workload.config
    forward = forward_bytes(block, shape, workload.seqlen, tokens)
    measure, solve = forward, 0
    for method in config.methods if block.layers else ():
        dense = config.dense_target(method)
        # Stages that approximate the dense model are measured one by one, others all at once.
        for group in [[stage] for stage in block.stages] if dense else [block.stages]:
            matrices = entries = 0
            for stage in group:
                d, rows = stage[0].d, sum(layer.rows for layer in stage)
                matrices += 4 * d * d * stage[0].count + _cross_bytes(stage, dense)
                # Inputs; or inputs and outputs of both models, and the gaps between them.
                entries += 3 * (d + rows) if dense and not stage[0].experts else d * stage[0].inputs_per_token
            measure = max(measure, matrices + tokens * shape.itemsize * entries + forward)
            solve = max(solve, matrices + max(_solve_bytes(stage, workload, placement, method) for stage in group))
    return measure, solve


def _solve_bytes(stage: Sequence[LayerShape], workload: Workload, placement: Placement, method: str) -> int:
    """Count the bytes of the solve of a stage by a method, besides its Gram and cross matrices."""
    config, d, gpu = workload.config, stage[0].d, workload.gpu
    dense, stacked = config.dense_target(method), config.rows_independent(method)
    largest = rows = max(layer.rows for layer in stage)
    if stacked:
        ranks = workload.ranks if config.rows_shared(method) and not stage[0].experts else 1
        # The most that one rank has, see `ranks.shares`.
        rows = _up_to(sum(layer.rows for layer in stage), ROW_UNIT * ranks) // ranks
        state = min(placement.solver, BYTES_PER_ENTRY * rows * d)
    elif METHODS[method].rows_independent:
        # One budget for the whole matrix.
        state = BYTES_OF_WHOLE * rows * d
    else:
        # The Gram matrix is decomposed and inverted, and the factor is there while weights are removed.
        state = max(12 * d * d, 4 * d * d + BYTES_OF_SWEEP * rows * d)
    # The damped Gram matrix; and the Gram matrix as two terms in bf16, for exact products.
    damped = 2 if gpu and config.precision == "bf16" and config.refit else 4
    terms = 4 if gpu and config.precision in ("tf32", "bf16") else 0
    matrices = d * d * (damped * METHODS[method].dense_target + terms)
    # Weights, the gap to the targets, and weights that may be nonzero; saliencies, when the cross matrices have gone.
    weights = rows * d * ((2 if gpu else 4) + 4 * (dense and not config.refit) + config.keep_zeros)
    saliencies = max(0, 4 * rows * d - stacked * _cross_bytes(stage, dense))
    before = BYTES_OF_SALIENCY if config.rows_shared(method) else BYTES_OF_BUDGETS
    return matrices + weights + saliencies + max(state, before * min(rows, largest) * d)


def _up_to(n: int, unit: int) -> int:
    """Round up to a multiple of a unit."""
    return -(-n // unit) * unit
