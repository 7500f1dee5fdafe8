"""Small runs through the command line, and their ends at any step of the disk."""

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from helpers.families import save_model
from safetensors.torch import load_file
from torch import Tensor

from sparsefw.checkpoint import files
from sparsefw.run import main

TEXT = "".join(f"Line {n}: the quick brown fox jumps over {n * n} lazy dogs.\n" for n in range(200))
SMALL = ["--nsamples", "6", "--seqlen", "32", "--kernel", "torch"]


def run(model: Path, text: Path, output: Path, *flags: str) -> int:
    """The exit status of a run on few windows, in few steps, without reconstruction and recovery unless flags ask.

    A dataset among the flags takes the place of the text.
    """
    steps = [] if "--method" in flags else ["--steps", "4", "--reconstruct", "0", "--recover", "0"]
    dataset = [] if "--dataset" in flags else ["--dataset", str(text)]
    return main(["--model", str(model), *dataset, "--output", str(output), *SMALL, *steps, *flags])


def make_place(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A folder with a model and a text."""
    save_model(folder / "model", family, dtype, **changes)
    (folder / "text.txt").write_text(TEXT)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def shards(folder: Path) -> dict[str, bytes]:
    """The same as they are on the disk."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def report_of(folder: Path) -> dict[str, Any]:
    """The content of an output's report.json."""
    return json.loads((folder / "report.json").read_text())


def interrupt():
    raise KeyboardInterrupt


def interrupted_at(n, end=interrupt):
    """In a `with` block, the n-th call that makes a file durable ends the run, by default as Ctrl-C does."""
    left, sync = [n], files._sync

    def count(path):
        left[0] -= 1
        if left[0] == 0:
            end()
        sync(path)

    return patch.object(files, "_sync", count)


def killed_at(n, run):
    """Kill a copy of this process, which need not import anything, in its n-th call that makes a file durable."""
    child = os.fork()
    if not child:
        with interrupted_at(n, lambda: os.kill(os.getpid(), signal.SIGKILL)):
            run()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
