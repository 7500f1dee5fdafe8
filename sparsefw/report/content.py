"""What a run says: a fixed-width row per layer, the table at the end, report.json."""

import importlib.metadata
import platform
from dataclasses import asdict

import torch

from sparsefw.data.windows import Windows
from sparsefw.driver.loop import Outcome
from sparsefw.estimate.memory import Needs
from sparsefw.model.placement import Placement
from sparsefw.process import peak_memory
from sparsefw.solver.layer import LayerResult

_COLUMNS = (
    ("layer", "<44"),
    ("shape", ">13"),
    ("method", ">9"),
    ("steps", ">5"),
    ("error", ">11"),
    ("mask only", ">9"),
    ("relative", ">8"),
    ("gap", ">11"),
    ("seconds", ">7"),
    ("peak GiB", ">8"),
)


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
        f"{row.relative_mask:.4f}",
        f"{row.relative_error:.4f}",
        "-" if row.gap is None else f"{row.gap:.4e}",
        f"{row.seconds:.2f}",
        f"{(peak['gpu_bytes'] or peak['host_bytes']) / 2**30:.2f}",
    )
    return " ".join(f"{cell:{layout}}" for cell, (_, layout) in zip(cells, _COLUMNS, strict=True))


def mean_relative(outcome: Outcome, method: str, what: str = "relative_error") -> float:
    """Mean over the layers of `relative_error` or `relative_mask`."""
    errors = [getattr(row, what) for row in outcome.layers if row.method == method]
    return sum(errors) / len(errors)


def summary(outcome: Outcome, methods: list[str], evaluation: list[Windows]) -> str:
    """The table at the end of a run: perplexity and mean relative errors by method, seconds by phase."""
    texts = [f"perplexity {n}" if len(evaluation) > 1 else "perplexity" for n, _ in enumerate(evaluation, 1)]
    lines = ["".join(f"{name:>16}" for name in ("", *texts, "mask only", "relative error"))]
    for name in (["dense"] if evaluation else []) + methods:
        cells = [f"{outcome.perplexity[windows.source][name]:.3f}" for windows in evaluation]
        if name != "dense":
            cells += [f"{mean_relative(outcome, name, what):.4f}" for what in ("relative_mask", "relative_error")]
        lines.append(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append("")
    for text, windows in zip(texts, evaluation, strict=True):
        lines.append(f"{text}: {windows.n} windows of {windows.seqlen} tokens of {windows.source}")
    lines.append(
        "relative error: error / error of the warm start's mask, mean over layers; mask only: before the refit"
    )
    lines.append(
        "seconds: " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in outcome.timeline.seconds().items())
    )
    return "\n".join(lines)


def report(
    arguments: dict,
    device: torch.device,
    calibration: Windows,
    seed: int,
    evaluation: list[Windows],
    outcome: Outcome,
) -> dict:
    """The content of report.json.

    Args:
        arguments: of the run, with defaults resolved.
        device: that it ran on.
        calibration: the windows it calibrated on.
        seed: that they were drawn with.
        evaluation: the held-out windows of each text.
        outcome: what was measured.
    """
    return {
        "arguments": arguments,
        "versions": versions(),
        "device": _name(device),
        "data": {
            "source": calibration.source,
            "hash": calibration.hash,
            "windows": calibration.n,
            "seqlen": calibration.seqlen,
            "seed": seed,
        },
        "evaluation": [
            {
                "source": windows.source,
                "hash": windows.hash,
                "windows": windows.n,
                "seqlen": windows.seqlen,
                "perplexity": outcome.perplexity[windows.source],
            }
            for windows in evaluation
        ],
        "layers": [asdict(row) for row in outcome.layers],
        "kept_dense": outcome.dense,
        "seconds": outcome.timeline.seconds(),
        "blocks": outcome.blocks,
        "timeline": [asdict(span) for span in outcome.timeline.spans],
        "peak_memory": {what: max(n, *(b[what] for b in outcome.blocks)) for what, n in peak_memory().items()},
    }


def memory(placement: Placement, needed: Needs, budgets: dict[str, int]) -> dict:
    """What the run was allowed and expected to take, and how it was arranged."""
    return {
        **{f"{what}_budget_bytes": n for what, n in budgets.items()},
        **{f"{what}_expected_bytes": getattr(needed, what) for what in budgets},
        "activations": placement.place,
        "batch_windows": placement.batch,
        "solver_bytes": placement.solver,
        "read_ahead": placement.ahead,
    }


def placement_line(placement: Placement, needed: Needs, budgets: dict[str, int]) -> str:
    """What a run says of its memory before it begins."""
    peaks = [f"{getattr(needed, what) / 2**30:.2f} of {n / 2**30:.2f} GiB ({what})" for what, n in budgets.items()]
    where = "" if "gpu" not in budgets and placement.place == "host" else f"; activations: {placement.place}"
    ahead = "" if placement.ahead else "; nothing read ahead"
    return (
        f"memory: {', '.join(peaks)} expected at the peak; {placement.batch} windows at a time, solves in "
        f"{placement.solver / 2**30:.3g} GiB{where}{ahead}"
    )


def machine(device: torch.device) -> dict[str, str]:
    """What the last bits of a result depend on beside its input: versions, processor, threads."""
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    return {"device": _name(device)} | threads | versions()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of this package, Python and what the numbers depend on; of what is installed."""
    found = {"python": platform.python_version()}
    for name in ("sparsefw", "torch", "triton", "transformers", "datasets", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
