"""Check the weights of a written model: no more than the pattern allows, and all else as it was, bit for bit.

One block of the written model and the same one of its source are in memory at a time, and the next ones being read.
"""

import re
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsefw.checkpoint.source import Checkpoint
from sparsefw.checks.claims import Claims, Row
from sparsefw.checks.verdict import Check, Verdict
from sparsefw.errors import InputError
from sparsefw.model.layers import kind_of, not_pruned
from sparsefw.model.streamed import StreamedModel

# Integers as wide as the values: as these a NaN equals itself, and -0.0 differs from 0.0.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# An expert that is a slice of a stacked parameter.
_SLICE = re.compile(r"(.+)\[\d+\]")

Result = TypeVar("Result")


def check_weights(
    verdict: Verdict, claims: Claims, model: StreamedModel, source: Checkpoint | None
) -> dict[str, torch.dtype]:
    """Check all tensors of a model, a block at a time.

    Args:
        verdict: its checks "model", "report", "pattern", "kept" and "others" are made, those that are not skipped.
        claims: what the report says of the model.
        model: the written one; its blocks are used up.
        source: the checkpoint that was pruned, if there is one to compare with.

    Returns:
        The dtypes of the source's tensors in the model, by name.

    Raises:
        InputError: the source cannot be used.
    """
    checks, dtypes = verdict.checks, {}
    dense = _of_source(StreamedModel, source, model.device) if source else None
    verdict.notes += [f"the source: {note}" for note in dense.notes] if dense else model.notes
    if dense and dense.names != model.names:
        checks["model"].fail(model.names[-1], f"the last of the blocks, in the source it is {dense.names[-1]}")
        verdict.skip("the source has other blocks", "kept", "others")
        dense = None
    left = dict(claims.layers)
    for i, name in enumerate(tqdm(model.names, unit="block", disable=None)):
        rows = {layer: left.pop(layer) for layer in claims.layers if layer.startswith(f"{name}.")}
        dtypes |= _check_block(verdict, claims, i, rows, model, dense)
    for layer in left:
        checks["report"].fail(layer, "in none of the model's blocks")
    if dense:
        before = _of_source(dense.other_tensors)
        dtypes |= {name: tensor.dtype for name, tensor in before.items()}
        try:
            _compare(checks["others"], model.other_tensors(), before)
        except InputError as error:
            checks["model"].failures.append(f"{error}; nothing outside of the blocks was checked")
    return dtypes


def _check_block(
    verdict: Verdict,
    claims: Claims,
    i: int,
    rows: dict[str, Row],
    model: StreamedModel,
    dense: StreamedModel | None,
) -> dict[str, torch.dtype]:
    """Check block i, of which the report has these rows; returns the dtypes of the source's tensors."""
    name, checks = model.names[i], verdict.checks
    checks["model"].count += 1
    try:
        block = model.open(i)
    except InputError as error:
        checks["model"].failures.append(f"{error}; no more of {name} was checked")
        model.close(i)
        return {}
    for matrix in not_pruned(block, [layer.removeprefix(f"{name}.") for layer in rows]):
        if f"{name}.{matrix}" not in claims.dense:
            checks["report"].fail(f"{name}.{matrix}", "neither pruned nor kept dense by the report")
    after, before = _tensors(block, name, rows), None
    if dense:
        before = _tensors(_of_source(dense.open, i), name, rows)
        _compare(checks["others"], *({n: t for n, t in x.items() if n not in rows} for x in (after, before)))
    for layer, row in rows.items():
        _check_layer(verdict, claims, layer, row, after.get(layer), before)
    model.close(i)
    if dense:
        dense.close(i)
    return {tensor: value.dtype for tensor, value in (before or {}).items()}


def _of_source(use: Callable[..., Result], *arguments: object) -> Result:
    """use(*arguments), with the source to blame for what is wrong."""
    try:
        return use(*arguments)
    except InputError as error:
        raise InputError(f"the source: {error}") from error


def _tensors(block: nn.Module, prefix: str, pruned: Iterable[str]) -> dict[str, Tensor]:
    """A block's tensors by name; those of which slices were pruned, slice by slice."""
    sliced = {match[1] for name in pruned if (match := _SLICE.fullmatch(name))}
    found = {}
    for name, tensor in block.state_dict(prefix=f"{prefix}.").items():
        if name in sliced and tensor.dim() == 3:
            found |= {f"{name}[{e}]": part for e, part in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def _check_layer(
    verdict: Verdict,
    claims: Claims,
    name: str,
    row: Row,
    after: Tensor | None,
    sources: dict[str, Tensor] | None,
) -> None:
    """Check a pruned layer.

    Args:
        verdict: takes what is found.
        claims: what the report says.
        name: of the layer.
        row: what the report says of it.
        after: the layer as it is stored; None if there is none of this name.
        sources: the source's tensors of the block; None if there is no source.
    """
    report, pattern, kept = (verdict.checks[check] for check in ("report", "pattern", "kept"))
    report.count += 1
    stored = row.shape[::-1] if row.transposed else row.shape
    if after is None or after.shape != stored:
        report.fail(name, f"no such matrix of {stored[0]} x {stored[1]} in the model")
        return
    pattern.count += 1
    if row.kept != claims.kept(row):
        pattern.fail(name, f"keeps {row.kept} of {after.numel()} by the report, which the pattern does not")
    width, budgets = claims.budgets(row)
    after = after.T if row.transposed else after
    zero = after == 0
    zeros = zero.reshape(-1, width).sum(1)
    if over := _first_over(width - zeros, budgets):
        part, count, budget, more = over
        pattern.fail(name, f"{claims.part(row, part)} has {count} non-zero weights, {budget} may be kept{more}")
    tally = verdict.zeros[kind_of(name)]
    for at, count in enumerate((1, after.numel(), zeros.sum().item())):
        tally[at] += count
    if kept.skipped:
        return
    kept.count += 1
    before = sources.get(name)
    if before is None or before.shape != stored or before.dtype != after.dtype:
        kept.fail(name, "not of this shape and dtype in the source")
        return
    before = before.T if row.transposed else before
    changed = _bits(after) != _bits(before)
    if why := _first_of(changed & (_bits(after) != 0), after, before):
        kept.fail(name, why)
    if over := _first_over((changed & zero).reshape(-1, width).sum(1), width - budgets):
        part, count, budget, more = over
        kept.fail(name, f"{claims.part(row, part)} has {count} weights removed, {budget} are to be{more}")


def _first_over(counts: Tensor, limits: Tensor) -> tuple[int, int, int, str] | None:
    """The first count above its limit: its place, itself, the limit, and how many more there are, in words."""
    over = counts > limits
    found = over.sum().item()
    if not found:
        return None
    first = over.view(torch.uint8).argmax().item()
    more = f", and {found - 1} more like it" if found > 1 else ""
    return first, counts[first].item(), limits[first].item(), more


def _compare(check: Check, after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Compare tensors with the source's, bit for bit."""
    for name in dict.fromkeys([*before, *after]):
        check.count += 1
        if name not in after or name not in before:
            check.fail(name, f"only in the {'output' if name in after else 'source'}")
            continue
        here, there = after[name], before[name]
        if here.shape != there.shape or here.dtype != there.dtype:
            check.fail(name, f"{here.dtype} {tuple(here.shape)}, in the source {there.dtype} {tuple(there.shape)}")
        elif why := _first_of(_bits(here) != _bits(there), here, there):
            check.fail(name, why)


def _first_of(differ: Tensor, after: Tensor, before: Tensor) -> str | None:
    """In words, how many values differ, and the first of them; None if none does."""
    count = differ.sum().item()
    if not count:
        return None
    # Not `nonzero`, which takes 16 bytes for every one of them.
    first = differ.reshape(-1).view(torch.uint8).argmax()
    at = tuple(index.item() for index in torch.unravel_index(first, differ.shape))
    values = f"{after[at].item()}, in the source {before[at].item()}"
    return f"{count} of {differ.numel()} values differ, first at {list(at)}: {values}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])
