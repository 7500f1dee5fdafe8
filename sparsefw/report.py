"""What a run says: a fixed-width row per layer, the table at the end, report.json."""

import importlib.metadata
import platform
import resource
from dataclasses import asdict

import torch

from sparsefw.data import Windows
from sparsefw.driver import Outcome
from sparsefw.prune import LayerResult

_COLUMNS = (
    ("layer", "<44"),
    ("shape", ">13"),
    ("method", ">9"),
    ("steps", ">5"),
    ("error", ">11"),
    ("relative", ">8"),
    ("gap", ">11"),
    ("seconds", ">7"),
    ("peak GiB", ">8"),
)


def peak_memory() -> dict[str, int]:
    """Peak bytes of this process: resident on the host (file-backed pages counted), and allocated on the GPU."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"host_bytes": host, "gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0}


def layer_header() -> str:
    """Column names of the rows of `layer_row`."""
    return " ".join(f"{name:{layout}}" for name, layout in _COLUMNS)


def layer_row(row: LayerResult) -> str:
    """One layer's result; the peak is the GPU's where there is one, else the host's."""
    peak = peak_memory()
    cells = (
        row.name,
        "x".join(map(str, row.shape)),
        row.method,
        str(row.steps),
        f"{row.error:.4e}",
        f"{row.relative_error:.4f}",
        "-" if row.gap is None else f"{row.gap:.4e}",
        f"{row.seconds:.2f}",
        f"{(peak['gpu_bytes'] or peak['host_bytes']) / 2**30:.2f}",
    )
    return " ".join(f"{cell:{layout}}" for cell, (_, layout) in zip(cells, _COLUMNS, strict=True))


def mean_relative_error(outcome: Outcome, method: str) -> float:
    """Mean over the layers of error / error of the warm start."""
    errors = [row.relative_error for row in outcome.layers if row.method == method]
    return sum(errors) / len(errors)


def summary(outcome: Outcome, methods: list[str], evaluation: Windows | None) -> str:
    """The table at the end of a run: perplexity and mean relative error by method, seconds by phase."""
    lines = [f"{'':12} {'perplexity':>11} {'relative error':>15}"]
    if evaluation is not None:
        lines.append(f"{'dense':12} {outcome.perplexity['dense']:11.3f} {'':>15}")
    for method in methods:
        ppl = f"{outcome.perplexity[method]:.3f}" if method in outcome.perplexity else "-"
        lines.append(f"{method:12} {ppl:>11} {mean_relative_error(outcome, method):15.4f}")
    lines.append("")
    if evaluation is not None:
        lines.append(f"perplexity: {evaluation.n} windows of {evaluation.seqlen} tokens of {evaluation.source}")
    lines.append("relative error: error / error of the warm start's mask, mean over layers")
    lines.append("seconds: " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in outcome.seconds.items()))
    return "\n".join(lines)


def report(
    arguments: dict, device: torch.device, calibration: Windows, seed: int, evaluation: Windows | None, outcome: Outcome
) -> dict:
    """The content of report.json.

    Args:
        arguments: of the run, with defaults resolved.
        device: that it ran on.
        calibration: the windows it calibrated on.
        seed: that they were drawn with.
        evaluation: the held-out windows, or None.
        outcome: what was measured.
    """
    held_out = {} if evaluation is None else {"windows": evaluation.n, "seqlen": evaluation.seqlen}
    if evaluation is not None:
        held_out |= {"source": evaluation.source, "hash": evaluation.hash}
    return {
        "arguments": arguments,
        "versions": versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "data": {
            "source": calibration.source,
            "hash": calibration.hash,
            "windows": calibration.n,
            "seqlen": calibration.seqlen,
            "seed": seed,
        },
        "evaluation": {name: {"perplexity": p, **held_out} for name, p in outcome.perplexity.items()},
        "layers": [asdict(row) for row in outcome.layers],
        "kept_dense": outcome.dense,
        "seconds": dict(outcome.seconds),
        "peak_memory": peak_memory(),
    }


def versions() -> dict[str, str]:
    """Versions of this package, Python and what the numbers depend on; of what is installed."""
    found = {"python": platform.python_version()}
    for name in ("sparsefw", "torch", "triton", "transformers", "datasets", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
