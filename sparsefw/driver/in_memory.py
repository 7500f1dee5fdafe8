"""A run on a model in memory: on text, or on batches of its own forward's arguments, whatever it reads."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sparsefw.checkpoint import Writer, check_free, read_shard
from sparsefw.data import Batch, Batches
from sparsefw.driver.job import Job
from sparsefw.driver.loop import Samples
from sparsefw.driver.module_output import check_state, save
from sparsefw.driver.run import carry_out, kernel_line, prepare
from sparsefw.driver.texts import windows_of_texts
from sparsefw.errors import InputError
from sparsefw.memory import on_gpu, this_device
from sparsefw.model import (
    ModelShape,
    ResidentModel,
    check_losses,
    max_seqlen,
    resident,
    shape_of_resident,
    shape_of_text,
)
from sparsefw.ranks import ALONE, Ranks
from sparsefw.report import Report


def run_in_memory(
    model: nn.Module,
    job: Job,
    batches: tuple[Batches, Batches | None] | None,
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
        batches: those that define the layer problems, and those with which the model returns a loss; None: the job
            names texts, and the model is one of transformers.
        saves: whether the pruned model is written, beside its report.
        say: called with every line of the log.
        progress: whether to show a progress bar.
        ranks: the processes that share the work; all of them have the model and all batches.

    Raises:
        InputError: something that the user gave is wrong; the message names it.
        FloatingPointError: a layer's error is not finite.
    """
    check_free(job.output.folder, job.output.overwrite)
    if saves:
        check_state(model)
    say(kernel_line(job.config))
    batch = None if batches is None else max(batches[0].batches, key=lambda x: sum(t.numel() for t in x.tensors))
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    device = this_device() if device.type == "cpu" else device
    # A module's own parameters may ask for gradients.
    with on_gpu(device), torch.no_grad(), resident(model, batch, device) as opened:
        if batches is None or batch is None:
            whole, samples, seqlen = _on_text(job, opened, say, ranks)
        else:
            whole, samples, seqlen = _on_batches(opened, batch, *batches)
            job = replace(job, inputs=replace(job.inputs, seqlen=max(2, seqlen)))
        tensors = _tensors(model)
        name, dtype = f"{type(model).__name__} in memory", next(model.parameters()).dtype
        prepared = prepare(
            job, opened, name, dtype, whole, samples, seqlen, say, ranks,
            notes=opened.notes,
            fingerprint=_fingerprint(tensors),
            # A caller's batches are not cut.
            fixed={"batch": 1} if batches else {},
            saved=sum(tensor.nbytes for _, tensor in tensors) if saves else 0,
        )  # fmt: skip

        def write(folder: Path) -> None:
            save(model, folder)
            if job.tokenizer is not None:
                job.tokenizer.save_pretrained(folder)

        def finish(writer: Writer) -> None:
            for n, i in enumerate(opened.unique_blocks):
                opened.change(i, read_shard(writer.path(n)))
            with opened.as_configured():
                writer.finish(write if saves else None)

        return carry_out(job, opened, prepared, finish, say, progress, ranks)


# The shape of a model, what it is calibrated and evaluated on, and the tokens in each.
_Samples = tuple[ModelShape, tuple[Samples, Sequence[Samples]], int]


def _on_text(job: Job, model: ResidentModel, say: Callable[[str], None], ranks: Ranks) -> _Samples:
    config = cast(PretrainedConfig, model.model.config)
    if job.inputs.evaluate and not model.logits_itemsize:
        raise InputError(f"evaluate: {type(model.model).__name__} returns no logits, of which perplexity is made")
    samples, seqlen = windows_of_texts(job, max_seqlen(config), say, ranks)
    return shape_of_text(model), samples, seqlen


def _on_batches(model: ResidentModel, batch: Batch, calibration: Batches, evaluation: Batches | None) -> _Samples:
    shape, tokens = shape_of_resident(model, batch)
    if evaluation:
        check_losses(model, evaluation.batches)
    return shape, (calibration, [evaluation] if evaluation else []), tokens


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors of a model's state. A module may put anything else into it, too."""
    return [(name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)]


def _fingerprint(tensors: list[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors with their names, in hex."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
