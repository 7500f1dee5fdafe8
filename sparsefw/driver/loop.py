"""The block loop: read, calibrate, prune, evaluate and write a model one block at a time.

For every block, the evaluation windows first run through the dense block. Then every method prunes the block on the
calibration windows, which have come through the blocks that the same method has pruned before, and runs all its windows
through the pruned block. The weights by the config's method are written. The next block is read and the last one
written meanwhile.

Blocks that an earlier run has finished are not pruned again. Their weights are read, and the windows run through them.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsefw.checkpoint.files import convert
from sparsefw.checkpoint.tensors import read_shard
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.windows import Windows
from sparsefw.driver.block import Run, kept_dense, prune_block, unused_matrices
from sparsefw.driver.job import Samples
from sparsefw.driver.reconstruct import reconstruct
from sparsefw.errors import InputError
from sparsefw.memory import give_back, peak_memory, release_pinned
from sparsefw.model import HiddenStates, perplexity
from sparsefw.model.activations import held_out_batches
from sparsefw.model.forward import embed_batches
from sparsefw.model.slots import DenseBlock
from sparsefw.report import log
from sparsefw.report.content import BlockRecord
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import WRITE

# Name of the hidden states in the dense model.
DENSE = "dense"

# Is called with a finished block and the results of its layers.
OnBlock = Callable[[BlockRecord, list[LayerResult]], None]

# Tensors of a block on the host by method, then by their names in the checkpoint.
Written = dict[str, dict[str, Tensor]]


@dataclass
class FinishedBlock:
    """What a run that goes on has to know of a block, on the disk with it.

    Attributes:
        block: its name, seconds and memory.
        layers: a result for each layer and method.
        kept_dense: names of the matrices that the method whose weights are written left dense.
    """

    block: BlockRecord
    layers: list[LayerResult] = field(default_factory=list)
    kept_dense: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """Measurements of a run.

    Attributes:
        finished: the blocks. Those that an earlier run finished are as that run measured them.
        unused: names of the matrices in blocks that the model does not run through.
        perplexity: by evaluation text, then by "dense" and by method; empty without evaluation.
    """

    finished: list[FinishedBlock]
    unused: list[str]
    perplexity: dict[str, dict[str, float]]


@dataclass(frozen=True)
class _States:
    """Hidden states, by method and "dense".

    Attributes:
        calibration: of the calibration.
        evaluation: of every evaluation text.
        ids: the tokens of the calibration windows; None: the calibration is no text.
    """

    calibration: dict[str, HiddenStates]
    evaluation: dict[str, list[HiddenStates]]
    ids: Tensor | None

    def of(self, name: str) -> list[HiddenStates]:
        """All of a method, or of "dense"."""
        return [*([self.calibration[name]] if name in self.calibration else []), *self.evaluation[name]]

    def alike(self) -> list[list[HiddenStates]]:
        """Those of the same windows, which are equal up to the first block that is pruned."""
        return [[*self.calibration.values()], *map(list, zip(*self.evaluation.values(), strict=True))]


def prune_model(
    run: Run,
    calibration: Samples,
    evaluation: Sequence[Samples],
    writer: Writer,
    on_block: OnBlock = lambda block, layers: None,
) -> Outcome:
    """Prune every block of a model.

    Args:
        run: the model, and how it is pruned: by every method of the config, each on the activations of its own blocks.
        calibration: windows or batches whose activations define the layer problems.
        evaluation: those of each evaluation text.
        writer: receives a shard for each block and each piece of the rest. The run goes on after those that it has.
        on_block: called with the record and the results of every block when it is finished.

    Raises:
        InputError: weights or activations hold NaN or Inf, a layer does not fit the pattern, nothing was
            pruned, or writing failed.
    """
    model, timeline, names = run.model, run.model.timeline, [DENSE, *run.config.methods]
    with ExitStack() as open_states:
        with timeline.span("embed"), model.outside():
            calibration, *evaluation = (x.part(run.ranks.share(x.n)) for x in (calibration, *evaluation))
            # Steps of a reconstruction take pieces of the micro-batches; the last piece may be smaller.
            step = run.placement.step
            pieces = [calibration.part(slice(n)) for n in {step, calibration.n % step} - {0}] if step else []
            calibrated = _embed(run, calibration, names[not run.config.uses_dense_stream :], pieces)
            evaluated = [_embed(run, samples, names) for samples in evaluation]
        ids = calibration.ids if isinstance(calibration, Windows) else None
        states = _States(calibrated, {name: [by_name[name] for by_name in evaluated] for name in names}, ids)
        for name in names:
            for hidden_states in states.of(name):
                open_states.callback(hidden_states.close)
        finished = _prune_blocks(run, states, writer, on_block)
        if run.shape.layer_names and not any(block.layers for block in finished):
            raise InputError(
                "nothing was pruned: no calibration token reaches the selected experts; give more calibration windows, "
                "or select other layers"
            )
        with timeline.span("evaluate"), model.outside():
            perplexities = {
                samples.source: {name: perplexity(x, samples, run.ranks) for name, x in by_name.items()}
                for samples, by_name in zip(evaluation, evaluated, strict=True)
            }
        return Outcome(finished, unused_matrices(model), perplexities)


def _embed(run: Run, samples: Samples, names: Sequence[str], pieces: Sequence[Samples] = ()) -> dict[str, HiddenStates]:
    """The hidden states of samples before the first block, by name; `pieces` are of the sizes that steps take."""
    batch, store = run.placement.batch, run.placement.store(run.model.device)
    states = embed_batches(run.model, samples.split(batch), store, (x for piece in pieces for x in piece.split(batch)))
    return {name: states.fork() if n else states for n, name in enumerate(names)}


def _prune_blocks(run: Run, states: _States, writer: Writer, on_block: OnBlock) -> list[FinishedBlock]:
    model, timeline, done = run.model, run.model.timeline, len(writer.finished)
    records = writer.finished[: len(model.unique_blocks)]
    finished = [convert(FinishedBlock, record, "the record of a finished block: ") for record in records]
    # Repeats are not written. Those before the next block that is can be run.
    begin = [*model.unique_blocks, len(model.blocks)][len(finished)]
    for i in range(begin):
        _replay(run, i, states, writer)
        run.say(log.block_row(model.names[i], i + 1, len(model.blocks)))
        once = FinishedBlock(BlockRecord(i, model.names[i], "", {}, 0, 0))
        found = finished[model.unique_blocks.index(i)] if i in model.unique_blocks else once
        on_block(found.block, found.layers)
    pruned = [i for i in range(len(model.blocks)) if run.selected(i)] or [0]
    first, started = max(begin, pruned[0]), time.perf_counter()
    with ThreadPoolExecutor(1) as background:
        written: Future[None] | None = None
        for i in range(begin, len(model.blocks)):
            make = _prune_block if pruned[0] <= i <= pruned[-1] else _pass_block
            if i == first:
                started = time.perf_counter()
            record, tensors = make(run, i, states, writer)
            # Blocks that nothing is pruned in take little.
            left = (pruned[-1] - i) * (time.perf_counter() - started) / (i + 1 - first) if i >= first else 0.0
            reconstruction = record.block.reconstruction
            run.say(log.block_row(model.names[i], i + 1, len(model.blocks), max(left, 0.0), reconstruction))
            if i not in model.unique_blocks:
                on_block(record.block, record.layers)
                continue
            shard = model.unique_blocks.index(i)
            with timeline.span("wait", i):
                if written and writer.writes(shard):
                    written.result()
            peaks = run.ranks.gather(peak_memory())
            measured: dict[str, Any] = {name: max(peak[name] for peak in peaks) for name in peaks[0]}
            record.block = replace(record.block, seconds=timeline.seconds(i), **measured)
            # Each rank writes some of the records. All are those of rank 0, which reports runs that go through.
            record = run.ranks.broadcast_object(record)
            if writer.writes(shard):
                cuda = model.device.type == "cuda"
                copied = torch.cuda.current_stream(model.device).record_event() if cuda else None
                written = background.submit(_write, run, writer, shard, tensors, record, copied)
                if not run.placement.ahead:
                    written.result()
            del tensors
            give_back()
            finished.append(record)
            on_block(record.block, record.layers)
        with timeline.span("wait"):
            if written:
                written.result()
    release_pinned()
    for shard, names in enumerate(model.pieces, len(model.unique_blocks)):
        if shard >= done and writer.writes(shard):
            with timeline.span("write"):
                writer.write(shard, model.other_tensors(names))
            # Tensors that are small enough for the C library to keep would lie beside the next ones.
            give_back()
    return finished


def _prune_block(run: Run, i: int, states: _States, writer: Writer) -> tuple[FinishedBlock, Written]:
    """Prune block i by every method, and run all windows through it.

    Returns:
        The block's record, and its tensors; none where another rank writes them.
    """
    model, timeline, config = run.model, run.model.timeline, run.config
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    block = model.open(i, run.placement.ahead)
    with timeline.span("read", i):
        # A copy, only if the dense block is needed after it has been pruned.
        dense = DenseBlock(block) if config.uses_dense_target or len(config.methods) > 1 else None
    _advance(run, i, "evaluate", states.evaluation[DENSE])
    if config.uses_dense_stream and not config.uses_dense_target:
        # No stage will move them on.
        _advance(run, i, "reconstruct", [states.calibration[DENSE]])
    record, tensors = FinishedBlock(BlockRecord(i, model.names[i], "", {}, 0, 0)), Written()
    for method in config.methods:
        if dense and method != config.methods[0]:
            with torch.no_grad():
                for parameter, before in zip(block.parameters(), dense.parameters(), strict=True):
                    parameter.copy_(before)
        own, pruned = method == config.method, states.calibration[method]
        reference = None
        if dense and config.uses_dense_target and method == "sparsefw":
            reference = dense, states.calibration[DENSE]
        # Stages move the windows on inside the block, and a reconstruction runs from its input.
        start = pruned.fork() if own and config.goes_back else None
        # The loss on what is held out tells what a reconstruction is worth only if no layer was fitted to it, either.
        held_out = held_out_batches(len(pruned)) if own and config.reconstruct else ()
        results, way = prune_block(run, i, method, pruned, reference, held_out)
        record.layers += results
        if own:
            # It is the last method: nothing needs the dense block any more.
            dense = reference = None
            # Tokens may reach other experts in the model of another method, which is not written.
            record.kept_dense = kept_dense(model, i, results)
            record.block = replace(record.block, way=way)
            if config.reconstruct:
                with timeline.span("reconstruct", i):
                    if start is not None:
                        pruned.go_back(start)
                    found = reconstruct(run, i, pruned, states.calibration[DENSE], results, states.ids)
                if found:
                    record.block = replace(record.block, reconstruction=found)
        model.round(i)
        _advance(run, i, "forward", [pruned])
        _advance(run, i, "evaluate", states.evaluation[method])
        if i in model.unique_blocks and writer.writes(model.unique_blocks.index(i)):
            with timeline.span("write", i):
                tensors[method] = model.block_tensors(i)
                if not own and model.device.type == "cpu":
                    # The next method overwrites the block's memory.
                    tensors[method] = {name: tensor.clone() for name, tensor in tensors[method].items()}
    model.close(i)
    return record, tensors


def _pass_block(run: Run, i: int, states: _States, writer: Writer) -> tuple[FinishedBlock, Written]:
    """As `_prune_block`, for a block before the first one that is pruned, or behind the last one."""
    model, methods = run.model, run.config.methods
    model.open(i, run.placement.ahead)
    if not any(map(run.selected, range(i, len(model.blocks)))):
        # Nothing is measured any more.
        while states.calibration:
            states.calibration.popitem()[1].close()
    for n, streams in enumerate(states.alike()):
        # Behind the last one each method has its own windows.
        moving = streams[:1] if states.calibration else streams
        _advance(run, i, "evaluate" if n else "forward", moving)
        for other in streams[len(moving) :]:
            other.go_back(streams[0].fork())
    tensors = Written()
    if i in model.unique_blocks and writer.writes(model.unique_blocks.index(i)):
        with model.timeline.span("write", i):
            tensors = dict.fromkeys(methods, model.block_tensors(i))
    record = FinishedBlock(BlockRecord(i, model.names[i], "once through the block", {}, 0, 0))
    record.kept_dense = kept_dense(model, i, [])
    model.close(i)
    return record, tensors


def _write(
    run: Run, writer: Writer, shard: int, tensors: Written, record: FinishedBlock, copied: torch.cuda.Event | None
) -> None:
    """Write a block as each method pruned it. The tensors of the config's method belong to the checkpoint.

    They are on the host once they are `copied`.
    """
    i = run.model.unique_blocks[shard]
    with run.model.timeline.span("write", i, WRITE):
        if copied:
            copied.synchronize()
        compared = {method: tensors[method] for method in run.config.compare}
        writer.write(shard, tensors[run.config.method], asdict(record), compared)


def _replay(run: Run, i: int, states: _States, writer: Writer) -> None:
    """Run the windows through block i, which an earlier run has pruned, or which is a repeat."""
    model = run.model
    if states.of(DENSE):
        model.open(i, run.placement.ahead)
        _advance(run, i, "forward", states.of(DENSE))
    for method in run.config.methods:
        with model.timeline.span("read", i):
            path = None
            if i in model.unique_blocks:
                path = writer.path(model.unique_blocks.index(i), None if method == run.config.method else method)
            model.open_alone(i, read_shard(path) if path else None)
        _advance(run, i, "forward", states.of(method))
    model.close(i)


def _advance(run: Run, i: int, phase: str, several: Sequence[HiddenStates]) -> None:
    """Run hidden states through block i as it is now."""
    if several:
        with run.model.timeline.span(phase, i):
            for hidden_states in several:
                hidden_states.advance(i)
