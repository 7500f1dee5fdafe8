"""Check a written checkpoint: its files, its report, and its weights, against the source where there is one."""

import filecmp
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from sparsefw import checkpoint
from sparsefw.checkpoint import CONFIG, DIGEST, INDEX, SINGLE, SUMS, Checkpoint, file_digest
from sparsefw.checks.claims import Claims, read_claims
from sparsefw.checks.in_memory import IN_MEMORY, check_in_memory
from sparsefw.checks.shared import check_same, share_out
from sparsefw.checks.sums import check_sums
from sparsefw.checks.verdict import Check, Verdict, lines
from sparsefw.checks.weights import check_weights
from sparsefw.errors import InputError
from sparsefw.finite import check_finite
from sparsefw.inputs import DEFAULT, DEFAULT_MODEL
from sparsefw.model import StreamedModel
from sparsefw.ranks import ALONE, Ranks, balanced
from sparsefw.report.environment import versions

REPORT = "report.json"


def verify(output: Path, against: str | None = None, digest: str | None = None, ranks: Ranks = ALONE) -> Verdict:
    """Check a checkpoint that `sparsefw.run` wrote.

    Args:
        output: folder of the checkpoint.
        against: the source, a folder or Hub id; None: the report's, if that is a folder here.
        digest: SHA-256 of the output's SHA256SUMS, as the run has printed it; None: not compared.
        ranks: the processes that share the work; all of them have the same arguments.

    Returns:
        The verdict, on all ranks the same.

    Raises:
        InputError: the output is no checkpoint with a report, the source cannot be used, the digest is none, or ranks
            do not see the same files.
    """
    ranks.agree({"OUTPUT": str(output.resolve()), "--against": against, "--digest": digest} | versions())
    if digest is not None and not DIGEST.fullmatch(digest):
        raise InputError(f"--digest {digest}: expected 64 digits of 0 to 9 and a to f, as the run has printed them")
    sees = ranks.gather(output.is_dir())
    if not any(sees):
        raise InputError(f"{output}: no such folder; give one that sparsefw.run wrote")
    if not all(sees):
        raise InputError(f"{output}: rank {sees.index(False)} does not see it; put it where all machines see it")
    claims = read_claims(output / REPORT)
    check_same(ranks, file_digest(output / REPORT))
    verdict = Verdict(_checks_of(claims))
    if claims.refits:
        verdict.skip("kept weights were refitted", "kept")
    if not claims.keeps_zeros:
        verdict.skip("--keep-zeros was not given", "zeros")
    if claims.on_batches:
        _check_batches(verdict, claims, output, against, digest, ranks)
        return ranks.tell(verdict)
    _check_text(verdict, claims, output, against, digest, ranks)
    check_same(ranks, [*lines(verdict)])
    return verdict


def _check_batches(
    verdict: Verdict, claims: Claims, output: Path, against: str | None, digest: str | None, ranks: Ranks
) -> None:
    """Check a model that was pruned in memory, on batches. Only rank 0 has the whole verdict."""
    source = None if against is None else ranks.first_here(lambda: _locate(against, output))
    verdict.digest = check_sums(verdict.checks["sums"], output, digest, ranks)
    check_same(ranks, verdict.digest)
    if ranks.first:
        check_in_memory(verdict, claims, output, source)


def _check_text(
    verdict: Verdict, claims: Claims, output: Path, against: str | None, digest: str | None, ranks: Ranks
) -> None:
    """Check a model that reads text."""
    if not (output / CONFIG).is_file() or not any(os.path.lexists(output / name) for name in (SINGLE, INDEX)):
        raise InputError(f"{output}: not a checkpoint; give a folder that sparsefw.run wrote")
    checks = verdict.checks
    if claims.in_memory and against is None:
        # The name that it has may be that of other weights: it may have been trained since it was loaded.
        source, verdict.not_compared = None, IN_MEMORY
    else:
        source, verdict.not_compared = ranks.first_here(lambda: _find_source(claims.model, output, against))
    check_same(ranks, (verdict.not_compared, source and source.nbytes))
    verdict.digest = check_sums(checks["sums"], output, digest, ranks)
    if source is None:
        verdict.skip("no source", "copied", "shapes", "zeros", "kept", "others")
    elif claims.in_memory:
        verdict.skip("the model in memory wrote them", "copied")
    else:
        _check_copied(checks["copied"], output, source.folder)
    try:
        written = checkpoint.inspect(output)
    except InputError as error:
        checks["files"].failures.append(str(error))
        verdict.skip("the files are not sound", *checks.keys() - {"sums", "copied", "files"})
        return
    _check_files(checks["files"], written)
    if claims.in_memory and source and source.dtype != written.dtype:
        verdict.not_compared = f"the model in memory was of {written.dtype}, and the source is of {source.dtype}"
        verdict.skip("the source has another dtype", "shapes", "zeros", "kept", "others")
        source = None
    dtypes = _check_model(verdict, claims, written, source, ranks)
    if source:
        _check_shapes(checks["shapes"], written, source, dtypes)


def _checks_of(claims: Claims) -> dict[str, Check]:
    """All checks, by name, before they are made."""
    checks = {
        "sums": Check(f"all files are in {SUMS}, and as the run wrote them", "files"),
        "files": Check("shards, index and sizes agree"),
        "finite": Check("no NaN, no Inf"),
        "copied": Check("config, tokenizer and the like are the source's", "files"),
        "shapes": Check("names, shapes and dtypes are the source's"),
        "model": Check("transformers loads it, no tensor is missing", "blocks"),
        "report": Check("it names all matrices of blocks, pruned or dense", "layers"),
        "pattern": Check(f"no more weights than {claims.pattern.text} keeps", "layers"),
        "zeros": Check("weights that are zero in the source are zero", "layers"),
        "kept": Check("kept weights are the source's, bit for bit", "layers"),
        "others": Check("all but the pruned layers is the source's, bit for bit"),
    }
    if claims.on_batches:
        # No file of a source was copied, and which matrices the blocks have is known only while the model runs.
        del checks["copied"], checks["shapes"]
        checks["model"].unit, checks["report"].title = "tensors", "the model has all layers that it names"
    return checks


def _find_source(model: str, output: Path, against: str | None) -> tuple[Checkpoint | None, str]:
    """The source, or why there is none. Only a source that `against` names has to be there."""
    name = model if against is None else against
    if name == DEFAULT:
        return checkpoint.inspect(DEFAULT_MODEL), ""
    if against is None and not os.path.isdir(os.path.expanduser(model)):
        return None, f"{model or 'the report'}: no such folder here; name the source with --against"
    folder = _locate(name, output)
    try:
        return checkpoint.inspect(folder), ""
    except InputError as error:
        if against is None:
            return None, str(error)
        raise


def _locate(name: str, output: Path) -> Path:
    """The folder of the source."""
    folder = checkpoint.locate(name)
    if folder.resolve() == output.resolve():
        raise InputError(f"{name}: the output itself; name the checkpoint that was pruned with --against")
    return folder


def _check_model(
    verdict: Verdict, claims: Claims, written: Checkpoint, source: Checkpoint | None, ranks: Ranks
) -> dict[str, torch.dtype]:
    """Load the model, and check its weights; returns what `check_weights` does."""
    try:
        model = StreamedModel(written, torch.device("cpu"))
    except InputError as error:
        verdict.checks["model"].failures.append(str(error))
        verdict.skip("the model does not load", "report", "pattern", "zeros", "kept", "others")
        _check_finite(verdict.checks["finite"], written, written.tensors, ranks)
        return {}
    with model:
        # A tensor that is never loaded may hold anything, if the source does.
        _check_finite(verdict.checks["finite"], written, model.loaded, ranks)
        return check_weights(verdict, claims, model, source, ranks)


def _check_files(check: Check, written: Checkpoint) -> None:
    """Compare the index with what the shards hold."""
    folder, tensors = written.folder, written.tensors
    check.count = len(tensors)
    if os.path.lexists(folder / SINGLE):
        check.fail(SINGLE, f"not written by sparsefw.run, and read in place of what {INDEX} lists")
        return
    metadata = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("metadata")
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    for key, actual in (("total_size", written.nbytes), ("total_parameters", parameters)):
        value = metadata.get(key) if isinstance(metadata, dict) else None
        if value != actual:
            check.fail(INDEX, f"{key} is {value}, the shards hold {actual}")
    for name in sorted({path.name for path in folder.glob("*.safetensors")} - {t.file.name for t in tensors.values()}):
        check.fail(name, f"not in {INDEX}")


def _check_finite(check: Check, written: Checkpoint, tensors: Iterable[str], ranks: Ranks) -> None:
    """Look for NaN and Inf in tensors, which are given by name, file by file."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in tensors:
        by_file[written.tensors[name].file].append(name)
    files = [*by_file.items()]

    def look(n: int) -> Check:
        path, names = files[n]
        part = check.part()
        with safe_open(path, framework="pt") as file:
            for name in names:
                part.count += 1
                try:
                    check_finite(name, file.get_tensor(name))
                except InputError as error:
                    part.failures.append(str(error))
        return part

    sizes = [sum(written.tensors[name].nbytes for name in names) for _, names in files]
    for part in share_out(ranks, sizes, balanced(sizes, ranks.count), look):
        check.add(part)


def _check_copied(check: Check, output: Path, source: Path) -> None:
    """Compare the files beside the weights, byte by byte, with the source's or what is written in their place."""
    rewritten = checkpoint.rewritten(source)
    for path in checkpoint.companions(source):
        name = path.relative_to(source).as_posix()
        written = output / name
        check.count += 1
        if not written.is_file():
            check.fail(name, "missing")
        elif name in rewritten:
            # A file of another size is not read.
            expected = rewritten[name].encode()
            if written.stat().st_size != len(expected) or written.read_bytes() != expected:
                check.fail(name, "not the source's without auto_map and quantization_config")
        elif not filecmp.cmp(path, written, shallow=False):
            check.fail(name, "not the source's")


def _check_shapes(check: Check, written: Checkpoint, source: Checkpoint, dtypes: dict[str, torch.dtype]) -> None:
    """Compare names, shapes and dtypes.

    Args:
        check: receives the failures.
        written, source: the checkpoints.
        dtypes: dtypes of the source's parameters in the model, which may differ from those in its files.
    """
    for name, new in written.tensors.items():
        check.count += 1
        old = source.tensors.get(name)
        if old is None:
            # The model may have another name for it than the source's files.
            if name not in dtypes:
                check.fail(name, "not in the source")
        elif new.shape != old.shape:
            check.fail(name, f"has shape {new.shape}, in the source {old.shape}")
        elif new.dtype not in (old.dtype, dtypes.get(name, source.dtype)):
            check.fail(name, f"is {new.dtype}, in the source {old.dtype}")
