"""The block loop: read, calibrate, prune, evaluate and write a model one block at a time.

For every block: evaluate it dense; for every method prune it on the calibration windows (their input is what the blocks
pruned by that method gave), and run the windows again through the pruned block; write what the last method gave. The
next block is read and the last one written meanwhile. Of blocks that a run before has finished only the weights are
read, and the windows run through them.
"""

import copy
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.checkpoint.reader import read_shard
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.windows import Windows
from sparsefw.driver.block import Dense, kept_dense, prune_block
from sparsefw.model.placement import Placement
from sparsefw.model.streamed import Stream, StreamedModel
from sparsefw.process import give_back, peak_memory
from sparsefw.solver.layer import LayerResult
from sparsefw.solver.methods import Settings
from sparsefw.timeline import WRITE, Timeline

# Name of the streams through the model as it was.
DENSE = "dense"


@dataclass
class Outcome:
    """What a run measured.

    Attributes:
        timeline: what was done when; of blocks finished by a run before nothing but the reading.
        layers: a row per layer and method.
        perplexity: by held-out text, then by "dense" and by method; empty without evaluation.
        dense: names of the matrices inside the blocks that were not pruned.
        blocks: of each block its name, seconds by phase, peak memory; of finished ones as the run before had it.
    """

    timeline: Timeline
    layers: list[LayerResult] = field(default_factory=list)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    dense: list[str] = field(default_factory=list)
    blocks: list[dict[str, Any]] = field(default_factory=list)

    def add(self, note: dict[str, Any]) -> None:
        """Take in what was noted of a finished block."""
        self.layers += [LayerResult(**row) for row in note["layers"]]
        self.dense += note["dense"]
        self.blocks.append(note["block"])


@dataclass(frozen=True)
class _Streams:
    """The windows on their way: calibration by method (and "dense"), and of every held-out text the same."""

    calibrating: dict[str, Stream]
    held_out: list[dict[str, Stream]]

    def of(self, name: str) -> list[Stream]:
        """Those of one name."""
        return [streams[name] for streams in (self.calibrating, *self.held_out) if name in streams]


def prune_model(
    model: StreamedModel,
    calibration: Windows,
    evaluation: list[Windows],
    methods: list[str],
    settings: Settings,
    ops: ModuleType,
    writer: Writer,
    *,
    placement: Placement,
    on_layer: Callable[[LayerResult], None] = lambda row: None,
    on_block: Callable[[], None] = lambda: None,
) -> Outcome:
    """Prune every block of a model.

    Args:
        model: the streamed model.
        calibration: windows whose activations define the layer problems.
        evaluation: held-out windows for perplexity, of each text.
        methods: pruned apart from each other, each on its own activations; what the last one gives is written.
        settings: how masks are chosen.
        ops: the kernels, `sparsefw.kernels.cpu` or `sparsefw.kernels.triton_ops`.
        writer: takes one shard per block and one for the rest; goes on after those that it has.
        placement: what is held at once, and where.
        on_layer, on_block: called after every layer and every block.

    Raises:
        InputError: weights or activations hold NaN or Inf, a layer does not fit the pattern, or writing failed.
    """
    timeline, outcome = model.timeline, Outcome(model.timeline)
    followed = settings.target == "dense" and "sparsefw" in methods
    with timeline.span("embed"), model.outside():
        streams = _Streams(
            _start(model, calibration, [DENSE, *methods] if followed else methods, placement),
            [_start(model, windows, [DENSE, *methods], placement) for windows in evaluation],
        )
    finished = writer.finished[: len(model.blocks)]
    for i, note in enumerate(finished):
        _replay(model, i, streams, methods, writer, placement)
        outcome.add(note)
        on_block()
    with ThreadPoolExecutor(1) as background:
        written: Future | None = None
        for i in range(len(finished), len(model.blocks)):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            block = model.open(i, placement.ahead)
            with timeline.span("read", i):
                # Only where it is needed after the block has been pruned.
                dense = copy.deepcopy(block) if followed or len(methods) > 1 else None
            _evaluate(model, i, streams, DENSE)
            rows, unpruned, tensors = [], {}, {}
            for method in methods:
                if method != methods[0]:
                    _restore(block, dense)
                stream = streams.calibrating[method]
                follows = Dense(dense, streams.calibrating[DENSE]) if followed and method == "sparsefw" else None
                mine = []
                for row in prune_block(model, i, stream, follows, method, settings, ops):
                    mine.append(row)
                    on_layer(row)
                rows += mine
                unpruned |= dict.fromkeys(kept_dense(model, i, mine))
                with timeline.span("forward", i):
                    model.advance(i, stream)
                _evaluate(model, i, streams, method)
                with timeline.span("write", i):
                    tensors[method] = model.block_tensors(i)
                    if method != methods[-1]:
                        # The next method takes the block's memory.
                        tensors[method] = {name: tensor.clone() for name, tensor in tensors[method].items()}
            model.close(i)
            del block, dense, follows
            with timeline.span("wait", i):
                if written:
                    written.result()
            measured = {"block": i, "name": model.names[i], "seconds": timeline.seconds(i), **peak_memory()}
            note = {"layers": [asdict(row) for row in rows], "dense": list(unpruned), "block": measured}
            written = background.submit(_write, writer, i, tensors, methods, note, timeline)
            if not placement.ahead:
                written.result()
            del tensors
            give_back()
            outcome.add(note)
            on_block()
        with timeline.span("wait"):
            if written:
                written.result()
    if len(writer.finished) == len(model.blocks):
        with timeline.span("write"):
            writer.write(model.other_tensors())
    with timeline.span("evaluate"), model.outside():
        for windows, by_name in zip(evaluation, streams.held_out, strict=True):
            outcome.perplexity[windows.source] = {n: perplexity(model, windows.ids, s) for n, s in by_name.items()}
    return outcome


def _write(
    writer: Writer, i: int, tensors: dict[str, dict[str, Tensor]], methods: list[str], note: dict, timeline: Timeline
) -> None:
    """Write block i of every method; the one of the last method is the checkpoint's."""
    with timeline.span("write", i, WRITE):
        for method in methods[:-1]:
            writer.keep(f"{method}-{i:05d}", tensors[method])
        writer.write(tensors[methods[-1]], note)


def _replay(
    model: StreamedModel, i: int, streams: _Streams, methods: list[str], writer: Writer, placement: Placement
) -> None:
    """Run the streams through block i as a run before has pruned it."""
    if of_dense := streams.of(DENSE):
        model.open(i, placement.ahead)
        with model.timeline.span("forward", i):
            for stream in of_dense:
                model.advance(i, stream)
    for method in methods:
        path = writer.path(i) if method == methods[-1] else writer.kept(f"{method}-{i:05d}")
        with model.timeline.span("read", i):
            model.open_as(i, read_shard(path))
        with model.timeline.span("forward", i):
            for stream in streams.of(method):
                model.advance(i, stream)
    model.close(i)


def _evaluate(model: StreamedModel, i: int, streams: _Streams, name: str) -> None:
    if streams.held_out:
        with model.timeline.span("evaluate", i):
            for by_name in streams.held_out:
                model.advance(i, by_name[name])


def perplexity(model: StreamedModel, ids: Tensor, stream: Stream) -> float:
    """exp of the mean negative log-likelihood over all windows.

    Args:
        model: its final norm and head are used.
        ids: (windows, seqlen) tokens.
        stream: the same windows after the last block.
    """
    losses, count = 0.0, 0
    with model.outside():
        for j in range(len(stream.hidden)):
            hidden = stream.hidden[j]
            batch = ids[count : count + len(hidden)]
            # One window at a time: logits over a large vocabulary are the largest tensor of a run.
            losses += sum(model.loss(batch[n : n + 1], hidden[n : n + 1]) for n in range(len(hidden)))
            count += len(hidden)
    return math.exp(losses / count)


def _start(model: StreamedModel, windows: Windows, names: list[str], placement: Placement) -> dict[str, Stream]:
    """A stream of the same windows for each name, before the first block."""
    stream = model.start(windows.ids, placement.batch, placement.room(model.device))
    return {name: stream.fork() if n else stream for n, name in enumerate(names)}


@torch.no_grad()
def _restore(block: nn.Module, dense: nn.Module) -> None:
    for parameter, before in zip(block.parameters(), dense.parameters(), strict=True):
        parameter.copy_(before)
