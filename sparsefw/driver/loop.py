"""The block loop: read, calibrate, prune, evaluate and write a model one block at a time.

For every block, the evaluation windows first run through the dense block. Then every method prunes the block on the
calibration windows, which have come through the blocks that the same method has pruned before, and runs all its windows
through the pruned block. The weights by the config's method are written. The next block is read and the last one
written meanwhile.

Blocks that an earlier run has finished are not pruned again. Their weights are read, and the windows run through them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsefw.checkpoint import Writer, read_shard
from sparsefw.data import Batches, Windows
from sparsefw.driver.block import DenseReference, Run, find_stages, idle_matrices, kept_dense, prune_block, way_through
from sparsefw.driver.reconstruct import Parts, make_parts, reconstruct
from sparsefw.driver.record import FinishedBlock
from sparsefw.errors import InputError
from sparsefw.memory import give_back, peak_memory
from sparsefw.model import HiddenStates, Placement, embed_batches, perplexity, perplexity_of_batches
from sparsefw.ranks import Ranks
from sparsefw.report import BlockRecord, Reconstruction
from sparsefw.solver import LayerResult
from sparsefw.timeline import WRITE, Timeline

# Name of the hidden states in the dense model.
DENSE = "dense"

# What runs through a model: windows of tokens, or a caller's batches.
Samples = Windows | Batches


@dataclass
class Outcome:
    """Measurements of a run.

    Attributes:
        timeline: what was done when. Blocks that an earlier run finished are only read and run.
        layers: a result for each layer and method.
        perplexity: by evaluation text, then by "dense" and by method; empty without evaluation.
        kept_dense: names of the matrices inside the blocks that were not pruned.
        blocks: name, seconds by phase and peak memory of each block, as the run that pruned it measured them.
    """

    timeline: Timeline
    layers: list[LayerResult] = field(default_factory=list)
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    kept_dense: list[str] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)

    def add(self, finished: FinishedBlock) -> None:
        """Add the record of a finished block."""
        self.layers += finished.layers
        self.kept_dense += finished.kept_dense
        self.blocks.append(finished.block)


@dataclass(frozen=True)
class _AllStates:
    """Hidden states by method and "dense": of the calibration, and of every evaluation text.

    `ids` are the tokens of the calibration windows; None: the calibration is no text. `parts` are its micro-batches.
    """

    ids: Tensor | None
    parts: Parts
    calibration: dict[str, HiddenStates]
    evaluation: list[tuple[Samples, dict[str, HiddenStates]]]

    @property
    def evaluated(self) -> list[dict[str, HiddenStates]]:
        """All but those of the calibration."""
        return [states for _, states in self.evaluation]

    def of(self, name: str) -> list[HiddenStates]:
        """The hidden states of a method, or of "dense"."""
        return [states[name] for states in (self.calibration, *self.evaluated) if name in states]

    def all(self) -> list[HiddenStates]:
        """All hidden states."""
        return [states for by_name in (self.calibration, *self.evaluated) for states in by_name.values()]


def prune_model(
    run: Run,
    calibration: Samples,
    evaluation: Sequence[Samples],
    writer: Writer,
    placement: Placement,
    *,
    on_layer: Callable[[LayerResult], None] = lambda result: None,
    on_reconstruction: Callable[[str, Reconstruction], None] = lambda block, found: None,
    on_block: Callable[[], None] = lambda: None,
) -> Outcome:
    """Prune every block of a model.

    Args:
        run: the model, and how it is pruned: by every method of the config, each on the activations of its own blocks.
        calibration: windows or batches whose activations define the layer problems.
        evaluation: those of each evaluation text.
        writer: receives a shard for each block and each piece of the rest. The run goes on after those that it has.
        placement: what is held at once, and where.
        on_layer, on_reconstruction, on_block: called after every layer, with the name of every block that was
            reconstructed, and after every block.

    Raises:
        InputError: weights or activations hold NaN or Inf, a layer does not fit the pattern, nothing was
            pruned, or writing failed.
    """
    with ExitStack() as open_states:
        with run.model.timeline.span("embed"), run.model.outside():
            texts = [samples.part(run.ranks.share(samples.n)) for samples in (calibration, *evaluation)]
            states = _embed_all(run, texts[0], texts[1:], placement)
        for hidden_states in states.all():
            open_states.callback(hidden_states.close)
        outcome = _prune_blocks(run, states, writer, placement, on_layer, on_reconstruction, on_block)
        if run.layers and not outcome.layers:
            raise InputError(
                "nothing was pruned: no calibration token reaches the selected experts; give more calibration windows, "
                "or select other layers"
            )
        with run.model.timeline.span("evaluate"), run.model.outside():
            for samples, by_name in states.evaluation:
                outcome.perplexity[samples.source] = {
                    name: _perplexity(s, samples, run.ranks) for name, s in by_name.items()
                }
        return outcome


def _prune_blocks(
    run: Run,
    states: _AllStates,
    writer: Writer,
    placement: Placement,
    on_layer: Callable[[LayerResult], None],
    on_reconstruction: Callable[[str, Reconstruction], None],
    on_block: Callable[[], None],
) -> Outcome:
    model, timeline = run.model, run.model.timeline
    outcome = Outcome(timeline)
    done = len(writer.finished)
    finished = writer.finished[: len(model.firsts)]
    for record in finished:
        outcome.add(FinishedBlock.from_json(record))
    # Repeats are not written. Those before the next block that is can be run.
    begin = [*model.firsts, len(model.blocks)][len(finished)]
    for i in range(begin):
        _replay(run, i, states, writer, placement)
        on_block()
    with ThreadPoolExecutor(1) as background:
        written: Future[None] | None = None
        for i in range(begin, len(model.blocks)):
            sent = run.ranks.sent.copy()
            record, tensors = _prune_methods(run, i, states, writer, placement, on_layer, on_reconstruction)
            if i not in model.firsts:
                on_block()
                continue
            shard = model.firsts.index(i)
            with timeline.span("wait", i):
                if written and writer.writes(shard):
                    written.result()
            record = record.measured(timeline.seconds(i), _peaks(run.ranks), dict(run.ranks.sent - sent))
            # Each rank writes some of the records. All are those of rank 0, which reports runs that go through.
            record = run.ranks.broadcast_object(record)
            if writer.writes(shard):
                written = background.submit(_write, run, writer, shard, tensors, record)
                if not placement.ahead:
                    written.result()
            del tensors
            give_back()
            outcome.add(record)
            on_block()
        with timeline.span("wait"):
            if written:
                written.result()
    outcome.kept_dense += idle_matrices(model)
    for shard, names in enumerate(model.pieces, len(model.firsts)):
        if shard >= done and writer.writes(shard):
            with timeline.span("write"):
                writer.write(model.other_tensors(names), n=shard)
            # Tensors that are small enough for the C library to keep would lie beside the next ones.
            give_back()
    return outcome


def _perplexity(states: HiddenStates, samples: Samples, ranks: Ranks) -> float:
    if isinstance(samples, Windows):
        return perplexity(states, samples.ids, ranks)
    return perplexity_of_batches(states, samples.batches, ranks)


def _embed_all(run: Run, calibration: Samples, evaluation: Sequence[Samples], placement: Placement) -> _AllStates:
    """Embed all windows: the hidden states before the first block."""
    store = placement.store(run.model.device)

    def start(samples: Samples, names: list[str]) -> dict[str, HiddenStates]:
        states = embed_batches(run.model, samples.split(placement.batch), store)
        return {name: states.fork() if n else states for n, name in enumerate(names)}

    methods = [*run.config.methods]
    calibrated = start(calibration, [DENSE, *methods] if run.config.uses_dense_stream else methods)
    ids = calibration.ids if isinstance(calibration, Windows) else None
    parts = make_parts(run, calibrated[run.config.method])
    evaluated = [(samples, start(samples, [DENSE, *methods])) for samples in evaluation]
    return _AllStates(ids, parts, calibrated, evaluated)


def _prune_methods(
    run: Run,
    i: int,
    states: _AllStates,
    writer: Writer,
    placement: Placement,
    on_layer: Callable[[LayerResult], None],
    on_reconstruction: Callable[[str, Reconstruction], None],
) -> tuple[FinishedBlock, dict[str, dict[str, Tensor]]]:
    """Prune block i by every method, and run all windows through it.

    Returns:
        The block's record, and its tensors on the host, by method, then by their names in the checkpoint; none where
        another rank writes them.
    """
    model, timeline, methods = run.model, run.model.timeline, run.config.methods
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    block = model.open(i, placement.ahead)
    with timeline.span("read", i):
        # A copy, only if the dense block is needed after it has been pruned.
        dense = model.copy(i) if run.config.uses_dense_target or len(methods) > 1 else None
    _evaluate(run, i, states, DENSE)
    if run.config.uses_dense_stream and not run.config.uses_dense_target:
        # No stage will move them on.
        with timeline.span("reconstruct", i):
            states.calibration[DENSE].advance(i)
    record, tensors = FinishedBlock.of(i, model.names[i]), {}
    for method in methods:
        if dense and method != methods[0]:
            _restore(block, dense)
        reference = None
        if dense and run.config.uses_dense_target and method == "sparsefw":
            order = find_stages(run, i, states.calibration[method])
            reference = DenseReference(dense, states.calibration[DENSE], order)
        own = method == run.config.method
        # Stages move the windows on inside the block, and a reconstruction runs from its input.
        start = states.calibration[method].fork() if own and run.config.reconstruct and reference else None
        # The loss on what is held out tells what a reconstruction is worth only if no layer was fitted to it, either.
        held_out = states.parts.held_out if own else ()
        results = []
        for result in prune_block(run, i, states.calibration[method], method, reference, held_out):
            results.append(result)
            on_layer(result)
        record.layers.extend(results)
        if own:
            # Tokens may reach other experts in the model of another method, which is not written.
            record = record.with_kept_dense(kept_dense(model, i, results)).with_way(way_through(run, reference))
        if own and run.config.reconstruct:
            # It is the last method: nothing needs the dense block any more.
            dense = reference = None
            if found := _reconstruct(run, i, states, start, results):
                record = record.with_reconstruction(found)
                on_reconstruction(model.names[i], found)
        with timeline.span("forward", i):
            states.calibration[method].advance(i)
        _evaluate(run, i, states, method)
        if i not in model.firsts or not writer.writes(model.firsts.index(i)):
            continue
        with timeline.span("write", i):
            tensors[method] = model.block_tensors(i)
            if method != run.config.method:
                # The next method overwrites the block's memory.
                tensors[method] = {name: tensor.clone() for name, tensor in tensors[method].items()}
    model.close(i)
    return record, tensors


def _reconstruct(
    run: Run, i: int, states: _AllStates, start: HiddenStates | None, results: list[LayerResult]
) -> Reconstruction | None:
    """Reconstruct block i, as the config's method has pruned it.

    Args:
        run, i, results: as for `reconstruct`.
        states: all windows; those of the calibration are behind the block in the dense model.
        start: the method's windows before the block, if stages have moved the others on.
    """
    pruned, dense = states.calibration[run.config.method], states.calibration[DENSE]
    with run.model.timeline.span("reconstruct", i):
        if start is not None:
            pruned.go_back(start)
        return reconstruct(run, i, pruned, dense, results, states.parts, states.ids)


def _peaks(ranks: Ranks) -> dict[str, int]:
    """The highest peaks of memory of a rank, by name."""
    peaks = ranks.gather(peak_memory())
    return {name: max(peak[name] for peak in peaks) for name in peaks[0]}


def _write(run: Run, writer: Writer, shard: int, tensors: dict[str, dict[str, Tensor]], record: FinishedBlock) -> None:
    """Write a block as each method pruned it. The tensors of the config's method belong to the checkpoint."""
    i = run.model.firsts[shard]
    with run.model.timeline.span("write", i, WRITE):
        for method in run.config.compare:
            writer.keep(f"{method}-{i:05d}", tensors[method])
        writer.write(tensors[run.config.method], record.to_json(), shard)


def _replay(run: Run, i: int, states: _AllStates, writer: Writer, placement: Placement) -> None:
    """Run the windows through block i, which an earlier run has pruned, or which is a repeat."""
    model, timeline = run.model, run.model.timeline
    if dense_states := states.of(DENSE):
        model.open(i, placement.ahead)
        with timeline.span("forward", i):
            for hidden_states in dense_states:
                hidden_states.advance(i)
    for method in run.config.methods:
        with timeline.span("read", i):
            if i in model.firsts:
                own = method == run.config.method
                path = writer.path(model.firsts.index(i)) if own else writer.kept(f"{method}-{i:05d}")
                model.open_as(i, read_shard(path))
            else:
                model.open_alone(i)
        with timeline.span("forward", i):
            for hidden_states in states.of(method):
                hidden_states.advance(i)
    model.close(i)


def _evaluate(run: Run, i: int, states: _AllStates, name: str) -> None:
    if states.evaluated:
        with run.model.timeline.span("evaluate", i):
            for by_name in states.evaluated:
                by_name[name].advance(i)


@torch.no_grad()
def _restore(block: nn.Module, dense: nn.Module) -> None:
    for parameter, before in zip(block.parameters(), dense.parameters(), strict=True):
        parameter.copy_(before)
