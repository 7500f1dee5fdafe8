"""A run on a model in memory, calibrated on text, or on batches of arguments of the model's forward.

The model is written by its own library.
"""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefw.checkpoint.files import check_free
from sparsefw.checkpoint.source import (
    PROCESSORS,
    SMALL_FILES,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    companions,
    locate,
    matches,
)
from sparsefw.checkpoint.tensors import read_shard
from sparsefw.checkpoint.writer import Writer, copy_companions
from sparsefw.data.batches import Batch, Batches
from sparsefw.driver.job import Job, Run, Samples
from sparsefw.driver.resume import computes_in_fp32, resumed
from sparsefw.driver.run import Describe, carry_out, settled
from sparsefw.driver.texts import read_texts, with_defaults
from sparsefw.errors import InputError, errors_in_one_line, shown
from sparsefw.estimate.profile import shape_of_resident, shape_of_text
from sparsefw.memory import on_gpu, this_device
from sparsefw.model import resident
from sparsefw.model.block_model import ResidentModel
from sparsefw.model.head import check_losses
from sparsefw.model.swap import filled, slots_of
from sparsefw.report.content import Report


def run_in_memory(
    model: nn.Module,
    job: Job,
    batches: tuple[Batches, Batches | None] | None,
    saves: bool,
) -> Report:
    """Prune a model in place, evaluate it, and write it with its report.

    Its weights change at the end, when all blocks have been pruned: an error leaves the model as it was.

    Args:
        model: the model.
        job: the run. All of its ranks have the model and all batches.
        batches: the batches of calibration, and those of evaluation, for which the model returns a loss; None: the job
            names texts, and the model is one of transformers.
        saves: whether the pruned model is written, besides its report.

    Raises:
        InputError: an input is wrong; the message names it.
        FloatingPointError: a layer's error is not finite.
    """
    check_free(job.output.folder, job.output.overwrite)
    if saves:
        check_configs(model)
    job, batch = resumed(job), None if batches is None else _largest(batches[0])
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    device = this_device() if device.type == "cpu" else device
    # Without gradients, which the parameters of a module may require.
    source, notes = _source(model, job.tokenizer) if saves and job.ranks.first else (None, [])
    with on_gpu(device), torch.no_grad(), resident(model, batch, device, partial(computes_in_fp32, job)) as opened:
        opened.notes += notes
        run = _settled(job, opened, batches, saves, source)

        def write(folder: Path) -> None:
            save(model, folder)
            if job.tokenizer is not None:
                job.tokenizer.save_pretrained(folder)
            if source is not None:
                # Tokenizer files of the source would contradict the caller's tokenizer.
                own = (folder / TOKENIZER_CONFIG).exists()
                copy_companions(source, folder, TOKENIZERS if own else ())

        def finish(writer: Writer, describe: Describe) -> None:
            for n, i in enumerate(opened.unique_blocks):
                opened.change(i, read_shard(writer.path(n)))
            opened.set_back()
            if saves and job.ranks.first:
                write(writer.folder)
            writer.finish(describe if saves else None)

        return carry_out(run, finish)


def _settled(
    job: Job,
    opened: ResidentModel,
    batches: tuple[Batches, Batches | None] | None,
    saves: bool,
    source: Path | None,
) -> Run:
    """Make the run of a job on the texts that it names, or on batches."""
    calibration: Samples
    evaluation: Sequence[Samples]
    written = 0
    if batches is None:
        if job.inputs.evaluate and not opened.logits_itemsize:
            raise InputError(f"evaluate: {type(opened.model).__name__} returns no logits, of which perplexity is made")
        whole = shape_of_text(opened)
        job, calibration, evaluation, seqlen, written = read_texts(job, opened, whole)
    else:
        calibration, evaluated = batches
        evaluation = [evaluated] if evaluated else []
        whole, seqlen = shape_of_resident(opened, _largest(calibration))
        tokens = _tokens_without_padding(calibration, seqlen, opened.notes)
        if evaluated:
            check_losses(opened, evaluated.batches)
        job = replace(job, inputs=replace(job.inputs, seqlen=max(2, seqlen)))
        # The mean over batches: they may have different sizes.
        job = with_defaults(job, calibration.n, tokens // calibration.n or seqlen)
    # The state of a module may hold other objects than tensors.
    tensors = {name: value for name, value in opened.model.state_dict().items() if isinstance(value, Tensor)}
    run = Run(
        job,
        opened,
        f"{type(opened.model).__name__} in memory",
        next(opened.model.parameters()).dtype,
        whole,
        calibration,
        evaluation,
        seqlen,
        notes=opened.notes,
        fingerprint=_fingerprint(tensors),
        source=source,
    )
    saved = sum(tensor.nbytes for tensor in tensors.values()) if saves else 0
    # Batches of a caller are not divided into micro-batches.
    return settled(run, written, saved, {"batch": 1} if batches else {})


def _tokens_without_padding(calibration: Batches, seqlen: int, notes: list[str]) -> int:
    """Count the tokens of batches that are no padding, and note it; 0 if no batch has padding."""
    masks = [x for batch in calibration.batches if isinstance(x := batch.kwargs.get("attention_mask"), Tensor)]
    # A mask of sound counts samples, and one position is made of several samples.
    if len(masks) != calibration.n or max(x.numel() for x in masks) != seqlen:
        return 0
    tokens, positions = sum(int((x != 0).sum()) for x in masks), sum(x.numel() for x in masks)
    if tokens < positions:
        notes.append(f"{tokens} of {positions} positions count, the others are padding")
    return tokens


def _source(model: nn.Module, tokenizer: Any) -> tuple[Path | None, list[str]]:
    """Return the folder that a model of transformers was loaded from, whose small files are copied to the output.

    A note follows where neither the folder nor the caller has a tokenizer or a processor.
    """
    if not isinstance(model, PreTrainedModel):
        return None, []
    folder: Path | None = None
    names: list[str] = []
    with suppress(InputError):
        if model.name_or_path:
            found = locate(model.name_or_path, SMALL_FILES)
            # Refuses a link out of the folder now, and not at the end of the run.
            names, folder = [path.name.lower() for path in companions(found)], found
    if tokenizer is not None or any(matches(name, (*TOKENIZERS, *PROCESSORS)) for name in names):
        return folder, []
    why = f"none is found at {shown(model.name_or_path)}" if model.name_or_path else "it is not of a checkpoint"
    return folder, [f"no tokenizer or processor is written beside the model: {why}; give tokenizer="]


def _largest(batches: Batches) -> Batch:
    """Return the batch with the most entries."""
    return max(batches.batches, key=lambda batch: sum(x.numel() for x in batch.tensors))


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    """Compute the SHA-256 of tensors with their names, in hex."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_configs(model: nn.Module) -> None:
    """Refuse a model of transformers whose config the library does not write, which would end the run at its end.

    Raises:
        InputError: the config is invalid: for one, it has a temperature without sampling.
    """
    if getattr(type(model), "save_pretrained", None) is PreTrainedModel.save_pretrained:
        assert isinstance(model, PreTrainedModel)
        with explained_saving(model), TemporaryDirectory(prefix="sparsefw-") as folder:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)


def save(model: nn.Module, folder: Path) -> None:
    """Write a model into an empty folder by its own `save_pretrained`, or else as a single safetensors file.

    Raises:
        InputError: the model cannot be written.
    """
    own: Any = getattr(model, "save_pretrained", None)
    # safetensors refuses tensors that are parts of a larger one, as in models with one flat buffer: these are copied.
    slots = [] if own else slots_of(model.named_modules())
    parts = [slot for slot in slots if slot.own.untyped_storage().nbytes() > slot.own.nbytes]
    with explained_saving(model), filled(parts, lambda slot: slot.own.detach().clone()):
        if own:
            own(folder)
        else:
            safetensors.torch.save_model(model, str(folder / "model.safetensors"))


def explained_saving(model: nn.Module) -> AbstractContextManager[None]:
    """Turn an error of the library that writes a model inside the `with` block into an InputError of one line."""
    what, of_disk = f"model: {type(model).__name__} cannot be written", (OSError, SafetensorError)
    return errors_in_one_line(what, limit=600, passing=of_disk)
