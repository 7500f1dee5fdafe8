"""A run on a model in memory, calibrated on text, or on batches of arguments of the model's forward.

The model's own library writes the pruned model.
"""

import hashlib
import json
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
from transformers import PreTrainedConfig, PreTrainedModel

from sparsefw.checkpoint.source import (
    PROCESSORS,
    SMALL_FILES,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    companions,
    locate,
    matches,
)
from sparsefw.checkpoint.writer import Describe, Writer, copy_companions
from sparsefw.data.batches import Batch, Batches, bytes_of
from sparsefw.driver.job import Job, Run
from sparsefw.driver.resume import computes_in_fp32, resumed
from sparsefw.driver.run import carry_out, settled
from sparsefw.driver.texts import Texts, read_texts, with_defaults
from sparsefw.errors import InputError, errors_in_one_line, shown
from sparsefw.estimate.profile import shape_of_resident, shape_of_text
from sparsefw.memory import on_gpu, this_device
from sparsefw.model.block_model import ResidentModel, resident
from sparsefw.model.head import check_losses
from sparsefw.model.swap import filled, slots_of
from sparsefw.ranks import check_gpus
from sparsefw.report.content import Report


def run_in_memory(
    model: nn.Module,
    job: Job,
    batches: tuple[Batches, Batches | None] | None,
    saves: bool,
) -> Report:
    """Prune a model in place, evaluate it, and write it with its report.

    The model's weights change at the very end: an earlier error leaves the model unchanged.

    Args:
        model: the model.
        job: the run. Each of its ranks has the model and all batches.
        batches: the calibration batches, and the evaluation batches or None. For evaluation batches the model returns a
            loss. None in place of both: the job names texts, and the model is a transformers model.
        saves: whether the pruned model is written, and not only the report.

    Raises:
        InputError: an input is wrong; the message names it.
        FloatingPointError: a layer's error is not finite.
    """
    if saves:
        check_configs(model)
    job, batch = resumed(job), None if batches is None else _largest(batches[0])
    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    device = this_device() if device.type == "cpu" else device
    source, notes = _source(model, job.tokenizer) if saves and job.ranks.first else (None, [])
    # `no_grad` is for a caller's model, whose parameters may require gradients.
    with on_gpu(device), torch.no_grad(), resident(model, batch, device, partial(computes_in_fp32, job)) as opened:
        check_gpus(job.ranks, device.type == "cuda")
        opened.notes += notes
        run = _settled(job, opened, batches, saves, source)

        def finish(writer: Writer, describe: Describe) -> None:
            pruned: dict[int, Tensor] = {}
            for n, i in enumerate(opened.unique_blocks):
                # Files are mapped and not read, since a second model may not fit into memory.
                pruned |= opened.changes(i, safetensors.torch.load_file(writer.latest(n)))
            slots = [slot for slot in slots_of(model.named_modules()) if id(slot.own) in pruned]
            opened.set_back()
            if saves and job.ranks.first:
                # The disk may be full. Then the model is unchanged, and the same call goes on.
                with filled(slots, lambda slot: pruned[id(slot.own)]):
                    save(model, writer.folder)
                if job.tokenizer is not None:
                    job.tokenizer.save_pretrained(writer.folder)
                if source is not None:
                    # Tokenizer files of the source would contradict the caller's tokenizer.
                    config = writer.folder / TOKENIZER_CONFIG
                    copy_companions(source, writer.folder, TOKENIZERS if config.exists() else ())
            writer.finish(describe if saves else None)
            # A tensor made in inference mode can only be written to in inference mode.
            with torch.inference_mode():
                for slot in slots:
                    slot.own.copy_(pruned[id(slot.own)])
            # The files of the first rank go when it leaves.
            job.ranks.barrier()

        return carry_out(run, finish)


def _settled(
    job: Job,
    opened: ResidentModel,
    batches: tuple[Batches, Batches | None] | None,
    saves: bool,
    source: Path | None,
) -> Run:
    """Make the run of a job: on the texts that the job names, or on batches."""
    if batches is None:
        model: Any = opened.model
        of_language = model.can_generate() and not model.config.is_encoder_decoder
        if job.inputs.evaluate and not (of_language and opened.logits_itemsize):
            raise InputError(f"evaluate: {opened.class_name} predicts no next tokens, which perplexity needs")
        whole = shape_of_text(opened)
        job, texts = read_texts(job, opened, whole)
    else:
        calibration, evaluated = batches
        whole, seqlen = shape_of_resident(opened, _largest(calibration))
        tokens = _tokens_without_padding(calibration, seqlen, opened.notes)
        if evaluated:
            check_losses(opened, evaluated.batches)
        texts = Texts(calibration, [evaluated] if evaluated else [], seqlen)
        job = replace(job, inputs=replace(job.inputs, seqlen=max(2, seqlen)))
        # Batches may have different sizes, so the mean number of their tokens counts.
        job = with_defaults(job, calibration.n, tokens // calibration.n or seqlen)
    # A state dict may also hold objects that are not tensors.
    tensors = {name: value for name, value in opened.model.state_dict().items() if isinstance(value, Tensor)}
    run = Run(
        job,
        opened,
        f"{opened.class_name} in memory",
        next(opened.model.parameters()).dtype,
        whole,
        **vars(texts),
        notes=opened.notes,
        fingerprint=_fingerprint(dict(opened.model.named_buffers()) | tensors, getattr(opened.model, "config", None)),
        source=source,
    )
    saved = sum(tensor.nbytes for tensor in tensors.values()) if saves else 0
    return settled(run, saved)


def _tokens_without_padding(calibration: Batches, seqlen: int, notes: list[str]) -> int:
    """Count the tokens of batches, except padding, and add a note if there is padding.

    The result is 0 if not every batch has an attention mask with an entry for each position.
    """
    masks = [x for batch in calibration.batches if isinstance(x := batch.kwargs.get("attention_mask"), Tensor)]
    # An attention mask of sound has an entry for each sample, but several samples make one position.
    if len(masks) != calibration.n or max(x.numel() for x in masks) != seqlen:
        return 0
    tokens, positions = sum(int((x != 0).sum()) for x in masks), sum(x.numel() for x in masks)
    if tokens < positions:
        notes.append(f"{tokens} of {positions} positions count, the others are padding")
    return tokens


def _source(model: nn.Module, tokenizer: Any) -> tuple[Path | None, list[str]]:
    """Find the folder that a transformers model was loaded from. Its small files are copied to the output.

    Returns:
        The folder or None, and a note if neither the folder nor the caller has a tokenizer or a processor.
    """
    if not isinstance(model, PreTrainedModel):
        return None, []
    folder: Path | None = None
    names: list[str] = []
    with suppress(InputError):
        if model.name_or_path:
            found = locate(model.name_or_path, SMALL_FILES)
            # `companions` refuses links out of the folder. Called here, it does so before the run and not at its end.
            names, folder = [path.name.lower() for path in companions(found)], found
    if tokenizer is not None or any(matches(name, (*TOKENIZERS, *PROCESSORS)) for name in names):
        return folder, []
    loaded_from = model.name_or_path
    why = f"none is found at {shown(loaded_from)}" if loaded_from else "the model was not loaded from a folder"
    return folder, [f"no tokenizer or processor is written with the model: {why}; give tokenizer="]


def _largest(batches: Batches) -> Batch:
    """Return the batch with the most entries."""
    return max(batches.batches, key=lambda batch: sum(x.numel() for x in batch.tensors))


def _fingerprint(tensors: dict[str, Tensor], config: Any) -> str:
    """Compute the SHA-256 of tensors with their names and of a config of transformers, in hex."""
    digest = hashlib.sha256()
    if isinstance(config, PreTrainedConfig):
        # The same model may have moved.
        known = config.to_dict() | {"_name_or_path": None, "attention": config._attn_implementation}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def check_configs(model: nn.Module) -> None:
    """Refuse a transformers model with a config that cannot be written, before the run and not at its end.

    Raises:
        InputError: the config is invalid, such as one that has a temperature without sampling.
    """
    if isinstance(model, PreTrainedModel) and type(model).save_pretrained is PreTrainedModel.save_pretrained:
        with explained_saving(model), TemporaryDirectory(prefix="sparsefw-") as folder:
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)


def save(model: nn.Module, folder: Path) -> None:
    """Write a model into an empty folder by its `save_pretrained`. Without this method, write one safetensors file.

    Raises:
        InputError: the model cannot be written.
    """
    own = getattr(model, "save_pretrained", None)
    # safetensors refuses tensors that are views of a larger one, as in models with one flat buffer. So they are copied.
    slots = [] if own else slots_of(model.named_modules())
    parts = [slot for slot in slots if slot.own.untyped_storage().nbytes() > slot.own.nbytes]
    with explained_saving(model), filled(parts, lambda slot: slot.own.detach().clone()):
        if own:
            own(folder)
        else:
            safetensors.torch.save_model(model, str(folder / "model.safetensors"))


def explained_saving(model: nn.Module) -> AbstractContextManager[None]:
    """Turn an error of writing a model inside the `with` block into an InputError of one line.

    Errors of the disk are raised unchanged.
    """
    what, of_disk = f"model: {type(model).__name__} cannot be written", (OSError, SafetensorError)
    return errors_in_one_line(what, limit=600, passing=of_disk)
