"""Prune a tiny checkpoint of one class with the commands, load the result, and compare it with plain transformers.

Outcomes: works; refused, in one line; traceback; wrong: the commands end well and a comparison fails; not run:
transformers itself does not build, run or reload the class on token ids.
"""

import contextlib
import io
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import sparsefw.pack
import sparsefw.packed  # tells transformers how to load packed checkpoints
import sparsefw.run
import sparsefw.verify
from classes.tiny_model import Case, build, byte_tokenizer, load, perplexity, random_text
from sparsefw.report.content import Report, read_report

OUTCOMES = WORKS, REFUSED, TRACEBACK, WRONG, NOT_RUN = "works", "refused", "traceback", "wrong", "not run"

# Names in the folder of a class.
SOURCE, OUTPUT, PACKED = "source", "output", "packed"
CALIBRATION, EVALUATION = "calibration.txt", "evaluation.txt"
SEQLEN, WINDOWS, EVALUATED = 24, 8, 4
# Few steps. Everything else is the product's default.
FLAGS = ["--kernel", "torch", "--steps", "3", "--rounds", "1", "--refit", "2", "--compare", "wanda"]
# Relative difference of perplexities of the same fp32 weights on the same windows.
TOLERANCE = 1e-3


class Ended(Exception):
    """The end of an examination; its arguments are the outcome and the reason."""


def examine(case: Case, folder: Path) -> dict[str, Any]:
    """Prune a class, with an empty folder for the checkpoints; returns the row of the results: JSON."""
    row = case.row | {"outcome": WORKS, "reason": ""}
    try:
        _examine(case, folder, row)
    except Ended as ended:
        row["outcome"], row["reason"] = ended.args
    return row


def _examine(case: Case, folder: Path, row: dict[str, Any]) -> None:
    """Fill the row of a class that works.

    Raises:
        Ended: the class does not work.
    """
    tokenizer, text = byte_tokenizer(), random_text(1, EVALUATED * SEQLEN)
    (folder / CALIBRATION).write_text(random_text(0, WINDOWS * SEQLEN))
    (folder / EVALUATION).write_text(text)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    windows = torch.tensor(ids[: EVALUATED * SEQLEN]).view(EVALUATED, SEQLEN)
    with _ended_as(NOT_RUN, "build"):
        model = build(case)
    with _ended_as(NOT_RUN, "forward"):
        in_memory = perplexity(model, windows)
    with _ended_as(NOT_RUN, "save and load"):
        model.save_pretrained(folder / SOURCE, max_shard_size="1MB")
        tokenizer.save_pretrained(folder / SOURCE)
        original, loading = load(folder / SOURCE)
        plain = perplexity(original, windows)
        if not _alike(plain, in_memory):
            raise ValueError(f"perplexity {in_memory:.6g} before save_pretrained, {plain:.6g} after from_pretrained")
    row["architecture"] = type(original).__name__
    _prune(folder)
    with _ended_as(TRACEBACK, "load the output"):
        pruned, pruned_loading = load(folder / OUTPUT)
    report = read_report(folder / OUTPUT / "report.json")
    found = report.evaluation[0].perplexity
    row |= _pruned_part(report, pruned) | {"perplexity": {"plain": plain, **found}}
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if more := sorted(map(str, set(pruned_loading[what]) - set(loading[what]))):
            raise Ended(WRONG, f"loading the output: {what} {', '.join(more[:3])} ({len(more)} in all)")
    if not _alike(found["dense"], plain):
        raise Ended(WRONG, f"dense perplexity {found['dense']:.6g}, of plain transformers {plain:.6g}")
    loaded, reported = perplexity(pruned, windows), found.get("recovered", found[report.method])
    if not _alike(reported, loaded):
        raise Ended(WRONG, f"pruned perplexity {reported:.6g}, of the loaded output {loaded:.6g}")
    _compare_weights(report, original, pruned)
    _verify(folder, OUTPUT)
    status, _ = _run("pack", folder / OUTPUT, folder / PACKED)
    row["packed"] = not status
    if status == 2:
        return
    with _ended_as(TRACEBACK, "load the packed output"):
        packed = perplexity(load(folder / PACKED)[0], windows)
    if not _alike(packed, loaded):
        raise Ended(WRONG, f"packed perplexity {packed:.6g}, of the output {loaded:.6g}")
    _verify(folder, PACKED)


def _verify(folder: Path, name: str) -> None:
    status, line = _run("verify", folder / name, "--against", folder / SOURCE)
    if status:
        raise Ended(WRONG if status == 1 else TRACEBACK, f"verify: {line}")


def _prune(folder: Path) -> None:
    places = ["--model", folder / SOURCE, "--output", folder / OUTPUT]
    texts = ["--dataset", folder / CALIBRATION, "--eval", folder / EVALUATION]
    sizes = ["--nsamples", WINDOWS, "--seqlen", SEQLEN, "--eval-windows", EVALUATED]
    status, line = _run("run", *places, *texts, *sizes, *FLAGS)
    line = line.replace(str(folder / SOURCE), "MODEL")
    if status == 2:
        begun = any(folder.glob(f".{OUTPUT}.partial/*"))
        raise Ended(REFUSED, line + " (after a part was written)" * begun)
    if status:
        raise Ended(TRACEBACK, f"run ended with status {status}: {line}")


def _run(name: str, *arguments: object) -> tuple[int, str]:
    """Run a command of the product; returns its exit status, and the line that says why that was not 0."""
    out, err = io.StringIO(), io.StringIO()
    with _ended_as(TRACEBACK, name), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = getattr(sparsefw, name).main([*map(str, arguments)])
    lines = re.findall(r"^sparsefw: (.*)", err.getvalue(), re.MULTILINE)
    failures = re.findall(r"^  +(.*)", out.getvalue(), re.MULTILINE)
    return status, "; ".join(lines or failures[:2])


@contextlib.contextmanager
def _ended_as(outcome: str, what: str) -> Iterator[None]:
    """End the examination at any error inside; the reason is its type, its message on one line, and its place."""
    try:
        yield
    # A class that does not run may raise anything, and that is a result here.
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"
        message = " ".join(str(error).split())[:300]
        raise Ended(outcome, f"{what}: {type(error).__name__}: {message} ({place})") from error


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * min(one, other)


def _compare_weights(report: Report, original: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Compare all weights that the report does not name; `verify` looks at those of the layers."""
    before, after = original.state_dict(), pruned.state_dict()
    touched = {re.sub(r"\[\d+\]$", "", layer.name) for layer in report.layers_of(report.method)}
    if not touched:
        raise Ended(WRONG, "no layer was pruned")
    tied = getattr(original, "all_tied_weights_keys", {})
    for name, tensor in before.items():
        if name not in touched and tied.get(name) not in touched and not torch.equal(tensor, after[name]):
            raise Ended(WRONG, f"{name}: differs from the source and is not reported as pruned")
    for name in _routers(original):
        if not torch.equal(before[name], after[name]):
            raise Ended(WRONG, f"{name}: a router is not dense")


def _routers(model: nn.Module) -> Iterator[str]:
    """Yield names of the matrices that choose experts: of any router, and of a gate of a module with experts."""
    names = [name for name, _ in model.named_modules()]
    parents = {name.rpartition(".")[0] for name in names if name.endswith("experts")}
    for name in names:
        parent, _, child = name.rpartition(".")
        if re.search(r"(^|_)router$", child) or (parent in parents and re.search(r"(^|_)gate$", child)):
            yield from (f"{name}.{inner}" for inner, p in model.get_submodule(name).named_parameters() if p.dim() >= 2)


def _pruned_part(report: Report, model: PreTrainedModel) -> dict[str, Any]:
    """Tell which share of the blocks' matrices was pruned, and which matrices of the blocks stay dense."""
    blocks = tuple(f"{block.name}." for block in report.blocks)
    inside = sum(p.numel() for n, p in model.named_parameters() if n.startswith(blocks) and p.dim() >= 2)
    layers = report.layers_of(report.method)
    pruned = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return {
        "blocks": len(report.blocks),
        "layers": sorted({_without_numbers(layer.name) for layer in layers}),
        "dense": sorted({_without_numbers(name) for name in report.kept_dense}),
        "fraction": round(pruned / inside, 4) if inside else 0.0,
    }


def _without_numbers(name: str) -> str:
    """Name a matrix inside its block, the same for all blocks and experts."""
    return re.sub(r"\[\d+\]", "[*]", re.sub(r"(?<=\.)\d+(?=\.)", "*", name)).partition(".*.")[2] or name
