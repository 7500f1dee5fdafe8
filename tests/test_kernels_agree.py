"""`--kernel torch` and `--kernel triton` prune the embedded default to the same masks."""

import json

import torch
from safetensors.torch import load_file

from sparsefw.run import main

# A whole run is slow in the interpreter; a few steps on a few windows go through every kernel.
SMALL = ["--nsamples", "8", "--steps", "6", "--eval-windows", "1", "--precision", "ieee"]


def prune(folder, kernel):
    assert main(["--kernel", kernel, "--output", str(folder), *SMALL]) == 0
    weights = {name: w for path in folder.glob("*.safetensors") for name, w in load_file(path).items()}
    return weights, json.loads((folder / "report.json").read_text())


def test_same_masks_on_the_embedded_default(tmp_path):
    """Sums in another order: entries whose scores agree up to fp32 rounding may swap, and later inputs feel it."""
    (torch_weights, torch_report), (triton_weights, triton_report) = (
        prune(tmp_path / k, k) for k in ("torch", "triton")
    )
    first = [name for name in torch_weights if ".layers.0." in name]
    assert len(first) == 9
    assert all(torch.equal(torch_weights[name], triton_weights[name]) for name in first)
    swapped = sum(((torch_weights[n] != 0) != (triton_weights[n] != 0)).sum().item() for n in torch_weights)
    assert swapped < 1e-3 * sum(w.numel() for w in torch_weights.values())
    for a, b in zip(torch_report["layers"], triton_report["layers"], strict=True):
        assert abs(a["error"] - b["error"]) <= 1e-3 * a["error"]
