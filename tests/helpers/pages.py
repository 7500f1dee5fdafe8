"""The report of a run."""

from dataclasses import asdict

from sparsefw.api import given_arguments
from sparsefw.cli import run_parser, settings_of
from sparsefw.report.content import BlockRecord, CalibrationText, EvaluationText, MemoryRecord, Report
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import Span

TYPES = ("self_attn.q_proj", "mlp.down_proj")


def layer(name: str, method: str, mask: float, error: float) -> LayerResult:
    """A layer with these relative errors."""
    warm = 1000.0
    return LayerResult(
        name=name,
        shape=(4, 8),
        pattern="0.5",
        kept=16,
        method=method,
        warm_start="wanda",
        alpha=0.0,
        steps=30,
        target="layer",
        error_warm_start=warm,
        error_mask=warm * mask,
        error=warm * error,
        relative_mask=mask,
        relative_error=error,
        gap=None if method == "wanda" else warm * 0.1,
        seconds=0.25,
    )


def parsed(arguments: list[str]) -> dict[str, dict]:
    """The arguments of a report and those that were given, from a command line."""
    inputs, config, output = settings_of(run_parser(None).parse_args(arguments))
    found = asdict(inputs) | asdict(config.for_calibration(8, 128)) | asdict(output)
    found |= {"output": str(found.pop("folder")), "compare": config.compare[:1]}
    return {"arguments": found, "given": given_arguments(inputs, config, None)}


def report_of_run(prefix: str = "model.layers", arguments: tuple[str, ...] = ()) -> Report:
    """The report of a run of wanda and sparsefw. Block i is read, then at work from second 10 i + 2 to 10 i + 12."""
    names = [f"{prefix}.{i}" for i in range(3)]
    phases = (("calibrate", 2, 5), ("solve", 5, 11), ("forward", 11, 12))
    timeline = [Span(None, "main", "embed", 0.0, 1.5)]
    for i in range(3):
        timeline += [Span(i, "main", phase, 10.0 * i + start, 10.0 * i + end) for phase, start, end in phases]
        timeline.append(Span(i, "read", "read", 10.0 * i - 5, 10.0 * i))
    perplexity = {"dense": 10.0, "wanda": 20.123456, "sparsefw": 15.5}
    return Report(
        **parsed(["--sparsity", "0.5", "--output", "out", *arguments]),
        versions={"python": "3", "torch": "2"},
        device="a card",
        data=CalibrationText("a text", "abc123", windows=8, seqlen=128, seed=5),
        evaluation=[EvaluationText("evaluation text", "def456", windows=4, seqlen=128, perplexity=perplexity)],
        layers=[
            layer(f"{name}.{kind}.weight", method, *([1.0, 1.0] if method == "wanda" else [0.8, 0.5 + 0.1 * i]))
            for i, name in enumerate(names)
            for method in ("wanda", "sparsefw")
            for kind in TYPES
        ],
        kept_dense=[],
        seconds={"calibrate": 9.0, "solve": 18.0},
        blocks=[
            BlockRecord(i, name, "once", {"calibrate": 1.0, "solve": 2.0 + i}, host_bytes=(i + 1) << 30, gpu_bytes=0)
            for i, name in enumerate(names)
        ],
        timeline=timeline,
        peak_memory={"host_bytes": 3 << 30, "gpu_bytes": 0, "gpu_reserved_bytes": 0},
        memory=MemoryRecord(
            limits={"host": 4 << 30},
            expected={"host": 2 << 30},
            activations="host",
            batch_windows=2,
            solver_bytes=1 << 30,
            read_ahead=True,
            kept_width=48,
        ),
        notes=[],
    )
