"""Plan a run from the model's config alone: the content that the command prints and writes as JSON."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparsefw import memory
from sparsefw.arithmetic import computes_in_fp32
from sparsefw.checkpoint.quantization import MODEL_DTYPES, dtype_in, quantization_of
from sparsefw.checkpoint.source import CONFIG, INDEX, SINGLE, Checkpoint, checked_config, inspect, locate
from sparsefw.data.tokens import load_tokenizer
from sparsefw.data.windows import evaluation_windows, window_length
from sparsefw.errors import InputError, counted, fitted, option
from sparsefw.estimate.memory import GIB, MemoryNeeds, disk_space, memory_needs
from sparsefw.estimate.placement import (
    generation_batch,
    memory_limits,
    notes_of_recovery,
    place,
    placement_words,
    plan_recovery,
)
from sparsefw.estimate.profile import shape_of_text, without_weights
from sparsefw.estimate.shapes import ModelShape
from sparsefw.estimate.steps import reconstruction_line, reconstruction_steps
from sparsefw.estimate.workload import Workload, process_bytes, pruned_shape
from sparsefw.inputs import CARDS, DEFAULT, DEFAULT_MODEL, Inputs, Output
from sparsefw.model.activations import Placement
from sparsefw.solver.config import PruneConfig

CPU = torch.device("cpu")

# Bytes of host memory if the machine is not known: more than any machine has.
ENDLESS = 2**62


@dataclass(frozen=True)
class DescribedModel:
    """A model as its config describes it.

    Attributes:
        name: name of the model's class.
        shape: shape of the model.
        dtype: dtype of the weights.
        max_seqlen: tokens in the longest window that the model takes; None: the config does not say.
        notes: lines for the user: assumptions, and properties of the model.
    """

    name: str
    shape: ModelShape
    dtype: torch.dtype
    max_seqlen: int | None
    notes: list[str]


def describe(model: str, device: torch.device = CPU) -> DescribedModel:
    """Describe a model by its config. No other file is downloaded, and no weights are read.

    Args:
        model: a folder with a config.json, a config file, or a Hub id.
        device: the device that the model will run on.

    Raises:
        InputError: there is no such model; or its config is damaged, has impossible values, or describes a model that
            transformers does not know or cannot load.
    """
    path = Path(os.path.expanduser(model))
    if not path.is_file():
        path = locate(model, [CONFIG]) / CONFIG
    config = checked_config(path)
    quantization, notes = quantization_of(config, path), list[str]()
    folder = path.parent if path.name == CONFIG else path
    # If the weights are in the folder, they decide, as in a run: the config may differ from them.
    has_weights = path.name == CONFIG and any((folder / name).exists() for name in (SINGLE, INDEX))
    if has_weights:
        checkpoint = inspect(folder)
    else:
        dtype = dtype_in(config)
        if dtype is None:
            dtype = MODEL_DTYPES[0]
            notes.append(f"{path}: names no dtype of weights that can be pruned: taken for {dtype}")
        if quantization:
            notes.append(f"{path}: {quantization.form}: converted to {str(dtype).removeprefix('torch.')}")
        checkpoint = Checkpoint(folder, {}, {}, dtype)
    with without_weights(checkpoint, computes_in_fp32(checkpoint.dtype, device)) as built:
        shape = shape_of_text(built)
    if not has_weights:
        # Assume that each expert is a separate tensor, and that all tensors are quantized.
        sizes = (layer.experts * layer.rows * layer.d for block in shape.kinds for layer in block.layers)
        stored_share = quantization.share(checkpoint.dtype) if quantization else 0
        shape = replace(
            shape,
            joined_bytes=checkpoint.dtype.itemsize * max(sizes, default=0),
            quantized_bytes=shape.quantized_bytes + int(stored_share * shape.written_ratio * shape.largest),
        )
    return DescribedModel(built.class_name, shape, checkpoint.dtype, built.max_seqlen, notes + built.notes)


def plan(inputs: Inputs, config: PruneConfig, output: Output, card: str | None) -> dict[str, Any]:
    """Make the content of a plan, as --json writes it; sizes are in bytes.

    Args:
        inputs, config, output: the settings of the run.
        card: the GPU to plan for, one of CARDS, on a host with unlimited memory; None: this machine.

    Raises:
        InputError: there is no such model or layer, memory is too little, or `output` limits a GPU that does not exist.
    """
    free = {"gpu": CARDS[card] * 10**9, "host": ENDLESS} if card else memory.free_memory(memory.this_device())
    limits = memory_limits(output.gpu_memory, output.host_memory, free)
    gpu = "gpu" in limits
    model = str(DEFAULT_MODEL) if inputs.built_in else inputs.model
    described = describe(model, torch.device("cuda" if gpu else "cpu"))
    shape, notes = pruned_shape(described.shape, config), list(described.notes)
    seqlen = window_length(inputs.model, inputs.seqlen, described.max_seqlen)
    if seqlen < inputs.seqlen:
        notes.append(f"seqlen: {seqlen} tokens, the model's maximum (asked for {inputs.seqlen})")
    config = config.for_calibration(inputs.nsamples, seqlen)
    evaluation = tuple(_evaluation_windows(inputs, name, seqlen) for name in dict.fromkeys(inputs.evaluate))
    process = process_bytes(inputs, evaluation, seqlen, 0 if card else memory.resident())
    workload = Workload(inputs.nsamples, evaluation, seqlen, config, gpu, process)
    placement = place(shape, workload, limits, output.folder.resolve().parent)
    generated = generation_batch(shape, workload, limits, inputs)
    needs = memory_needs(shape, replace(workload, generated=generated), placement)
    recovery = plan_recovery(shape, workload, limits)
    notes += notes_of_recovery(recovery, config.recover, output.hours)
    by_hours = config.recover is None and output.hours is not None
    workload = replace(workload, config=config.replace(recover=recovery.tokens))
    needs = MemoryNeeds(needs.phases | recovery.needs.phases)
    return {
        "model": {
            "name": inputs.model,
            "class": described.name,
            "dtype": str(described.dtype).removeprefix("torch."),
            "parameters": shape.parameters,
            "blocks": len(shape.blocks),
        },
        "workload": {
            "windows": inputs.nsamples,
            "evaluation": list(evaluation),
            "seqlen": seqlen,
            "methods": list(config.methods),
            "sparsity": config.pattern.text,
            "target": "dense" if config.uses_dense_target else "layer",
            "precision": config.precision,
        },
        "device": card or f"this machine's {'GPU' if gpu else 'CPU'}",
        "limits": {what: None if size > ENDLESS // 2 else size for what, size in limits.items()},
        "memory": {phase: dict(zip(("gpu", "host"), peaks, strict=True)) for phase, peaks in needs.phases.items()},
        "placement": asdict(placement) | {"folder": str(placement.folder)},
        "disk": disk_space(shape, workload, placement),
        "reconstruction": reconstruction_steps(workload, placement),
        "recovery": {"tokens": None if by_hours else recovery.tokens, "hours": output.hours, "reruns": recovery.reruns},
        "notes": notes,
    }


def _evaluation_windows(inputs: Inputs, name: str, seqlen: int) -> int:
    """Return the number of windows of an evaluation text. Only the text of the built-in model is read to count them."""
    if inputs.eval_windows is not None:
        return inputs.eval_windows
    if not inputs.built_in or name != DEFAULT:
        how_long = f"give the number of its windows with {option('eval_windows')}"
        raise InputError(f"{option('evaluate', name)}: a plan reads no texts; {how_long}")
    return evaluation_windows(load_tokenizer(DEFAULT_MODEL), name, seqlen=seqlen).n


def lines(content: dict[str, Any]) -> Iterator[str]:
    """Yield a plan in words, line by line."""
    model, workload, limits, disk = (content[name] for name in ("model", "workload", "limits", "disk"))
    yield (
        f"model: {model['name']}, {model['class']}, {model['parameters']:,} parameters, "
        f"{counted(model['blocks'], 'block')}, {model['dtype']}"
    )
    evaluation = " + ".join(map(str, workload["evaluation"]))
    evaluated = f", {evaluation} for evaluation" if evaluation else ""
    yield f"windows: {workload['windows']} of {workload['seqlen']} tokens{evaluated}"
    yield (
        f"prune: {workload['sparsity']} by {', '.join(workload['methods'])}, target {workload['target']}, "
        f"products in {workload['precision']}"
    )
    yield ""
    yield f"{'peak memory, GiB':16} {'GPU':>10} {'host':>10}"
    peaks = content["memory"]
    peaks = peaks | {"all": {what: max(peak[what] for peak in peaks.values()) for what in ("gpu", "host")}}
    for phase, peak in (peaks | {"limit": {"gpu": 0} | limits}).items():
        gpu, host = ("any" if peak[what] is None else f"{peak[what] / GIB:.2f}" for what in ("gpu", "host"))
        yield f"{phase:16} {gpu:>10} {host:>10}"
    yield ""
    yield f"device: {content['device']}"
    yield from fitted(f"placement: {placement_words(Placement(**content['placement']), 'gpu' in limits)}")
    yield from fitted(
        f"disk: {disk['output'] / 1e9:.2f} GB of output; during the run also {disk['kept'] / 1e9:.2f} GB of compared "
        f"methods and of blocks before the recovery, {disk['activations'] / 1e9:.2f} GB of activations"
    )
    if content["reconstruction"]:
        yield reconstruction_line(content["reconstruction"])
    tokens, hours, reruns = content["recovery"].values()
    if tokens != 0:
        amount = f"as many tokens as fit into {hours:g} hours" if tokens is None else f"{tokens:,} tokens"
        yield f"recovery of the whole model: {amount}" + ", blocks run again in the backward" * reruns
    yield from (f"note: {note}" for note in content["notes"])
