"""How much memory and disk a run takes at most: the run keeps to it, and the plan prints it.

Weights are held a block at a time, Gram and cross matrices a stage at a time, the state of a solve a chunk of rows at a
time. Activations are held a micro-batch at a time where they are used, and of all windows where they are placed. What a
forward takes is counted when the shapes are found. On a machine without a GPU all of it is on the host. Of several
ranks, all of this is what the one with the most takes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from sparsefw.checkpoint.quantization import BYTES_OF_CHUNK, CHUNK
from sparsefw.data.windows import reading_bytes
from sparsefw.estimate.gradients import forward_bytes, reconstruction_bytes, recovery_bytes
from sparsefw.estimate.shapes import BlockShape, LayerShape, ModelShape
from sparsefw.estimate.workload import Workload
from sparsefw.kernels.cpu import MIRRORED
from sparsefw.memory import pinned_bytes
from sparsefw.model import Placement
from sparsefw.solver.config import METHODS, PruneConfig
from sparsefw.solver.stack import BYTES_PER_ENTRY, ROW_UNIT, cpu_rows

GIB = 2**30

# Share of the tensors' bytes that is expected beside them, on a GPU and on a CPU. On a GPU torch keeps to the limit; a
# full host is no error that a run could go on from.
GPU_MARGIN, CPU_MARGIN = 0.05, 0.15

# Code and buffers of a CPU's libraries, bytes; and the code that oneDNN generates for products in half precision, of
# all the numbers of tokens that experts are sent.
LIBRARIES, CODE_OF_EXPERTS = 2**26, 2**29

# Memory of a solve for each entry of a layer that is solved as a whole, by Frank-Wolfe and by SparseGPT; and before a
# solve, to choose budgets, or for saliencies: of the whole matrix, and of rows that ranks may share.
BYTES_OF_WHOLE, BYTES_OF_SWEEP, BYTES_OF_BUDGETS = 48, 20, 23
BYTES_OF_SALIENCY = {False: 12, True: 4}

# To sample a token: logits, likelihoods in order and their sums, for each entry of the vocabulary.
BYTES_OF_SAMPLING = 40


def stages(layers: Iterable[LayerShape]) -> list[list[LayerShape]]:
    """The layers by stage, in the order of use: layers that read one input, whatever is used between them."""
    by_gram: dict[str, list[LayerShape]] = {}
    for layer in layers:
        by_gram.setdefault(layer.gram, []).append(layer)
    return list(by_gram.values())


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
    most = max(workload.windows, *workload.evaluation, 0)
    tokens = min(placement.batch, most) * workload.seqlen
    block = max(b.nbytes for b in blocks)
    weights = block * (1 + (config.uses_dense_target or len(config.methods) > 1))
    kept, kept_on_host = _kept_bytes(blocks, shape, workload, placement, tokens)
    logits = (workload.seqlen if shape.by_window else tokens) * shape.vocabulary * (shape.itemsize + 8)
    # Weights go to a GPU through pinned host memory.
    passing = _outside_pinned(shape) if workload.gpu else 0
    others = _other_blocks(shape, workload, placement)
    # All tensors outside of the blocks are written at the end, piece by piece. They are not loaded for it.
    piece = max(shape.pieces, default=0) + shape.quantized
    forward = max(forward_bytes(b, shape, workload.seqlen, tokens) for b in blocks)
    # Beside what is loaded, a chunk of its entries is dequantized.
    chunk = min(CHUNK["cuda"], block // shape.itemsize) if workload.gpu and shape.quantized else 0
    quantized = shape.quantized + BYTES_OF_CHUNK * chunk
    # Beside a block while it is loaded. Tensors are dequantized before they are joined.
    loading = max(quantized, shape.joined)
    peaks = [_stages_of_block(b, shape, workload, placement, tokens) for b in blocks]
    calibrate, solve = map(max, zip(*peaks, strict=True))
    end = shape.outside + max(logits if workload.evaluation else 0, quantized)
    # By phase: on the device, and on the host beside it.
    phases = {
        "start": (shape.outside + blocks[0].nbytes + max(forward, loading), passing),
        "calibrate": (weights + max(loading, kept + calibrate), others + kept_on_host),
        "solve": (weights + kept + solve, others + kept_on_host),
    }
    if config.reconstruct:
        of_step = min(placement.step or placement.batch, most) * workload.seqlen
        # The loss of a micro-batch that is held out: its hidden states and those of the dense model four times in fp32.
        loss = max(forward, 16 * tokens * shape.hidden) + 2 * tokens * shape.hidden * shape.itemsize
        work = config.pattern, workload.seqlen, of_step, loss, workload.gpu
        fitted = max(b.nbytes + reconstruction_bytes(b, shape, *work) for b in blocks)
        phases["reconstruct"] = fitted, others + passing
    phases["write"] = weights, others
    phases["end"] = end, max(passing, piece) if workload.gpu else max(0, piece - end)
    near, far = _activations(shape, workload, placement)
    process = _process(shape, workload)
    # One rank reads the texts of all.
    read = [workload.ranks * n for n in (workload.windows, *workload.evaluation)]
    texts = reading_bytes(read[0], read[1:], workload.seqlen)
    needs = {"texts": (0, workload.process + texts)}
    margin = 1 + (GPU_MARGIN if workload.gpu else CPU_MARGIN)
    if workload.written:
        # Before anything lies between blocks. Two of them are on their way to a GPU.
        state = workload.seqlen * shape.cache + BYTES_OF_SAMPLING * shape.vocabulary
        device = int(margin * (shape.whole + loading + workload.written * state))
        host = workload.process + (passing + 2 * block if workload.gpu else device)
        needs["generate"] = (device + workload.held if workload.gpu else 0, host)
    for phase, (on_device, on_host) in phases.items():
        device, host = int(margin * (on_device + near)), int(margin * (on_host + far)) + process
        needs[phase] = (device + workload.held, host) if workload.gpu else (0, device + host)
    return MemoryNeeds(needs)


def recovery_needs(shape: ModelShape, workload: Workload) -> MemoryNeeds:
    """What a recovery takes: the windows behind the dense blocks, on the host, beside a step of all blocks together."""
    step = recovery_bytes(shape, workload.config.pattern, workload.seqlen, workload.gpu)
    nbytes = pinned_bytes if workload.gpu else int
    states = workload.windows * sum(nbytes(x.nbytes(workload.seqlen)) for x in shape.between)
    if not workload.gpu:
        return MemoryNeeds({"recover": (0, _process(shape, workload) + int((1 + CPU_MARGIN) * (states + step)))})
    # Weights on their way to the GPU, or from there.
    passing = 2 * pinned_bytes(max(b.nbytes for b in shape.blocks)) + _outside_pinned(shape)
    device, host = (int((1 + GPU_MARGIN) * n) for n in (step, states + passing))
    return MemoryNeeds({"recover": (device + workload.held, host + workload.process)})


def _process(shape: ModelShape, workload: Workload) -> int:
    """Bytes of the process, with a CPU's libraries."""
    sent = any(layer.experts for b in shape.blocks for layer in b.all_layers)
    return workload.process + (not workload.gpu) * (LIBRARIES + CODE_OF_EXPERTS * (sent and shape.itemsize == 2))


def disk_space(shape: ModelShape, workload: Workload, placement: Placement) -> dict[str, int]:
    """Bytes on the disk: "output"; "kept", the blocks of compared methods until the end; and "activations".

    Activations are those of all ranks.
    """
    inside = int(shape.written * sum(block.nbytes for block in shape.blocks))
    return {
        "output": inside + sum(shape.pieces),
        "kept": (len(workload.config.methods) - 1) * inside,
        "activations": workload.ranks * activation_bytes(shape, workload) if placement.place == "file" else 0,
    }


def activation_bytes(shape: ModelShape, workload: Workload) -> int:
    """All that lies between two blocks, of a rank's windows, of every method and, where it is used, the dense model."""
    of_window = sum(x.nbytes(workload.seqlen) for x in shape.between)
    return of_window * sum(windows * streams for windows, streams in _streams(workload))


def keepable_widths(shape: ModelShape, workload: Workload) -> set[int]:
    """Widths of the inputs that can be kept."""
    return {width for block in dict.fromkeys(shape.blocks) for width in _keepable(block, workload.config)} - {0}


def _keepable(block: BlockShape, config: PruneConfig) -> list[int]:
    """By stage of a block, the width of its input; 0 where it is not kept, as in `driver.block`."""
    order = stages(block.layers)
    widths = [stage[0].d if config.uses_dense_target and stage[0].role.keepable else 0 for stage in order]
    return [*widths[:-1], 0] if config.goes_back and widths else widths


def _streams(workload: Workload) -> list[tuple[int, int]]:
    """For the calibration text and each evaluation text, a rank's windows, and the number of streams with them."""
    config, methods = workload.config, len(workload.config.methods)
    calibration = workload.windows, methods + config.uses_dense_stream + config.goes_back
    return [calibration, *((windows, methods + 1) for windows in workload.evaluation)]


def _activations(shape: ModelShape, workload: Workload, placement: Placement) -> tuple[int, int]:
    """Bytes of what lies between two blocks on the device, and on the host beside it."""
    sizes, texts = [x.nbytes(workload.seqlen) for x in shape.between], _streams(workload)
    everything = kept = activation_bytes(shape, workload)
    batch = min(placement.batch, max(windows for windows, _ in texts))
    # Of a list that is read, one micro-batch is on its way in, and two are inputs of launched work: the next one is
    # launched before the last one is checked. Two more are on their way out. Where the dense model's list is read, too,
    # nothing goes out meanwhile; a list at rest may hold one that was read ahead.
    moving = min(everything, (7 if workload.config.uses_dense_stream else 5) * batch * sum(sizes))
    if workload.gpu:
        # Every micro-batch is a pinned tensor.
        batches = sum(streams * -(-windows // batch) for windows, streams in texts)
        kept = batches * sum(pinned_bytes(batch * n) for n in sizes)
    return {"gpu": (everything, 0), "host": (moving, kept), "file": (moving, moving)}[placement.place]


def _kept_bytes(
    blocks: list[BlockShape], shape: ModelShape, workload: Workload, placement: Placement, tokens: int
) -> tuple[int, int]:
    """Bytes on the device and on the host beside it of inputs that are kept for the next run of the windows."""
    widest = 0
    for block in blocks:
        widths = [d if d <= placement.kept_width else 0 for d in _keepable(block, workload.config)]
        # A stage's inputs, and those of the stage before.
        widest = max([widest, *(a + b for a, b in pairwise([0, *widths]))])
    entries = workload.windows * workload.seqlen * widest
    if placement.place == "gpu" or not workload.gpu:
        return shape.itemsize * entries, 0
    # Every micro-batch is a pinned tensor, and torch keeps its memory for the next tensor of this size. One micro-batch
    # is on its way to the GPU, and one is at work.
    batches = -(-workload.windows // placement.batch)
    widths = [width for width in keepable_widths(shape, workload) if width <= placement.kept_width]
    far = sum(batches * pinned_bytes(tokens * width * shape.itemsize) for width in widths)
    return shape.itemsize * min(entries, 2 * tokens * widest), far


def _outside_pinned(shape: ModelShape) -> int:
    """Pinned memory that the tensors outside of the blocks are read into: embeddings, a head, and little else."""
    table = shape.vocabulary * shape.hidden * shape.itemsize or shape.outside or 1
    return shape.outside // table * pinned_bytes(table) + shape.outside % table


def _other_blocks(shape: ModelShape, workload: Workload, placement: Placement) -> int:
    """Bytes of blocks on the host beside the one at work: the next one, the one being written, and compared ones."""
    block, methods = max(b.nbytes for b in shape.blocks), len(workload.config.methods)
    if not workload.gpu:
        return block * (min(placement.ahead + 1, len(shape.blocks) - 1) + methods - 1)
    pinned = 0
    for b in dict.fromkeys(shape.blocks):
        sizes = [layer.rows * layer.d * shape.itemsize for layer in b.all_layers for _ in range(layer.experts or 1)]
        pinned = max(pinned, sum(map(pinned_bytes, sizes)) + max(0, b.nbytes - sum(sizes)))
    # torch keeps the pinned memory of a block for the next one. Those that come one after another have the same.
    return pinned * (methods + placement.ahead)


def _cross_bytes(stage: Sequence[LayerShape], dense: bool) -> int:
    """Cross matrices of a stage; layers that do not write to the stream share a square one."""
    if not dense or stage[0].experts:
        return 0
    watched = any(layer.role.input is None for layer in stage)
    rows = [layer.rows for layer in stage if watched or layer.role.write]
    return 4 * stage[0].d * (sum(rows) + stage[0].d * (len(rows) < len(stage)))


def _stages_of_block(
    block: BlockShape, shape: ModelShape, workload: Workload, placement: Placement, tokens: int
) -> tuple[int, int]:
    """To calibrate a block and to solve it: Gram and cross matrices with what they are made of, and with a solve."""
    config, forward = workload.config, forward_bytes(block, shape, workload.seqlen, tokens)
    order = stages(block.layers)
    # All stages are watched at once to find them.
    watched = sum(s[0].d * s[0].parts + sum(x.rows for x in s) for s in order)
    calibrate, solve = forward + tokens * shape.itemsize * watched * config.uses_dense_target, 0
    for method in config.methods if order else ():
        dense = config.dense_target(method)
        # Stages that approximate the dense model are measured one by one, others all at once.
        for group in [[s] for s in order] if dense else [order]:
            # A Gram matrix each, or one for each expert.
            matrices = sum(4 * s[0].d ** 2 * max(1, s[0].experts) + _cross_bytes(s, dense) for s in group)
            # Inputs; of both models with outputs, and the gaps between them.
            entries = [3 * (s[0].d + sum(x.rows for x in s)) if dense and not s[0].experts else s[0].d * s[0].parts
                       for s in group]  # fmt: skip
            # On a CPU operands are made in fp32, while the rest of the block runs or afterwards; then Gram matrices
            # are mirrored, by pieces.
            widest = max(s[0].d for s in group)
            operands = 4 * tokens * (widest + dense * max(layer.rows for s in group for layer in s))
            operands = 0 if workload.gpu else max(operands, 12 * min(widest, MIRRORED) ** 2)
            calibrate = max(calibrate, matrices + tokens * shape.itemsize * sum(entries) + max(forward, operands))
            solve = max(solve, matrices + max(_solve(s, workload, placement, method, dense) for s in group))
    return calibrate, solve


def _solve(stage: Sequence[LayerShape], workload: Workload, placement: Placement, method: str, dense: bool) -> int:
    """The solve of a stage by a method, beside its Gram and cross matrices."""
    config, d, gpu = workload.config, stage[0].d, workload.gpu
    low = gpu and config.precision == "bf16"
    stacked = config.rows_independent(method)
    rows = -(-sum(layer.rows for layer in stage) // ROW_UNIT) * ROW_UNIT
    if not stacked:
        rows = max(layer.rows for layer in stage)
    elif not stage[0].experts and config.rows_shared(method):
        # The most that one rank has, see `ranks.shares`.
        rows = -(-rows // (ROW_UNIT * workload.ranks)) * ROW_UNIT
    # The damped Gram matrix; and the Gram matrix as two bf16 terms, for exact products.
    matrices = (2 if low and config.refit else 4) * d * d * METHODS[method].dense_target
    matrices += 4 * d * d * (gpu and config.precision in ("tf32", "bf16"))
    # Weights; saliencies, when the cross matrices have gone; the gap to the targets; weights that may be nonzero.
    copies = rows * d * (2 if gpu else 4) + max(0, 4 * rows * d - stacked * _cross_bytes(stage, dense))
    copies += rows * d * (4 * (dense and not config.refit) + config.keep_zeros)
    if stacked:
        state = BYTES_PER_ENTRY * d * _rows_at_once(rows, d, workload, placement.solver)
    elif METHODS[method].rows_independent:
        # One budget for the whole matrix.
        state = BYTES_OF_WHOLE * rows * d
    else:
        # The Gram matrix is decomposed and inverted, and the factor is there while weights are removed.
        state = max(12 * d * d, 4 * d * d + BYTES_OF_SWEEP * rows * d)
    before = BYTES_OF_BUDGETS if config.pattern.scope == "layer" else BYTES_OF_SALIENCY[config.rows_shared(method)]
    return matrices + copies + max(state, before * min(rows, max(layer.rows for layer in stage)) * d)


def _rows_at_once(rows: int, d: int, workload: Workload, memory: int) -> int:
    """The most rows that are solved at once, on all threads together, with this memory for their state."""
    rows = min(rows, max(ROW_UNIT, memory // (BYTES_PER_ENTRY * d) // ROW_UNIT * ROW_UNIT))
    threads = torch.get_num_threads() if workload.config.kernel == "torch" else 1
    return rows if workload.gpu else min(rows, threads * cpu_rows(d))


def solver_bytes(shape: ModelShape, workload: Workload, memory: int) -> int:
    """Bytes that the state of one solve takes of `memory`: no layer has more rows to solve at once."""
    # Each thread has as many rows.
    threads = ROW_UNIT * (1 if workload.gpu else torch.get_num_threads())
    sizes = [
        BYTES_PER_ENTRY * stage[0].d * (-(-_rows_at_once(rows, stage[0].d, workload, memory) // threads) * threads)
        for block in dict.fromkeys(shape.blocks)
        for stage in stages(block.layers)
        if (rows := -(-sum(layer.rows for layer in stage) // ROW_UNIT) * ROW_UNIT)
    ]
    return min(memory, max(sizes, default=memory))
