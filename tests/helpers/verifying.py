"""Outputs of runs on tiny models, ways to change them, and the verdict on them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from helpers.commands import make_place, run
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsefw.checkpoint.files import SUMS, file_digest
from sparsefw.checkpoint.source import INDEX
from sparsefw.verify import main

# Tensors of a Llama with two blocks.
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"

WANDA = ("--method", "wanda")


def outputs(folders) -> Callable[..., tuple[Path, Path]]:
    """make(*flags, family, dtype) -> source and output of a run; each is made once, and must not be changed."""
    runs: dict[tuple, tuple[Path, Path]] = {}

    def make(*flags: str, family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
        key = flags, family, dtype
        if key not in runs:
            folder = folders.mktemp("pruned")
            make_place(folder, family, dtype, num_hidden_layers=2)
            runs[key] = folder / "model", folder / "out"
            assert run(folder / "model", folder / "text.txt", folder / "out", *flags) == 0
        return runs[key]

    return make


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Replace a tensor by change(tensor), or leave it out if that is None; the sizes in the index follow."""
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    old = tensors.pop(name)
    new = change(old.clone())
    if new is None:
        del index["weight_map"][name]
        new = old[:0]
    else:
        tensors[name] = new
    save_file(tensors, shard, metadata={"format": "pt"})
    index["metadata"]["total_size"] += new.nbytes - old.nbytes
    index["metadata"]["total_parameters"] += new.numel() - old.numel()
    (folder / INDEX).write_text(json.dumps(index))


def put(at: int | tuple, value: float | Tensor | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of one entry, to a value or to value(entry)."""

    def change(tensor: Tensor) -> Tensor:
        tensor[at] = value(tensor[at]) if callable(value) else value
        return tensor

    return change


def flip_bit(x: Tensor) -> Tensor:
    """The value with its last bit changed."""
    return (x.view(torch.int32 if x.element_size() == 4 else torch.int16) ^ 1).view(x.dtype)


def verdict(capsys, folder: Path, *flags: str, summed: bool = True) -> tuple[str, dict[str, list[str]]]:
    """What was printed, and the failures of the checks that failed.

    By default SHA256SUMS is written anew, which the other checks must not depend on.
    """
    if summed:
        files = [path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS]
        sums = [f"{file_digest(path)}  {path.relative_to(folder)}\n" for path in files]
        (folder / SUMS).write_text("".join(sums))
    capsys.readouterr()
    status = main([str(folder), *flags])
    printed = capsys.readouterr().out
    failures, check = {}, None
    for line in printed.splitlines():
        if match := re.match(r"(\w+) .* FAILED \(\d+\)$", line):
            check = failures.setdefault(match[1], [])
        elif line.startswith("  ") and check is not None:
            check.append(line.strip())
        else:
            check = None
    assert status == bool(failures)
    assert printed.splitlines()[-1].startswith(f"failed: {', '.join(failures)}" if failures else "all checks")
    return printed, failures


def passed(capsys, folder: Path, *flags: str, summed: bool = True) -> str:
    """What was printed of an output that passes all checks."""
    printed, failures = verdict(capsys, folder, *flags, summed=summed)
    assert not failures, printed
    return printed


def only_failure(capsys, folder: Path, check: str, *flags: str) -> str:
    """The failure of this check, which must be the only failure."""
    printed, failures = verdict(capsys, folder, *flags)
    assert failures.keys() == {check}, printed
    assert len(failures[check]) == 1, printed
    return failures[check][0]
