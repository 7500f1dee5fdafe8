"""Check a written model: no more weights than the pattern allows, and all other tensors are the source's, bit for bit.

One block of the written model and the same block of the source are in memory at a time, while the next ones are read.
"""

import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from sparsefw.checkpoint import Checkpoint
from sparsefw.checks.claims import Claims
from sparsefw.checks.shared import share_out
from sparsefw.checks.verdict import Check, Verdict, Zeros
from sparsefw.errors import InputError
from sparsefw.model import StreamedModel
from sparsefw.model.layers import not_pruned, slices_of
from sparsefw.ranks import Ranks, balanced, shares
from sparsefw.solver import LayerResult
from sparsefw.solver.selection import without_index

# Integers as wide as the values. Read as integers, a NaN equals itself, and -0.0 differs from 0.0.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# The numbers in a layer's name: its block's, and an expert's.
_NUMBER = re.compile(r"\[\d+\]|(?<=\.)\d+(?=\.)")

Result = TypeVar("Result")


def check_weights(
    verdict: Verdict, claims: Claims, model: StreamedModel, source: Checkpoint | None, ranks: Ranks
) -> dict[str, torch.dtype]:
    """Check all tensors of a model, a block at a time.

    Args:
        verdict: its checks "model", "report", "pattern", "zeros", "kept" and "others" receive the findings, unless they
            are skipped.
        claims: the report's claims about the model.
        model: the written model; every block is opened and closed.
        source: the checkpoint that was pruned, if there is one to compare with.
        ranks: the processes that share the blocks.

    Returns:
        The dtypes of the source's tensors in the model, by name.

    Raises:
        InputError: the source cannot be used.
    """
    checks = verdict.checks
    dtypes: dict[str, torch.dtype] = {}
    with ExitStack() as stack:
        original = stack.enter_context(_from_source(StreamedModel, source, model.device)) if source else None
        verdict.notes += [f"the source: {note}" for note in original.notes] if original else model.notes
        if original and original.names != model.names:
            checks["model"].fail(model.names[-1], f"the last of the blocks, in the source it is {original.names[-1]}")
            verdict.skip("the source has other blocks", "zeros", "kept", "others")
            original = None
        unseen = dict(claims.layers)
        layers = [
            {layer: unseen.pop(layer) for layer in claims.layers if layer in unseen and _is_in(layer, name)}
            for name in model.names
        ]
        # Blocks that follow each other, since each one is read while the one before it is checked.
        parts = shares(len(layers), ranks.count)
        owners = [number for number, part in enumerate(parts) for _ in layers[part]]
        mine = parts[ranks.number]
        with tqdm(total=mine.stop - mine.start, unit="block", disable=None if ranks.first else True) as bar:

            def check(i: int) -> tuple[Verdict, dict[str, torch.dtype]]:
                part = verdict.part()
                found = _check_block(part, claims, i, layers[i], model, original, ahead=i + 1 < mine.stop)
                bar.update()
                return part, found

            for part, found in share_out(ranks, model.names, owners, check):
                verdict.add(part)
                dtypes |= found
        for layer in unseen:
            checks["report"].fail(layer, "in none of the model's blocks")
        for name, block in model.idle.items():
            _check_report(verdict, claims, name, not_pruned(block, {}))
        if original and source:
            dtypes |= _check_others(verdict, model, original, source, ranks)
    return dtypes


def _is_in(layer: str, block: str) -> bool:
    return layer.startswith(f"{block}.")


def _check_others(
    verdict: Verdict, model: StreamedModel, original: StreamedModel, source: Checkpoint, ranks: Ranks
) -> dict[str, torch.dtype]:
    """Check the tensors outside of the blocks.

    Returns:
        The dtypes of the source's, by name.
    """
    sizes = [original.outside_bytes, model.outside_bytes]

    def load(n: int) -> str:
        if not n:
            _from_source(_load_others, original)
            return ""
        try:
            _load_others(model)
        except InputError as error:
            return str(error)
        return ""

    _, failure = share_out(ranks, sizes, balanced(sizes, ranks.count), load)
    if failure:
        verdict.checks["model"].failures.append(f"{failure}; nothing outside of the blocks was checked")
        return {}
    return _compare_others(verdict, model, original, source, ranks)


def _load_others(model: StreamedModel) -> None:
    """Load what text needs outside of the blocks, and check it for NaN and Inf."""
    with model.outside():
        pass


def _compare_others(
    verdict: Verdict, model: StreamedModel, original: StreamedModel, source: Checkpoint, ranks: Ranks
) -> dict[str, torch.dtype]:
    """Compare the source's tensors outside of the blocks with the output's, as they are in the files, piece by piece.

    Returns:
        Their dtypes, by name.
    """
    dtypes: dict[str, torch.dtype] = {}
    written = {name for piece in model.pieces for name in piece}

    def compare(n: int) -> tuple[Verdict, dict[str, torch.dtype]]:
        part, piece = verdict.part(), original.pieces[n]
        try:
            before = original.other_tensors(piece)
            _compare(part.checks["others"], model.other_tensors(written.intersection(piece)), before)
        except InputError as error:
            part.checks["model"].failures.append(f"{error}; not all outside of the blocks was checked")
            return part, {}
        return part, {name: tensor.dtype for name, tensor in before.items()}

    sizes = [sum(source.tensors[name].nbytes for name in piece) for piece in original.pieces]
    for part, found in share_out(ranks, sizes, balanced(sizes, ranks.count), compare):
        verdict.add(part)
        dtypes |= found
    return dtypes


def _check_report(verdict: Verdict, claims: Claims, block: str, dense: Iterable[str]) -> None:
    """Check that the report names the matrices of a block that it does not call pruned."""
    for matrix in dense:
        if f"{block}.{matrix}" not in claims.kept_dense:
            verdict.checks["report"].fail(f"{block}.{matrix}", "neither pruned nor kept dense by the report")


def _check_block(
    verdict: Verdict,
    claims: Claims,
    i: int,
    layers: dict[str, LayerResult],
    model: StreamedModel,
    original: StreamedModel | None,
    ahead: bool,
) -> dict[str, torch.dtype]:
    """Check block i.

    Args:
        verdict: receives the findings.
        claims: the report's claims.
        i: number of the block.
        layers: the block's layers that the report calls pruned, by name.
        model: the written model.
        original: the source's model; None if there is none to compare with.
        ahead: whether the next block is read meanwhile.

    Returns:
        The dtypes of the source's tensors, by name.
    """
    name, checks = model.names[i], verdict.checks
    checks["model"].count += 1
    try:
        block = model.open(i, ahead)
    except InputError as error:
        checks["model"].failures.append(f"{error}; no more of {name} was checked")
        model.close(i)
        return {}
    sizes = {layer.removeprefix(f"{name}."): math.prod(result.shape) for layer, result in layers.items()}
    _check_report(verdict, claims, name, not_pruned(block, sizes))
    after, before = by_slices(block.state_dict(prefix=f"{name}."), layers), None
    if original:
        before = by_slices(_from_source(original.open, i, ahead).state_dict(prefix=f"{name}."), layers)
        compare_others(checks["others"], after, before, layers)
    for layer in layers.values():
        check_layer(verdict, claims, layer, after.get(layer.name), before)
    model.close(i)
    if original:
        original.close(i)
    return {tensor: value.dtype for tensor, value in (before or {}).items()}


def _from_source(read: Callable[..., Result], *arguments: object) -> Result:
    """read(*arguments); its error names the source as the culprit."""
    try:
        return read(*arguments)
    except InputError as error:
        raise InputError(f"the source: {error}") from error


def by_slices(state: dict[str, Tensor], pruned: dict[str, LayerResult]) -> dict[str, Tensor]:
    """Tensors of a model by name. Of a stacked parameter with a pruned slice, every slice is a tensor of its own."""
    sizes = {without_index(name): math.prod(layer.shape) for name, layer in pruned.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        slices = slices_of(name, tensor, sizes.get(name))
        if slices and not pruned.keys().isdisjoint(slices):
            parts = tensor if tensor.dim() == 3 else tensor.chunk(len(slices))
            tensors |= dict(zip(slices, parts, strict=True))
        else:
            tensors[name] = tensor
    return tensors


def check_layer(
    verdict: Verdict, claims: Claims, layer: LayerResult, after: Tensor | None, sources: dict[str, Tensor] | None
) -> None:
    """Check a pruned layer.

    Args:
        verdict: receives the findings.
        claims: the report's claims.
        layer: the report's result of the layer.
        after: the layer as it is stored; None if there is none of this name.
        sources: the source's tensors of the block; None if there is no source.
    """
    report = verdict.checks["report"]
    report.count += 1
    stored = layer.shape[::-1] if layer.transposed else layer.shape
    if after is None or after.shape != stored:
        report.fail(layer.name, f"no such matrix of {stored[0]} x {stored[1]} in the model")
        return
    W = after.T if layer.transposed else after
    _check_pattern(verdict.checks["pattern"], claims, layer, W)
    zeros = int((W == 0).sum().item())
    verdict.zeros[_NUMBER.sub("*", layer.name)].add(Zeros(layers=1, weights=W.numel(), zeros=zeros))
    compared = [check for name in ("zeros", "kept") if not (check := verdict.checks[name]).skipped]
    before = (sources or {}).get(layer.name)
    for check in compared:
        check.count += 1
        if before is None or before.shape != stored or before.dtype != after.dtype:
            check.fail(layer.name, "not of this shape and dtype in the source")
        elif check is verdict.checks["zeros"]:
            _check_zeros(check, layer, W, before.T if layer.transposed else before)
        else:
            _check_kept(check, claims, layer, W, before.T if layer.transposed else before)


def _check_pattern(check: Check, claims: Claims, layer: LayerResult, W: Tensor) -> None:
    """Check that no part of W (rows, d) has more nonzero weights than it may keep."""
    check.count += 1
    expected = claims.kept_in(layer)
    # Fewer weights than the pattern keeps may be left where the source's zeros stay zero.
    if layer.kept > expected or (layer.kept < expected and not claims.keeps_zeros):
        check.fail(layer.name, f"keeps {layer.kept} of {W.numel()} by the report, which the pattern does not")
    width, kept = claims.kept_in_parts(layer)
    if over := _first_over((W != 0).reshape(-1, width).sum(1), kept):
        n, count, limit, more = over
        check.fail(layer.name, f"{claims.part_name(layer, n)} has {count} non-zero weights, {limit} may be kept{more}")


def _check_zeros(check: Check, layer: LayerResult, W: Tensor, before: Tensor) -> None:
    """Check that W (rows, d) is zero wherever the source's weight, `before` (rows, d), is."""
    if difference := _first_difference((before == 0) & (W != 0), W, before, "are not zero any more"):
        check.fail(layer.name, difference)


def _check_kept(check: Check, claims: Claims, layer: LayerResult, W: Tensor, before: Tensor) -> None:
    """Check that kept weights are the source's, and that no more were removed than had to be.

    Args:
        check: receives the failures.
        claims: the report's claims.
        layer: the report's result of the layer.
        W: (rows, d) weight as it was written.
        before: (rows, d) weight of the source.
    """
    changed = _bits(W) != _bits(before)
    if difference := _first_difference(changed & (_bits(W) != 0), W, before):
        check.fail(layer.name, difference)
    width, kept = claims.kept_in_parts(layer)
    if over := _first_over((changed & (W == 0)).reshape(-1, width).sum(1), width - kept):
        n, count, limit, more = over
        check.fail(layer.name, f"{claims.part_name(layer, n)} has {count} weights removed, {limit} are to be{more}")


def _first_over(counts: Tensor, limits: Tensor) -> tuple[int, int, int, str] | None:
    """The first count above its limit, counts and limits (parts,); None if there is none.

    Returns:
        Its index, the count, the limit, and in words how many more there are.
    """
    over = counts > limits
    total = int(over.sum().item())
    if not total:
        return None
    first = int(over.view(torch.uint8).argmax().item())
    more = f", and {total - 1} more like it" if total > 1 else ""
    return first, int(counts[first].item()), int(limits[first].item()), more


def compare_others(
    check: Check, after: dict[str, Tensor], before: dict[str, Tensor], pruned: dict[str, LayerResult]
) -> None:
    """Compare all tensors but the pruned layers with the source's, bit for bit."""
    _compare(check, *({name: t for name, t in tensors.items() if name not in pruned} for tensors in (after, before)))


def _compare(check: Check, after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Compare tensors with the source's, bit for bit."""
    for name in dict.fromkeys([*before, *after]):
        check.count += 1
        if name not in after or name not in before:
            check.fail(name, f"only in the {'output' if name in after else 'source'}")
            continue
        new, old = after[name], before[name]
        if new.shape != old.shape or new.dtype != old.dtype:
            check.fail(name, f"{new.dtype} {tuple(new.shape)}, in the source {old.dtype} {tuple(old.shape)}")
        elif not torch.equal(_bits(new), _bits(old)):
            # Only now, since it takes a byte for every value.
            difference = _first_difference(_bits(new) != _bits(old), new, old)
            assert difference
            check.fail(name, difference)


def _first_difference(differ: Tensor, after: Tensor, before: Tensor, how: str = "differ") -> str | None:
    """How many values differ, and the first of them, in words; None if none does."""
    count = differ.sum().item()
    if not count:
        return None
    # Not `nonzero`, which takes 16 bytes for every value that differs.
    first = differ.reshape(-1).view(torch.uint8).argmax()
    index = tuple(int(i.item()) for i in torch.unravel_index(first, differ.shape))
    values = f"{after[index].item()}, in the source {before[index].item()}"
    return f"{count} of {differ.numel()} values {how}, first at {list(index)}: {values}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])
