"""The plan of a run: what `sparsefw.plan` prints and writes as JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsefw import data, memory
from sparsefw.errors import InputError, counted
from sparsefw.estimate.describe import describe
from sparsefw.estimate.memory import GIB, disk_space
from sparsefw.estimate.placement import memory_limits, place
from sparsefw.estimate.workload import PROCESS, Workload, pruned_shape
from sparsefw.inputs import DEFAULT, DEFAULT_MODEL, Inputs
from sparsefw.solver.config import PruneConfig

# Memory of a card as it is sold, in 10^9 bytes. The chips hold a little more, which is left to the driver.
CARDS = {
    "a10": 24,
    "a100-40gb": 40,
    "a100-80gb": 80,
    "a6000": 48,
    "b200": 180,
    "h100": 80,
    "h200": 141,
    "l4": 24,
    "l40s": 48,
    "rtx3090": 24,
    "rtx4090": 24,
    "rtx5090": 32,
    "v100-32gb": 32,
}

# Stands for no memory limit, in bytes: more than any machine has.
UNLIMITED = 2**62

PLACES = {"gpu": "on the device", "host": "in host memory", "file": "in a file in {folder}"}


def limits_of(card: str | None, gpu_memory: float | None, host_memory: float | None) -> dict[str, int]:
    """Memory limits in bytes: "host", and with a GPU "gpu".

    Args:
        card: the GPU, one of CARDS; None: this machine's, if there is one.
        gpu_memory, host_memory: limits in GiB; None: what the card has or what is free here, less a tenth. Beside a
            card the host has no limit.

    Raises:
        InputError: there is a limit for a GPU, and no GPU.
    """
    given = {"gpu": gpu_memory, "host": host_memory}
    if card is None:
        return memory_limits(gpu_memory, host_memory, memory.this_device())
    limits = {"gpu": int(CARDS[card] * 10**9 * (1 - memory.MARGIN)), "host": UNLIMITED}
    return limits | {what: int(gib * GIB) for what, gib in given.items() if gib is not None}


def plan(inputs: Inputs, config: PruneConfig, card: str | None, limits: dict[str, int], folder: Path) -> dict[str, Any]:
    """The content of --json; sizes in bytes.

    Args:
        inputs, config: inputs and config of the run.
        card: the card that it is planned for; None: this machine.
        limits: memory limits from `limits_of`.
        folder: folder of the output, and of the file of activations if there is one.

    Raises:
        InputError: there is no such model or layer, or memory is too little.
    """
    described = describe(str(DEFAULT_MODEL) if inputs.embedded else inputs.model)
    shape = pruned_shape(described.shape, config)
    seqlen = data.window_length(inputs.model, inputs.seqlen, described.max_seqlen)
    evaluation = tuple(_evaluation_windows(inputs, name, seqlen) for name in dict.fromkeys(inputs.evaluate))
    workload = Workload(
        windows=inputs.nsamples,
        evaluation=evaluation,
        seqlen=seqlen,
        config=config.for_calibration(inputs.nsamples, seqlen),
        gpu="gpu" in limits,
        threads=torch.get_num_threads() if config.kernel == "torch" else 1,
        process=PROCESS + data.window_bytes(inputs.nsamples, evaluation, seqlen),
    )
    config = workload.config
    placement, needs = place(shape, workload, limits, folder)
    notes = list(described.notes)
    if seqlen < inputs.seqlen:
        notes.append(f"seqlen: {seqlen} tokens, the model's maximum (asked for {inputs.seqlen})")
    return {
        "model": {
            "name": inputs.model,
            "class": described.name,
            "dtype": str(described.dtype).removeprefix("torch."),
            "parameters": shape.parameters,
            "blocks": len(shape.blocks),
        },
        "workload": {
            "windows": workload.windows,
            "evaluation": list(evaluation),
            "seqlen": seqlen,
            "methods": list(config.methods),
            "sparsity": config.pattern.text,
            "target": "dense" if config.uses_dense_target else "layer",
            "precision": config.precision,
        },
        "device": card or f"this machine's {'GPU' if workload.gpu else 'CPU'}",
        "limits": {what: None if size == UNLIMITED else size for what, size in limits.items()},
        "memory": {phase: {"gpu": gpu, "host": host} for phase, (gpu, host) in needs.phases.items()},
        "placement": asdict(placement) | {"folder": str(placement.folder)},
        "disk": disk_space(shape, workload, placement),
        "notes": notes,
    }


def _evaluation_windows(inputs: Inputs, name: str, seqlen: int) -> int:
    """The number of windows of an evaluation text. The embedded model's own text is read, no other."""
    if inputs.eval_windows is not None:
        return inputs.eval_windows
    if not inputs.embedded or name != DEFAULT:
        raise InputError(f"--eval {name}: texts are not read here; say how long it is with --eval-windows")
    return data.evaluation_windows(data.load_tokenizer(DEFAULT_MODEL), name, seqlen=seqlen).n


def lines(content: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed of a plan's content."""
    model, workload, placement = content["model"], content["workload"], content["placement"]
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
    peaks = {phase: (peak["gpu"] / GIB, peak["host"] / GIB) for phase, peak in content["memory"].items()}
    peaks["all"] = max(gpu for gpu, _ in peaks.values()), max(host for _, host in peaks.values())
    yield f"{'peak memory, GiB':16} {'GPU':>10} {'host':>10}"
    yield from (f"{phase:16} {gpu:10.2f} {host:10.2f}" for phase, (gpu, host) in peaks.items())
    limits = [content["limits"].get(what, 0) for what in ("gpu", "host")]
    gpu, host = ("any" if limit is None else f"{limit / GIB:.2f}" for limit in limits)
    yield f"{'limit':16} {gpu:>10} {host:>10}"
    yield ""
    yield f"device: {content['device']}"
    where = PLACES[placement["place"]].format(folder=placement["folder"])
    together = "the next block is read and the last one written meanwhile"
    ahead = together if placement["ahead"] else "blocks one after another"
    kept = f", inputs of up to {placement['kept_width']} entries kept" if placement["kept_width"] else ""
    yield (
        f"placement: micro-batches of {counted(placement['batch'], 'window')}, activations {where}, {ahead}, "
        f"solves in {placement['solver'] / GIB:.2f} GiB{kept}"
    )
    disk = content["disk"]
    yield (
        f"disk: {disk['output'] / 1e9:.2f} GB of output; until the end also {disk['kept'] / 1e9:.2f} GB of compared "
        f"methods, {disk['activations'] / 1e9:.2f} GB of activations"
    )
    yield from (f"note: {note}" for note in content["notes"])
