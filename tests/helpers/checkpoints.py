"""Small checkpoints on disk for the tests of reading and writing them."""

import json
import os
from pathlib import Path

import pytest
import torch

from sparsefw.checkpoint.source import INDEX
from sparsefw.errors import InputError

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.ones(2),
    "n": torch.zeros(3, dtype=torch.int64),
}


def write_index(folder: Path, **weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def refused(match: str):
    return pytest.raises(InputError, match=match)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_hub_cache(folder: Path, root: Path) -> Path:
    """A copy of `folder` as the Hub's cache holds it: links to blobs. It is the branch main of org/name."""
    snapshot = root / "models--org--name" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
        link, blob = snapshot / path.relative_to(folder), blobs / f"sha-{number}"
        blob.write_bytes(path.read_bytes())
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("abc")
    return snapshot
