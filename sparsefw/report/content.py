"""`Report`: the content of report.json."""

import importlib.metadata
import json
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

import sparsefw
from sparsefw.checkpoint.files import parse
from sparsefw.data.batches import BATCHES
from sparsefw.errors import InputError, counted
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import Span

# The largest mixtures of experts have 200,000 layers, counting each expert. Such a report has about 110 MiB.
MAX_REPORT_BYTES = 256 * 2**20

# The value of a flag.
Argument = str | int | float | bool | tuple[str, ...] | None

T = TypeVar("T", bound=Argument)

# The last bits of a result depend on the versions of these libraries, of Python and of this package.
LIBRARIES = ("torch", "triton", "transformers", "datasets", "safetensors")

# Results are named by method. Results of the dense model, and of the recovered one, have these names.
DENSE, RECOVERED = "dense", "recovered"

# A model with this share of zeros is not called dense.
SPARSE = 0.05


@dataclass(frozen=True)
class Reconstruction:
    """The reconstruction of a block: its kept weights were fitted together.

    Attributes:
        before, after: loss on held-out windows before and after the reconstruction, mean over tokens of
            e = ‖pruned - dense‖² / ‖dense‖² of the hidden states after the block, or 1 + log e if e is above 1.
        steps: number of steps.
        put_back: whether the weights were put back, because the loss did not fall.
        varies: names of torch operations that may give other bits in another run, at most one per rank; empty: the
            weights have the same bits in every run.
    """

    before: float
    after: float
    steps: int
    put_back: bool
    varies: str = ""


@dataclass
class BlockRecord:
    """A block of the model.

    Attributes:
        block: number of the block, from 0.
        name: name of the block in the model, such as "model.layers.0".
        way: how the calibration windows ran through the block, such as "stage by stage, from the start".
        seconds: by phase, on the main lane of rank 0.
        host_bytes: peak memory of the process on the host, up to the end of this block; the highest of all ranks.
        gpu_bytes: peak bytes of tensors on the GPU in this block, or, in the first one, so far; 0 without a GPU.
        gpu_reserved_bytes: peak bytes that torch reserved on the GPU in this block, which the memory limit bounds.
        reconstruction: the reconstruction of the block; None: the block was not reconstructed.
        zeros: of the first block with layers to prune, the share of zeros in their weights before the run.
    """

    block: int
    name: str
    way: str
    seconds: dict[str, float]
    host_bytes: int
    gpu_bytes: int
    gpu_reserved_bytes: int = 0
    reconstruction: Reconstruction | None = None
    zeros: float = 0.0


@dataclass(frozen=True)
class TextWindows:
    """The windows of a text.

    Attributes:
        source: the name that the user gave the text.
        hash: SHA-256 of the tokens, in hex.
        windows: number of windows.
        seqlen: tokens in a window.
    """

    source: str
    hash: str
    windows: int
    seqlen: int


@dataclass(frozen=True)
class CalibrationText(TextWindows):
    """The calibration windows.

    Attributes:
        seed: seed of the draw of the windows.
    """

    seed: int


@dataclass(frozen=True)
class EvaluationText(TextWindows):
    """The windows of an evaluation text, with the results.

    Attributes:
        perplexity: by name, the perplexity of the dense model ("dense"), of each method, and after the run's recovery
            ("recovered").
    """

    perplexity: dict[str, float]


def amount(source: str, number: int, length: int) -> str:
    """Say in words how many windows of a text, or batches of a caller, run through a model."""
    if source == BATCHES:
        return f"{number} {'batch' if number == 1 else 'batches'} of up to {length} positions"
    return f"{counted(number, 'window')} of {length} tokens"


@dataclass(frozen=True)
class MemoryRecord:
    """The memory limits of a run, and the placement that was chosen for these limits.

    Attributes:
        limits: memory limits in bytes: "host", and with a GPU "gpu".
        expected: expected peak bytes, "host" and "gpu".
        activations: where the activations of all windows are: "gpu", "host" or "file".
        batch_windows: windows in a micro-batch.
        solver_bytes: most bytes for the state of one solve.
        read_ahead: whether the next block is read during the work on a block.
        kept_width: width of the widest layer input that is kept for the next stage of its block; 0: no input is kept.
        step_windows: windows in a step of a reconstruction, if less than a micro-batch; 0: a whole micro-batch.
    """

    limits: dict[str, int]
    expected: dict[str, int]
    activations: str
    batch_windows: int
    solver_bytes: int
    read_ahead: bool
    kept_width: int
    step_windows: int = 0


@dataclass(frozen=True)
class RankRecord:
    """A rank: one process of a run on several processes.

    Attributes:
        machine: name of the rank's machine.
        device: name of the rank's GPU or processor.
        windows: number of the rank's calibration windows.
        seconds: by phase, on the rank's main lane.
        waited: seconds that the host has waited for transfers to and from other ranks.
        peak_memory: measured peaks, see `memory.peak_memory`.
    """

    machine: str
    device: str
    windows: int
    seconds: dict[str, float]
    waited: float
    peak_memory: dict[str, int]


@dataclass(frozen=True)
class Recovery:
    """A recovery: all kept weights of the pruned model were fitted together, see `driver.distill`.

    Attributes:
        model: the dense model.
        dataset: the calibration texts, as flags name them.
        data: the calibration windows.
        before, after: divergence of predictions on held-out windows before and after, mean over tokens.
        steps: number of steps.
        tokens: number of tokens that were asked for; 0: as many as fit into a number of hours.
        versions: by name, versions, commit and device of a later recovery; those of the run's own are the report's.
    """

    model: str
    dataset: tuple[str, ...]
    data: CalibrationText
    before: float
    after: float
    steps: int
    tokens: int = 0
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The report of a run.

    Attributes:
        arguments: values of Inputs, PruneConfig and the output's flags, by name, with defaults resolved.
        versions: by name, the versions of this package, of Python and of LIBRARIES, and this package's commit.
        device: name of the GPU or processor.
        data: the calibration windows.
        evaluation: the evaluation texts with perplexities.
        layers: a result for each layer and method.
        kept_dense: names of the matrices inside the blocks that were not pruned.
        seconds: by phase, on the main lane of rank 0.
        blocks: the blocks, in order.
        timeline: when each phase of each block ran.
        peak_memory: measured peaks of the whole run, see `memory.peak_memory`; the highest of all ranks.
        memory: limits, expected peaks and placement.
        notes: lines for the user about the source.
        ranks: the processes of a run on several processes; empty for one process.
        in_memory: whether the caller passed a model in memory; else the model came from the checkpoint in `model`.
        recovery: the run's own recovery; None: it had none, or it gained nothing.
        recoveries: recoveries of the finished output, in order.
        given: by name, the arguments that the user gave; None: an older version wrote the report without this field.
    """

    arguments: dict[str, Argument]
    versions: dict[str, str]
    device: str
    data: CalibrationText
    evaluation: list[EvaluationText]
    layers: list[LayerResult]
    kept_dense: list[str]
    seconds: dict[str, float]
    blocks: list[BlockRecord]
    timeline: list[Span]
    peak_memory: dict[str, int]
    memory: MemoryRecord
    notes: list[str]
    ranks: list[RankRecord] = field(default_factory=list)
    in_memory: bool = False
    recovery: Recovery | None = None
    recoveries: list[Recovery] = field(default_factory=list)
    given: dict[str, Argument] | None = None

    def argument(self, name: str, kind: type[T]) -> T:
        """Return the value of a flag.

        Raises:
            InputError: the report has no such flag, or its value has another type.
        """
        if name not in self.arguments:
            raise InputError(f"arguments.{name}: missing; prune again with this version of sparsefw")
        value = self.arguments[name]
        if type(value) is not kind:
            raise InputError(f"arguments.{name}: expected {kind.__name__}, got {type(value).__name__}")
        return value

    @property
    def method(self) -> str:
        """The method whose weights were written."""
        return self.argument("method", str)

    @property
    def methods(self) -> list[str]:
        """All methods, those of `--compare` first. The weights of the last one were written."""
        return [*self.argument("compare", tuple), self.method]

    @property
    def written(self) -> str:
        """Return the name of the results of the written weights."""
        return RECOVERED if self.all_recoveries else self.method

    @property
    def zeros(self) -> float:
        """The share of zeros in the source, by its first block with layers to prune."""
        return max((block.zeros for block in self.blocks), default=0.0)

    @property
    def all_recoveries(self) -> list[Recovery]:
        """The run's own recovery and later ones, in order."""
        return [*filter(None, [self.recovery]), *self.recoveries]

    def layers_of(self, method: str) -> list[LayerResult]:
        """Return the results of one method."""
        return [layer for layer in self.layers if layer.method == method]

    def to_json(self) -> str:
        """Return the content of report.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_report(path: Path) -> Report:
    """Read a report.json.

    Raises:
        InputError: the file is missing, too large or not JSON, or a run could not have written a value; the message
            names the place.
    """
    return parse(Report, path, MAX_REPORT_BYTES)


def report_of(folder: Path) -> Report:
    """Read the report in a folder that a run wrote.

    Raises:
        InputError: there is no report, or as for `read_report`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that sparsefw wrote")
    if not (folder / "report.json").is_file():
        raise InputError(f"{folder}: no report.json in it; give a folder that sparsefw wrote")
    return read_report(folder / "report.json")


def versions() -> dict[str, str]:
    """Return by name the versions of Python, of this package and of LIBRARIES."""
    by_name = {"python": platform.python_version(), "sparsefw": sparsefw.__version__}
    for name in LIBRARIES:
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_name[name] = "not installed"
    return by_name


def commit() -> dict[str, str]:
    """Return the commit of the checkout that this package is in, by "commit"; empty if it is in none."""
    checkout = Path(sparsefw.__file__).resolve().parents[1]
    with suppress(OSError, subprocess.CalledProcessError):
        if (checkout / ".git").exists():
            command = ["git", "describe", "--always", "--dirty"]
            done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
            return {"commit": done.stdout.strip()}
    return {}


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def device_and_versions(device: torch.device) -> dict[str, str]:
    """Return by name what the last bits of a result depend on: device, number of threads on a CPU, and versions."""
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    return {"device": device_name(device)} | threads | versions()
