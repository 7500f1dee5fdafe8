"""Streams: hidden states of calibration and evaluation windows before a block, in the dense and in pruned models."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from sparsefw.data.windows import Samples
from sparsefw.driver.block import kept_dense, tensors_of
from sparsefw.driver.finished import FinishedBlock, TensorsByMethod
from sparsefw.driver.job import Run
from sparsefw.model.forward import embed_batches
from sparsefw.model.head import perplexity
from sparsefw.model.hidden_states import HiddenStates

# Name of the hidden states in the dense model.
DENSE = "dense"


@dataclass(frozen=True)
class Streams:
    """Hidden states before a block: in the dense model (DENSE), and in the model that each method prunes.

    Attributes:
        calibration: hidden states of the calibration windows, by method or DENSE.
        evaluation: hidden states of every evaluation text, by method or DENSE.
        texts: this rank's windows of each evaluation text.
    """

    calibration: dict[str, HiddenStates]
    evaluation: dict[str, list[HiddenStates]]
    texts: list[Samples]

    def of(self, name: str) -> list[HiddenStates]:
        """List all hidden states of a method, or of DENSE."""
        return [*([self.calibration[name]] if name in self.calibration else []), *self.evaluation[name]]

    def perplexities(self, run: Run) -> dict[str, dict[str, float]]:
        """Compute the perplexities after the last block, by evaluation text, then by method or DENSE."""
        with run.model.timeline.span("evaluate"), run.model.outside_loaded():
            return {
                samples.source: {name: perplexity(x[n], samples, run.ranks) for name, x in self.evaluation.items()}
                for n, samples in enumerate(self.texts)
            }


@contextmanager
def embedded(run: Run) -> Iterator[Streams]:
    """Make the hidden states of this rank's windows before the first block; the end of the `with` block frees them."""
    model, names, ranks = run.model, [DENSE, *run.config.methods], run.ranks
    with ExitStack() as opened:
        with model.timeline.span("embed"), model.outside_loaded():
            calibration, *texts = (x.shard(ranks.share(x.n)) for x in (run.calibration, *run.evaluation))
            # Steps of a reconstruction take pieces of micro-batches; the last piece may be smaller.
            step = run.placement.step
            pieces = [calibration.shard(slice(n)) for n in {step, calibration.n % step} - {0}] if step else []
            calibrated = _embed(run, calibration, names[not run.config.uses_dense_stream :], pieces)
            evaluated = [_embed(run, text, names) for text in texts]
        streams = Streams(calibrated, {name: [by_name[name] for by_name in evaluated] for name in names}, texts)
        for name in names:
            for hidden_states in streams.of(name):
                opened.callback(hidden_states.close)
        yield streams


def _embed(run: Run, samples: Samples, names: Sequence[str], pieces: Sequence[Samples] = ()) -> dict[str, HiddenStates]:
    """Make the hidden states of samples before the first block, a copy for each name.

    The model also records how it runs `pieces`, samples of the sizes that steps of a reconstruction take.
    """
    batch, store = run.placement.batch, run.placement.store(run.model.device)
    states = embed_batches(run.model, samples.split(batch), store, (x for piece in pieces for x in piece.split(batch)))
    return {name: states.fork() if n else states for n, name in enumerate(names)}


def pass_block(run: Run, i: int, streams: Streams, writes: bool) -> tuple[FinishedBlock, TensorsByMethod]:
    """Move all windows through block i, in which no layer is pruned; arguments and result as for `prune.prune_block`.

    Such a block comes before the first or after the last block in which layers are pruned.
    """
    model, calibration = run.model, streams.calibration
    model.open(i, run.placement.ahead)
    if not any(map(run.selected, range(i, len(model.blocks)))):
        # No later block is pruned, so the calibration windows are not needed any more.
        while calibration:
            calibration.popitem()[1].close()
    # Groups of streams of the same windows. Before the first pruned block, all streams of a group are equal: one moves,
    # and the others become copies of it.
    groups = [[*calibration.values()], *map(list, zip(*streams.evaluation.values(), strict=True))]
    for n, group in enumerate(groups):
        # After the last pruned block, `calibration` is empty, and the streams differ by method: all of them move.
        moving = group[:1] if calibration else group
        advance(run, i, "evaluate" if n else "forward", moving)
        for other in group[len(moving) :]:
            other.go_back(group[0].fork())
    tensors = dict.fromkeys(run.config.methods, tensors_of(run, i, run.config.method)) if writes else {}
    block = FinishedBlock.of(i, model.names[i], "once through the block")
    block.kept_dense = kept_dense(model, i, [])
    model.close(i)
    return block, tensors


def advance(run: Run, i: int, phase: str, several: Sequence[HiddenStates]) -> None:
    """Run hidden states through block i with its current weights."""
    if several:
        with run.model.timeline.span(phase, i):
            for hidden_states in several:
                hidden_states.advance(i)
