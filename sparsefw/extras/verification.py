"""Check a pruned checkpoint: its files, and its weights against its report and its source.

Both checkpoints are read one block at a time, converted as transformers converts them when it loads a model.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sparsefw.arithmetic import check_finite
from sparsefw.checkpoint.files import CARD, DIGEST, SUMS, file_digest, read_sums
from sparsefw.checkpoint.packed import BITS
from sparsefw.checkpoint.source import CONFIG, FILE_DTYPES, check_file, inspect, matches, read_headers, read_json
from sparsefw.checkpoint.tensors import TensorInfo, dequantized, read_tensors
from sparsefw.data.batches import BATCHES
from sparsefw.errors import InputError, option
from sparsefw.inputs import DEFAULT, locate
from sparsefw.model.layers import slices_of
from sparsefw.model.skeleton import build, has_class
from sparsefw.model.swap import block_of
from sparsefw.report.content import Report, report_of
from sparsefw.selection import without_index
from sparsefw.solver import patterns
from sparsefw.solver.config import METHODS, method_of
from sparsefw.solver.layer import LayerResult

# dtypes that occur only in models that were pruned in memory, such as schedules of diffusion models. No pruned layer
# has such a dtype.
OTHER_DTYPES = {"F64": torch.float64, "C64": torch.complex64}

# Files that need not be in SHA256SUMS: a user edits them, or `evaluate`, git, the Hub and its library add them.
FREE = (CARD, "evaluation.json", ".git/*", ".gitattributes", ".cache/huggingface/*")

# At most this many failures of a check are listed. Further failures are only counted.
LISTED = 10


@dataclass
class Check:
    """A check: its title, the number of checked files or tensors, and a line for each failure."""

    title: str
    count: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, why: str = "") -> None:
        """Count a checked file or tensor; a failure if `why` is not empty."""
        self.count += 1
        self.failures += [f"{name}: {why}"] if why else []

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Turn an `InputError` inside the `with` block into a failure of the check, and continue after the block."""
        try:
            yield
        except InputError as error:
            self.failures.append(str(error))


@dataclass
class Verdict:
    """The findings of all checks.

    Attributes:
        checks: the checks by name, in the order in which they are printed.
        digest: SHA-256 of SHA256SUMS; empty without such a file.
        not_compared: the reason why the source could not be compared; empty if it was compared.
        weights, zeros: number of weights and of zeros in all pruned layers.
    """

    checks: dict[str, Check]
    digest: str = ""
    not_compared: str = ""
    weights: int = 0
    zeros: int = 0

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [name for name, check in self.checks.items() if check.failures]


def lines(verdict: Verdict) -> Iterator[str]:
    """Yield the verdict in words: a row for each check with its failures, and a conclusion."""
    for name, check in verdict.checks.items():
        outcome = f"FAILED ({len(check.failures)})" if check.failures else "ok"
        yield f"{name:8} {check.title:56} {check.count:>7}  {outcome}"
        yield from (f"  {failure}" for failure in check.failures[:LISTED])
        if len(check.failures) > LISTED:
            yield f"  and {len(check.failures) - LISTED} more"
    if verdict.weights:
        percent = 100 * verdict.zeros / verdict.weights
        yield f"{verdict.zeros:,} of {verdict.weights:,} weights in pruned layers are zero ({percent:.2f} %)"
    if verdict.digest:
        yield f"SHA-256 of SHA256SUMS: {verdict.digest}"
    if verdict.not_compared:
        yield f"not compared with the source: {verdict.not_compared}"
    passed = "all checks that could be made" if verdict.not_compared else "all checks"
    yield f"failed: {', '.join(verdict.failed)}" if verdict.failed else f"{passed} passed"


def verify(output: Path, against: str | None = None, digest: str | None = None) -> Verdict:
    """Check a checkpoint that `sparsefw.run` wrote.

    Args:
        output: folder of the checkpoint.
        against: the source, a folder or Hub id; None: the model that the report names, if it is a folder here.
        digest: SHA-256 of the output's SHA256SUMS, as printed by the run; None: the digest is not checked.

    Raises:
        InputError: the output has no report of a run, the source cannot be used, or `digest` is not a SHA-256.
    """
    if digest is not None and not DIGEST.fullmatch(digest):
        raise InputError(f"{option('digest', digest)}: expected 64 digits, 0 to 9 and a to f, as printed by the run")
    report = report_of(output)
    method_of(report.method)
    if not report.layers_of(report.method):
        raise InputError(
            f"{output / 'report.json'}: has no layers of the method in its arguments, {report.method}; prune again"
        )
    pattern = patterns.parse(report.argument("sparsity", str))
    checks = {
        "sums": Check(f"all files are in {SUMS}, unchanged since the run"),
        "model": Check("it loads, no tensor is missing, none has NaN or Inf"),
        "report": Check("the report names each matrix as pruned or kept dense"),
        "pattern": Check(f"no more weights than {pattern.text} keeps"),
    }
    verdict = Verdict(checks, digest=_check_sums(checks["sums"], output, digest))
    folder, verdict.not_compared = find_source(report, output, against)
    with checks["model"].failing():
        written = _Model(output, report)
    if checks["model"].failures:
        return verdict
    source, same_run = None, False
    if folder:
        source = _Model(folder, report)
        same_run = is_same_run(folder, output)
    if source and report.in_memory and source.dtype != written.dtype:
        verdict.not_compared = f"the model in memory had dtype {written.dtype}, and the source has {source.dtype}"
        source = None
    if source:
        checks["others"] = Check(f"all{'' if same_run else ' but the pruned layers'} is the source's, bit for bit")
        if not _changes_kept_weights(report):
            checks["kept"] = Check("kept weights are the source's, bit for bit")
        if report.argument("keep_zeros", bool):
            checks["zeros"] = Check("zeros of the source are still zeros")
    _check_weights(verdict, report, written, source, same_run)
    return verdict


def _changes_kept_weights(report: Report) -> bool:
    """Whether the run, or a recovery after the run, may have changed kept weights."""
    method = METHODS[report.method]
    refits = method.refits and report.argument("refit", int) > 0
    reconstructs = report.arguments.get("reconstruct", 0) != 0
    return method.changes_weights or refits or reconstructs or bool(report.all_recoveries)


def _check_sums(check: Check, output: Path, digest: str | None) -> str:
    """Compare every file of an output with its digest. Returns the SHA-256 of SHA256SUMS, or "" if that is missing."""
    with check.failing():
        sums = read_sums(output / SUMS)
    if check.failures:
        return ""
    actual = file_digest(output / SUMS)
    if digest not in (None, actual):
        check.failures.append(f"{SUMS}: its SHA-256 is {actual}, not the one given with {option('digest')}")
    # A link to a folder counts as a file here, and is not followed.
    files = (path for path in output.rglob("*") if path.is_symlink() or not path.is_dir())
    for name in sorted({path.relative_to(output).as_posix() for path in files} - sums.keys() - {SUMS}):
        if not matches(name, FREE):
            check.failures.append(f"{name}: not in {SUMS}")
    # Older versions listed the model card, which users may edit.
    for name in tqdm([name for name in sums if name != CARD], unit="file", disable=None):
        with check.failing():
            check_file(output / name, output)
            check.add(name, "" if file_digest(output / name) == sums[name] else "not what the run wrote")
    return actual


def find_source(report: Report, output: Path, against: str | None, named: str = "against") -> tuple[Path | None, str]:
    """Find the folder of the model that was pruned; or (None, the reason) if there is no such folder.

    A model that `against` names must exist.

    Args:
        report: report of the run.
        output: folder of the pruned checkpoint.
        against: a folder or Hub id; None: the model that the report names.
        named: name of the option that sets `against`, for messages.
    """
    model = report.argument("model", str)
    if against is None and report.in_memory:
        # The caller may have trained the model after loading it, so the checkpoint of its name may have other weights.
        return None, f"the model was in memory; give its checkpoint with {option(named)}"
    if against is None and model != DEFAULT and not os.path.isdir(os.path.expanduser(model)):
        return None, f"{model or 'the report'}: no such folder here; give the source with {option(named)}"
    folder = locate(model if against is None else against)
    if folder.resolve() == output.resolve():
        raise InputError(f"{against or model}: is the output itself; give the dense model with {option(named)}")
    return folder, ""


def is_same_run(folder: Path, output: Path) -> bool:
    """Tell whether a folder has the same run's output as `output`, packed or unpacked."""
    other = folder / "report.json"
    return other.is_file() and file_digest(other) == file_digest(output / "report.json")


def tensors_in(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all safetensors files in a folder, without a config or an index.

    Raises:
        InputError: there is no such file, a file is damaged, or two files have a tensor of the same name.
    """
    tensors = read_headers(
        folder, sorted(path.name for path in folder.glob("*.safetensors")), FILE_DTYPES | OTHER_DTYPES
    )
    if not tensors:
        raise InputError(f"{folder}: no tensors in safetensors files; give a folder that sparsefw.run wrote")
    return tensors


class _Model:
    """A checkpoint's model. A group of parameters is read at a time: one block, or one parameter outside of the blocks.

    Args:
        folder: folder of the checkpoint.
        report: report of the run that pruned this model or wrote this checkpoint.

    Attributes:
        dtype: the floating dtype of most of its tensors.
        groups: names of the tensors in the files, by name of the block or of the parameter outside of the blocks.
        unused: names of tensors in the files that the model does not use.

    Raises:
        InputError: the files are damaged, or transformers cannot load them.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        # A run on batches prunes any model in memory, even if its class is not from transformers.
        batches = report.argument("dataset", tuple) == (BATCHES,)
        config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        found = None if batches and not has_class(config.get("architectures")) else inspect(folder)
        # Without a class of transformers, the names in the files are taken as the names in the model.
        self._tensors = found.tensors if found else tensors_in(folder)
        self.dtype = found.dtype if found else None
        self._skeleton = build(found, as_named=batches or report.in_memory) if found else None
        self.unused, self._buffers, self.tied, goes_into = set[str](), set[str](), set[str](), dict[str, str]()
        if self._skeleton:
            model, goes_into, self.unused = self._skeleton.model, self._skeleton.goes_into, {*self._skeleton.unused}
            self._buffers, self.tied = {name for name, _ in model.named_buffers()}, {*model.all_tied_weights_keys}
        blocks = {block.name for block in report.blocks}
        self.groups: dict[str, list[str]] = defaultdict(list)
        for name in self._tensors:
            parameter = goes_into.get(name, name)
            self.groups[block_of(parameter, blocks) or parameter].append(name)

    def passes_over(self, name: str) -> bool:
        """Whether a tensor is a buffer, or unused by the model."""
        return name in self.unused or without_index(name) in self._buffers

    def read(self, group: str) -> dict[str, Tensor]:
        """Read a group: its parameters by name in the model, and its unused tensors by name in the files."""
        tensors = read_tensors({name: self._tensors[name] for name in self.groups.get(group, [])})
        if self._skeleton is None:
            return {name: dequantized(tensor) for name, tensor in tensors.items()}
        unused = {name: dequantized(tensors.pop(name)) for name in self.unused & tensors.keys()}
        return (self._skeleton.load(tensors, torch.device("cpu")) if tensors else {}) | unused


def _check_weights(verdict: Verdict, report: Report, written: _Model, source: _Model | None, same_run: bool) -> None:
    """Check all weights, one group at a time.

    Args:
        verdict: collects the findings.
        report: report of the run.
        written: the pruned model.
        source: the model that was pruned; None: there is no source to compare with.
        same_run: whether the source is the same pruned model, whose pruned layers must also be equal.
    """
    checks, layers = verdict.checks, {layer.name: layer for layer in report.layers_of(report.method)}
    unseen, all_read = dict(layers), True
    blocks = {block.name for block in report.blocks}
    sizes = {without_index(name): math.prod(layer.shape) for name, layer in layers.items()}
    for group in tqdm(list(dict.fromkeys([*written.groups, *(source.groups if source else [])])), disable=None):
        after = None
        # Reading fails if a packed mask does not fit its values.
        with checks["model"].failing():
            after = _by_slices(written.read(group), layers, sizes)
        if after is None:
            all_read = False
            continue
        before = _by_slices(source.read(group), layers, sizes) if source else {}
        for name, W in after.items():
            checks["model"].count += 1
            old, layer = before.pop(name, None), unseen.pop(name, None)
            # Unused tensors are not checked: one may be an attention mask, which holds infinity.
            if name not in written.unused:
                with checks["model"].failing():
                    check_finite(name, W)
            if layer:
                _check_layer(verdict, report, layer, W, old)
            # Buffers are not weights, so the report need not name them; an example is a table of experts by token.
            elif W.dim() >= 2 and group in blocks and not written.passes_over(name) and name not in report.kept_dense:
                checks["report"].failures.append(f"{name}: neither pruned nor kept dense by the report")
            if source and (same_run or not layer):
                checks["others"].add(name, _difference(W, old))
        for name in before:
            # transformers writes a model in memory without tensors that it ties or does not use.
            if not (source and report.in_memory and (source.passes_over(name) or name in source.tied)):
                checks["others"].failures.append(f"{name}: only in the source")
    checks["report"].failures += [f"{name}: no such matrix in the model" for name in unseen if all_read]


def _by_slices(state: dict[str, Tensor], layers: dict[str, LayerResult], sizes: dict[str, int]) -> dict[str, Tensor]:
    """Split each stacked parameter that has a pruned slice into its slices; other tensors stay whole."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        slices = slices_of(name, tensor, sizes.get(name))
        if slices and not layers.keys().isdisjoint(slices):
            parts = tensor if tensor.dim() == 3 else tensor.chunk(len(slices))
            tensors |= dict(zip(slices, parts, strict=True))
        else:
            tensors[name] = tensor
    return tensors


def _check_layer(verdict: Verdict, report: Report, layer: LayerResult, after: Tensor, before: Tensor | None) -> None:
    """Check a pruned layer. `before` is the tensor in the source, or None without it."""
    checks, name = verdict.checks, layer.name
    stored = layer.shape[::-1] if layer.transposed else layer.shape
    if after.shape != stored:
        checks["report"].add(name, f"has the shape {tuple(after.shape)} in the model, {stored} by the report")
        return
    checks["report"].add(name)
    W = after.T if layer.transposed else after
    verdict.weights, verdict.zeros = verdict.weights + W.numel(), verdict.zeros + int((W == 0).sum())
    pattern = patterns.parse(report.argument("sparsity", str))
    width, most = patterns.budget(pattern, *layer.shape, METHODS[layer.method].rows_independent)
    over = _over_budget(W != 0, width, most)
    checks["pattern"].add(name, over and f"{over} keep more than {most} of {width} weights")
    kept = zeros = _other_form(after, before)
    if before is not None and not kept:
        old, removed = before.T if layer.transposed else before, _bits(W) == 0
        over = _over_budget(removed & (_bits(old) != 0), width, width - most)
        kept = _difference(torch.where(removed, old, W), old)
        kept = kept or (over and f"{over} lose more than {width - most} of {width} weights")
        count = int(((old == 0) & (W != 0)).sum())
        zeros = f"{count} zeros of the source are not zero here" if count else ""
    if "kept" in checks:
        checks["kept"].add(name, kept)
    if "zeros" in checks:
        checks["zeros"].add(name, zeros)


def _over_budget(mask: Tensor, width: int, most: int) -> str:
    """Say how many budgets of `width` entries have more than `most` set entries; empty if no budget has."""
    over = mask.reshape(-1, width).sum(1) > most
    return f"{int(over.sum())} of {len(over)} budgets" if over.any() else ""


def _other_form(after: Tensor, before: Tensor | None) -> str:
    """Say how a tensor's shape or dtype differs from the source; empty if both are equal."""
    if before is None:
        return "not in the source"
    if after.shape == before.shape and after.dtype == before.dtype:
        return ""
    return f"is {after.dtype} {tuple(after.shape)}, but in the source {before.dtype} {tuple(before.shape)}"


def _difference(after: Tensor, before: Tensor | None) -> str:
    """Say how a tensor differs from the source; empty if the bits are equal."""
    other = _other_form(after, before)
    if before is None or other:
        return other
    differ = _bits(after) != _bits(before)
    return f"{int(differ.sum())} of {differ.numel()} values differ" if differ.any() else ""


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.itemsize])
