"""A run on a model in memory, with batches of its own forward's arguments: any stack of blocks, whatever it reads."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from sparsefw.checkpoint import Writer, check_free, read_shard
from sparsefw.data import Batch, Batches
from sparsefw.driver.job import Job, Prepared
from sparsefw.driver.run import carry_out, kernel_line, workload_of
from sparsefw.driver.saved import check_state, save
from sparsefw.errors import counted
from sparsefw.estimate import memory_limits, pruned_shape
from sparsefw.model import ResidentModel, check_losses, resident, shape_of_resident
from sparsefw.process import on_gpu, this_device
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report import Report, amount, log
from sparsefw.solver.selection import without_index


def run_in_memory(
    model: nn.Module,
    job: Job,
    calibration: Batches,
    evaluation: Batches | None,
    saves: bool,
    say: Callable[[str], None],
    progress: bool,
    ranks: Ranks = ALONE,
) -> Report:
    """Prune a model in place, evaluate it, and write it with its report.

    The model is changed when all of its blocks have been pruned. Until then its weights are what they were.

    Args:
        model: the model.
        job: the run.
        calibration: the batches that define the layer problems.
        evaluation: batches with which the model returns a loss.
        saves: whether the pruned model is written, beside its report.
        say: called with every line of the log.
        progress: whether to show a progress bar.
        ranks: the processes that share the batches; all of them have the model and all batches.

    Raises:
        InputError: something that the user gave is wrong; the message names it.
        FloatingPointError: a layer's error is not finite.
    """
    check_free(job.output.folder, job.output.overwrite)
    if saves:
        check_state(model)
    say(kernel_line(job.config))
    batch, device = max(calibration.batches, key=_size), _device(model)
    # A module's own parameters may ask for gradients.
    with on_gpu(device), torch.no_grad(), resident(model, batch, device) as opened:
        prepared, tokens = _prepare(job, opened, batch, calibration, evaluation, saves, say, ranks)
        job = replace(job, inputs=replace(job.inputs, seqlen=max(2, tokens)))

        parameters = dict(pair for i in opened.firsts for pair in opened.parameters(i))
        layers = {name: parameters[without_index(name)] for name in prepared.shape.layer_names}

        def finish(writer: Writer) -> None:
            for n, i in enumerate(opened.firsts):
                opened.change(i, read_shard(writer.path(n)))
            with opened.as_configured():
                writer.finish_as(partial(save, model, layers=layers) if saves else lambda folder: None)

        return carry_out(job, opened, prepared, finish, say, progress, ranks)


def _prepare(
    job: Job,
    model: ResidentModel,
    batch: Batch,
    calibration: Batches,
    evaluation: Batches | None,
    saves: bool,
    say: Callable[[str], None],
    ranks: Ranks,
) -> tuple[Prepared, int]:
    """The run before its first block, and the most vectors of a batch between two blocks."""
    config, device = job.config, model.device
    whole, tokens = shape_of_resident(model, batch)
    if evaluation:
        check_losses(model, evaluation.batches)
    for note in model.notes:
        say(f"note: {note}")
    dtype = next(model.model.parameters()).dtype
    say(f"model: {type(model.model).__name__} in memory, {counted(len(model.firsts), 'block')}, {dtype}")
    say(f"calibration: {amount(calibration.source, calibration.n, tokens)}")
    shape = pruned_shape(whole, config)
    say(log.sparsity_line(config, shape, whole))
    evaluated = [evaluation] if evaluation else []
    prepared = Prepared(
        device,
        calibration,
        evaluated,
        shape,
        workload_of(config, calibration.n, [batches.n for batches in evaluated], tokens, device, ranks=ranks),
        memory_limits(job.output.gpu_memory, job.output.host_memory, device, ranks),
        model.notes,
        _fingerprint(model.model),
        # A caller's batches are not cut.
        fixed={"batch": 1},
        saved=sum(tensor.nbytes for _, tensor in _tensors(model.model)) if saves else 0,
    )
    return prepared, tokens


def _size(batch: Batch) -> int:
    return sum(x.numel() for x in batch.tensors)


def _device(model: nn.Module) -> torch.device:
    """The device of a model on a GPU; otherwise a GPU, if there is one."""
    own = next((x.device for x in model.parameters()), torch.device("cpu"))
    return this_device() if own.type == "cpu" else own


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a model's state. A module may put anything else into it, too."""
    return [(name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)]


def _fingerprint(model: nn.Module) -> str:
    """SHA-256 of all tensors of a model, in hex."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
