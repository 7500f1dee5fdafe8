"""The driver: prune a model one block at a time, while the next block is read and the previous one is written.

Each method has its own copy of the calibration windows, which runs through the blocks that this method has pruned. The
checkpoint gets the weights of the config's method. A resumed run only moves its windows through the finished blocks.
"""

from sparsefw.checkpoint.writer import Writer
from sparsefw.driver.block import (
    calibration_mode,
    find_stages,
    kept_dense,
    measure_stage,
    read_block,
    share_of_zeros,
    solve,
    tensors_of,
    unused_matrices,
)
from sparsefw.driver.finished import Finished, FinishedBlock, Outcome, TensorsByMethod
from sparsefw.driver.job import Run
from sparsefw.driver.reconstruct import reconstruct
from sparsefw.driver.resume import replay_block
from sparsefw.driver.streams import DENSE, Streams, advance, embedded, pass_block
from sparsefw.errors import InputError
from sparsefw.memory import trim_memory
from sparsefw.model.activations import held_out_batches
from sparsefw.report import log
from sparsefw.report.content import SPARSE
from sparsefw.solver.layer import LayerResult


def prune_model(run: Run, writer: Writer, on_block: log.OnBlock) -> Outcome:
    """Prune every block of a model by every method of the config.

    Args:
        run: the run.
        writer: receives a shard for each block and for each piece of the other tensors. If it has shards already, this
            run resumes the unfinished run that wrote them.
        on_block: called with the record and the results of every finished block.

    Raises:
        InputError: weights or activations hold NaN or Inf, a layer does not fit the pattern, nothing was
            pruned, or writing failed.
    """
    with embedded(run) as streams:
        with Finished(run, writer, on_block) as finished:
            for i in finished.before:
                replay_block(run, i, streams, writer)
                finished.report_again(i)
            for i in finished.left:
                handle = prune_block if finished.first <= i <= finished.last else pass_block
                finished.add(i, *handle(run, i, streams, finished.is_written_here(i)))
                trim_memory()
        finished.write_the_rest()
        if run.shape.layer_names and not any(block.layers for block in finished.blocks):
            raise InputError(
                "nothing was pruned: no calibration token reaches the selected experts; give more calibration windows, "
                "or select other layers"
            )
        return Outcome(finished.blocks, unused_matrices(run.model), streams.perplexities(run))


def prune_block(run: Run, i: int, streams: Streams, writes: bool) -> tuple[FinishedBlock, TensorsByMethod]:
    """Prune block i by every method, and move all windows through it.

    Args:
        run: the run.
        i: number of the block.
        streams: the windows at the block's input. The call moves them to the next block's input.
        writes: whether this rank writes the block.

    Returns:
        The block's record, and its tensors by method; no tensors if another rank writes them.
    """
    model, config, tensors = run.model, run.config, TensorsByMethod()
    block = FinishedBlock.of(i, model.names[i])
    dense = read_block(run, i)
    if i == run.first:
        block.block.zeros = share_of_zeros(run, i)
        if block.block.zeros > SPARSE:
            run.say(f"note: {log.zeros_line(block.block.zeros)}")
    advance(run, i, "evaluate", streams.evaluation[DENSE])
    if config.uses_dense_stream and not config.uses_dense_target:
        # No stage moves the dense windows, so they move here.
        advance(run, i, "reconstruct", [streams.calibration[DENSE]])
    for method in config.methods:
        own, windows = method == config.method, streams.calibration[method]
        if dense and method != config.methods[0]:
            dense.restore()
        reference = (dense, streams.calibration[DENSE]) if dense and config.dense_target(method) else None
        # A copy of the windows at the block's input, where a reconstruction begins: stages move them into the block.
        start = windows.fork() if own and config.goes_back else None
        # Layers are not fitted to the micro-batches on which a reconstruction is judged.
        held_out = held_out_batches(len(windows)) if own and config.reconstruct else ()
        stages, results = find_stages(run, i, windows, reference), list[LayerResult]()
        for stage in stages:
            results += solve(run, i, measure_stage(run, i, stage, windows, reference, held_out), method)
            # The next stage is measured with weights in the precision in which they are written.
            model.round(i)
        block.layers += results
        if own:
            # The config's method is the last one, so the dense block is not needed any more.
            dense = reference = None
            # Listed for this method only: in the models of other methods, tokens may reach other experts.
            block.kept_dense = kept_dense(model, i, results)
            block.block.way = calibration_mode(run, stages)
            if config.reconstruct:
                with model.timeline.span("reconstruct", i):
                    if start is not None:
                        windows.go_back(start)
                    found = reconstruct(run, i, windows, streams.calibration[DENSE], results)
                    block.block.reconstruction = found
        model.round(i)
        advance(run, i, "forward", [windows])
        advance(run, i, "evaluate", streams.evaluation[method])
        if writes:
            tensors[method] = tensors_of(run, i, method)
    model.close(i)
    return block, tensors
