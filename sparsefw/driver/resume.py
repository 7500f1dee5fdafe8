"""Resume an unfinished run: compare the values of both runs, take over choices, and replay the finished blocks."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparsefw import arithmetic
from sparsefw.checkpoint.files import file_digest
from sparsefw.checkpoint.tensors import read_shard
from sparsefw.checkpoint.writer import Writer
from sparsefw.driver.job import Job, Run
from sparsefw.driver.streams import DENSE, Streams, advance
from sparsefw.errors import flag_of
from sparsefw.model.block_model import BlockModel
from sparsefw.report import content

# Inputs that a resumed run may name differently, since their contents are compared. And the recovery, which begins when
# all blocks are pruned: a resumed run may ask for another one, or for none.
MAY_DIFFER = {"model", "dataset", "recover"}

# Names of the two choices of arithmetic, which a resumed run takes over from the unfinished run.
IN_FP32 = "whether it computes in fp32"
ROUNDED = "whether steps of a reconstruction round the operands of their products"


def resumed(job: Job) -> Job:
    """Add to a job the identity and the choices of the unfinished run in its output folder, if there is one."""
    begun = job.ranks.on_first(lambda: Writer(job.output.folder, 0, restart=job.output.restart).begun())
    return replace(job, begun=begun)


def computes_in_fp32(job: Job, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether the model computes in fp32.

    A resumed run does as the unfinished run, and logs it if `arithmetic.computes_in_fp32` would choose differently.
    """
    found = arithmetic.computes_in_fp32(dtype, device)
    begun = job.begun.get("identity", {}).get(IN_FP32, found)
    if begun == found or dtype not in arithmetic.HALF:
        return found
    own = str(dtype).removeprefix("torch.")
    job.say(f"computed in {'fp32' if begun else own}, as in the unfinished run that this one resumes")
    return begun


def rounds_products(job: Job, model: BlockModel, dtype: torch.dtype, width: int) -> bool:
    """Tell whether the steps of reconstructions and of a recovery round the operands of their products.

    They do not if the user asks for exact products. A resumed run does as the unfinished run, also where it has no
    recovery any more. Else `arithmetic.rounds_products` decides.
    """
    if job.config.given.get("precision") in ("ieee", "tf32x3"):
        return False
    begun = job.begun.get("identity", {})
    if ROUNDED in begun or (not job.config.reconstruct and job.config.recover == 0):
        return begun.get(ROUNDED, False)
    return arithmetic.rounds_products(torch.float32 if model.in_fp32 else dtype, model.device, width)


def identity(run: Run) -> dict[str, Any]:
    """Collect the values that a resumed run must share with the unfinished one, by their names in messages."""
    values = asdict(run.job.inputs) | asdict(run.config)
    for name in ("include", "ignore"):
        # The order of the patterns makes no difference.
        values[name] = sorted(values[name])
    flags = {flag_of(name): value for name, value in values.items() if name not in MAY_DIFFER}
    texts = {f"the evaluation text {samples.source}": samples.hash for samples in run.evaluation}
    # Text that the unfinished run has generated is taken over, so its hash tells nothing of other prompts.
    own = run.job.inputs.own
    prompts = Path(os.path.expanduser((own or "").partition("=")[2]))
    written = {
        "the text that the model writes": own,
        "its prompts": file_digest(prompts) if prompts.is_file() else None,
    }
    read = {"the model": run.fingerprint, "the calibration text": run.calibration.hash} | written | texts
    work = {IN_FP32: run.model.in_fp32, ROUNDED: run.rounded, "the number of ranks": run.ranks.count}
    return flags | read | work | content.device_and_versions(run.model.device)


def replay_block(run: Run, i: int, streams: Streams, writer: Writer) -> None:
    """Move all windows through block i, which an unfinished run has pruned, or which repeats an earlier block."""
    model = run.model
    if streams.of(DENSE):
        model.open(i, run.placement.ahead)
        advance(run, i, "forward", streams.of(DENSE))
    for method in run.config.methods:
        with model.timeline.span("read", i):
            tensors = None
            if i in model.unique_blocks:
                path = writer.path(model.unique_blocks.index(i), None if method == run.config.method else method)
                tensors = read_shard(path)
            model.open_alone(i, tensors)
        advance(run, i, "forward", streams.of(method))
    model.close(i)
