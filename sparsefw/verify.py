"""Check a pruned checkpoint against its report and its source: `python -m sparsefw.verify OUTPUT [--against MODEL]`.

Everything is read again from the files, block by block: they are sound, no more weights are left than the pattern
allows, and all that was not pruned is the source's, bit for bit. Exit status 0: all is well; 1: a check failed, and the
culprits are listed; 2: there is nothing to check.
"""

import argparse
import filecmp
import json
import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from sparsefw import checkpoint
from sparsefw.checkpoint.source import CONFIG, INDEX, SINGLE, Checkpoint
from sparsefw.checks.claims import read_claims
from sparsefw.checks.verdict import Check, Verdict, lines
from sparsefw.checks.weights import check_weights
from sparsefw.errors import InputError
from sparsefw.model.streamed import StreamedModel
from sparsefw.run import DEFAULT, DEFAULT_MODEL, Parser

REPORT = "report.json"
# What a run puts beside the checkpoint, in the place of the source's where that is the output of a run, too.
OWN = (REPORT, "report.html")


def verify(output: Path, against: str | None = None) -> Verdict:
    """Check a checkpoint that `sparsefw.run` wrote.

    Args:
        output: its folder.
        against: the source, a folder or Hub id; None: what the report names, where that is a folder here.

    Raises:
        InputError: the output is no checkpoint with a report, or the source cannot be used.
    """
    if not output.is_dir():
        raise InputError(f"{output}: no such folder; give one that sparsefw.run wrote")
    claims = read_claims(output / REPORT)
    if not (output / CONFIG).is_file() or not any(os.path.lexists(output / name) for name in (SINGLE, INDEX)):
        raise InputError(f"{output}: not a checkpoint; give a folder that sparsefw.run wrote")
    source, not_compared = _find_source(claims.model, output, against)
    checks = {
        "files": Check("shards, index and sizes agree"),
        "finite": Check("no NaN, no Inf"),
        "copied": Check("config, tokenizer and the like are the source's", "files"),
        "shapes": Check("names, shapes and dtypes are the source's"),
        "model": Check("transformers loads it, no tensor is missing", "blocks"),
        "report": Check("it names all matrices of blocks, pruned or dense", "layers"),
        "pattern": Check(f"no more weights than {claims.pattern.text} keeps", "layers"),
        "kept": Check("kept weights are the source's, bit for bit", "layers"),
        "others": Check("all but the pruned layers is the source's, bit for bit"),
    }
    verdict = Verdict(checks, not_compared=not_compared)
    if claims.refits:
        verdict.skip("kept weights were refitted", "kept")
    if source is None:
        verdict.skip("no source", "copied", "shapes", "kept", "others")
    else:
        _check_copied(checks["copied"], output, source.folder)
    try:
        written = checkpoint.inspect(output)
    except InputError as error:
        checks["files"].failures.append(str(error))
        verdict.skip("the files are not sound", *checks.keys() - {"copied", "files"})
        return verdict
    _check_files(checks["files"], written)
    _check_finite(checks["finite"], written)
    dtypes: dict[str, torch.dtype] = {}
    try:
        model = StreamedModel(written, torch.device("cpu"))
    except InputError as error:
        checks["model"].failures.append(str(error))
        verdict.skip("the model does not load", "report", "pattern", "kept", "others")
    else:
        dtypes = check_weights(verdict, claims, model, source)
    if source:
        _check_shapes(checks["shapes"], written, source, dtypes)
    return verdict


def _find_source(model: str, output: Path, against: str | None) -> tuple[Checkpoint | None, str]:
    """The source, or why there is none: only one that was asked for has to be there."""
    asked = model if against is None else against
    if asked == DEFAULT:
        return checkpoint.inspect(DEFAULT_MODEL), ""
    if against is None and not os.path.isdir(os.path.expanduser(model)):
        return None, f"{model or 'the report'}: no such folder here; name the source with --against"
    folder = checkpoint.locate(asked)
    if folder.resolve() == output.resolve():
        raise InputError(f"{asked}: the output itself; name the checkpoint that was pruned with --against")
    try:
        return checkpoint.inspect(folder), ""
    except InputError as error:
        if against is None:
            return None, str(error)
        raise


def _check_files(check: Check, written: Checkpoint) -> None:
    folder, tensors = written.folder, written.tensors
    check.count = len(tensors)
    if os.path.lexists(folder / SINGLE):
        check.fail(SINGLE, f"not written by sparsefw.run, and read in place of what {INDEX} lists")
        return
    said = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("metadata")
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    for key, held in (("total_size", written.nbytes), ("total_parameters", parameters)):
        value = said.get(key) if isinstance(said, dict) else None
        if value != held:
            check.fail(INDEX, f"{key} is {value}, the shards hold {held}")
    for name in sorted({path.name for path in folder.glob("*.safetensors")} - {t.file.name for t in tensors.values()}):
        check.fail(name, f"not in {INDEX}")


def _check_finite(check: Check, written: Checkpoint) -> None:
    files: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in written.tensors.items():
        files[tensor.file].append(name)
    for path, names in files.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                check.count += 1
                try:
                    checkpoint.check_finite(name, file.get_tensor(name))
                except InputError as error:
                    check.failures.append(str(error))


def _check_copied(check: Check, output: Path, source: Path) -> None:
    for path in checkpoint.companions(source):
        if path.name in OWN:
            continue
        check.count += 1
        if not (output / path.name).is_file():
            check.fail(path.name, "missing")
        elif not filecmp.cmp(path, output / path.name, shallow=False):
            check.fail(path.name, "not the source's")


def _check_shapes(check: Check, written: Checkpoint, source: Checkpoint, dtypes: dict[str, torch.dtype]) -> None:
    """Compare headers.

    Args:
        check: takes the failures.
        written, source: the checkpoints.
        dtypes: of the source's parameters as the model has them, which may not be those of its files.
    """
    for name, here in written.tensors.items():
        check.count += 1
        there = source.tensors.get(name)
        if there is None:
            # The model may have another name for it than the source's files.
            if name not in dtypes:
                check.fail(name, "not in the source")
        elif here.shape != there.shape:
            check.fail(name, f"has shape {here.shape}, in the source {there.shape}")
        elif here.dtype not in (there.dtype, dtypes.get(name, source.dtype)):
            check.fail(name, f"is {here.dtype}, in the source {there.dtype}")


def main(argv: list[str] | None = None) -> int:
    """Verify from the command line.

    Returns:
        The exit status: 0 (all is well), 1 (a check failed), 2 (bad input), 130 (interrupted).
    """
    parser = Parser(prog="python -m sparsefw.verify", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder that sparsefw.run wrote")
    parser.add_argument("--against", metavar="ID|PATH", help="the checkpoint that was pruned (default: what the report "
        "names, where that is a folder here)")  # fmt: skip
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        verdict = verify(arguments.output, arguments.against)
        for line in lines(verdict):
            print(_printable(line))
    except (InputError, OSError, SafetensorError) as error:
        print(f"sparsefw: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparsefw: interrupted", file=sys.stderr)
        return 130
    return 1 if verdict.failed else 0


def _printable(text: str) -> str:
    """Names come from the files, and may hold what a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text)


if __name__ == "__main__":
    sys.exit(main())
