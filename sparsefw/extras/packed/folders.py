"""Pack the matrices of a pruned checkpoint, so that its zeros take no space, and unpack them again.

Both commands read and write one shard at a time, into a hidden folder next to the output. An interrupted command
resumes after the last finished shard. Unpacking restores every tensor bit for bit.
"""

import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sparsefw.caller import to_logger
from sparsefw.checkpoint.files import check_output, durably, file_digest
from sparsefw.checkpoint.packed import FORMAT, MASK
from sparsefw.checkpoint.quantization import GUARD, KEY, without_quantization
from sparsefw.checkpoint.source import CONFIG, Checkpoint, inspect, stamps
from sparsefw.checkpoint.tensors import dequantized, read_tensors
from sparsefw.checkpoint.writer import Writer
from sparsefw.data.text import OWN_TEXT
from sparsefw.errors import InputError
from sparsefw.extras.packed.matrices import pack
from sparsefw.extras.packed.quantizer import METHOD, form_of, holds
from sparsefw.extras.page import write_pages
from sparsefw.model.skeleton import Skeleton, build, reads_weight
from sparsefw.report.content import Report, read_report, report_of
from sparsefw.selection import without_index
from sparsefw.solver import patterns
from sparsefw.solver.config import method_of
from sparsefw.solver.patterns import Pattern

REPORT = "report.json"

# Files that are copied from the source folder to the result.
COPIED = (REPORT, OWN_TEXT)

# transformers prints this if `sparsefw.packed` is not imported. A config has no entry that asks for a package.
ADVICE = "packed by sparsefw: install it from its repository, and import sparsefw.packed before from_pretrained"


def pack_folder(pruned: Path, packed: Path, *, overwrite: bool = False, restart: bool = False) -> tuple[int, int]:
    """Pack a pruned checkpoint.

    Args:
        pruned: the checkpoint's folder.
        packed: folder for the packed checkpoint.
        overwrite: whether an older checkpoint in `packed` may be replaced.
        restart: whether to discard the shards that an interrupted command has finished.

    Returns:
        Bytes of all tensors, before and after packing.

    Raises:
        InputError: there is no report of a run, the checkpoint is packed already, a matrix has more weights than the
            report allows, or no matrix can be packed.
    """
    report, checkpoint = report_of(pruned), inspect(pruned)
    if checkpoint.quantization:
        raise InputError(f"{pruned}: packed already; python -m sparsefw.unpack makes it dense again")
    pattern = patterns.parse(report.argument("sparsity", str))
    skeleton = build(checkpoint, as_named=report.in_memory)
    whole = not method_of(report.method).rows_independent or pattern.scope == "layer"
    whole &= pattern.scope != "group"
    kept = _budgets(skeleton, report, pattern, whole)
    if not kept:
        raise InputError(
            f"{pruned}: no matrix can be packed; those stay dense that keep nearly all, or are in no plain linear layer"
        )
    facts = {
        "quant_method": METHOD,
        "format": FORMAT,
        "sparsity": pattern.text,
        "budget": "layer" if whole else "row",
        "kept": 1 - float(pattern.sparsity),
        "parameters": generalized({skeleton.goes_into[name] for name in kept}, dict(skeleton.model.named_parameters())),
    }

    def packed_form(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name not in kept:
            return {name: tensor}
        return dict(zip((name, name + MASK), pack(name, tensor, kept[name], whole), strict=True))

    return rewrite(
        checkpoint,
        packed,
        checkpoint.config | {KEY: facts, GUARD: ADVICE},
        packed_form,
        overwrite=overwrite,
        restart=restart,
    )


def unpack_folder(packed: Path, output: Path, *, overwrite: bool = False, restart: bool = False) -> tuple[int, int]:
    """Make a packed checkpoint dense again, with the same bits. Arguments and result are those of `pack_folder`.

    Raises:
        InputError: the checkpoint is not packed, or is damaged.
    """
    checkpoint = inspect(packed)
    if checkpoint.quantization is None or checkpoint.quantization.method != METHOD:
        raise InputError(f"{packed}: not packed; give a folder that sparsefw has packed")
    return rewrite(
        checkpoint,
        output,
        without_quantization(checkpoint.config),
        lambda name, tensor: {name: tensor},
        overwrite=overwrite,
        restart=restart,
    )


def _budgets(skeleton: Skeleton, report: Report, pattern: Pattern, whole: bool) -> dict[str, int]:
    """Find the tensors that packing makes smaller; by name, the number of weights kept in each row.

    With `whole` the number is that of weights kept in the whole matrix.
    """
    sizes, inputs = Counter[str](), dict[str, int]()
    for layer in report.layers_of(report.method):
        if not layer.transposed:
            sizes[without_index(layer.name)] += math.prod(layer.shape)
            inputs[without_index(layer.name)] = layer.shape[1]
    model, infos, kept = skeleton.model, skeleton.checkpoint.tensors, dict[str, int]()
    for parameter, names in skeleton.names_of(infos).items():
        # A stacked parameter is packed only if all its slices were pruned. A tensor that is split into several
        # parameters stays dense, and so do buffers.
        stored = sum(math.prod(infos[name].shape) for name in names)
        if not stored == sizes[parameter] == model.get_parameter(parameter).numel():
            continue
        if reads_weight(model, parameter):
            continue
        if not holds(model.get_submodule(parameter.rpartition(".")[0]), model.get_parameter(parameter)):
            continue
        for name in names:
            info = infos[name]
            rows, cols = info.shape[-2:]
            width, most = patterns.budget(pattern, rows, cols, not whole)
            # A whole matrix's budget does not give the number of weights in a part, so parts are not packed then.
            if cols != inputs[parameter] or cols % 8 or (whole and (len(names) > 1 or len(info.shape) > 2)):
                continue
            if most / width + 1 / (8 * info.dtype.itemsize) < 1:
                kept[name] = most if whole else cols // width * most
    return kept


def generalized(chosen: set[str], parameters: Iterable[str]) -> list[str]:
    """Shorten names of parameters: `*` replaces the numbers in names if all parameters of such a name are chosen."""
    forms = defaultdict(set)
    for name in parameters:
        forms[form_of(name)].add(name)
    return sorted(x for form, names in forms.items() for x in ({form} if names <= chosen else names & chosen))


def rewrite(
    checkpoint: Checkpoint,
    output: Path,
    config: dict[str, Any],
    convert: Callable[[str, Tensor], dict[str, Tensor]],
    *,
    overwrite: bool,
    restart: bool,
) -> tuple[int, int]:
    """Write a copy of a checkpoint with converted tensors.

    Args:
        checkpoint: the checkpoint.
        output: folder for the copy.
        config: the content of the copy's config.json.
        convert: called with a tensor's name and the dequantized tensor; returns the tensors to write, by name.
        overwrite, restart: as for `pack_folder`.

    Returns:
        Bytes of all tensors, in the checkpoint and in the copy.
    """
    folder = checkpoint.folder
    check_output(output, folder, overwrite)
    files = defaultdict(list)
    for name, info in checkpoint.tensors.items():
        files[info.file].append(name)
    identity = {
        "source": str(folder.resolve()),
        "files": stamps(checkpoint),
        "config": file_digest(folder / CONFIG),
        "form": config,
    }
    with Writer(output, len(files), identity, source=folder, overwrite=overwrite, restart=restart) as writer:
        for n, file in enumerate(tqdm(sorted(files), unit="shard", disable=None)):
            if n in writer.records:
                continue
            read = read_tensors({name: checkpoint.tensors[name] for name in files[file]})
            tensors: dict[str, Tensor] = {}
            for name in files[file]:
                tensors |= convert(name, dequantized(read.pop(name)))
            writer.write(n, tensors)
        durably(writer.folder / CONFIG, json.dumps(config, indent=2) + "\n")
        for name in COPIED:
            if (folder / name).is_file():
                durably(writer.folder / name, partial(shutil.copyfile, folder / name))
        written = writer.folder / REPORT
        report = read_report(written) if written.is_file() else None
        writer.finish(partial(write_pages, report, writer.output, folder, to_logger) if report else None)
        before = sum(info.stored_nbytes for info in checkpoint.tensors.values())
        return before, writer.written
