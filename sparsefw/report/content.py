"""`Report`: the content of report.json."""

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

import sparsefw
from sparsefw.checkpoint.files import parse, read_bounded
from sparsefw.data.batches import BATCHES
from sparsefw.errors import InputError, counted
from sparsefw.solver.layer import LayerResult
from sparsefw.timeline import Span

# The largest mixtures have 200,000 layers, counting experts. Their report takes about 110 MiB.
MAX_REPORT_BYTES = 256 * 2**20

# A value of a flag.
Argument = str | int | float | bool | tuple[str, ...] | None

T = TypeVar("T", bound=Argument)

# The libraries that the last bits of a result depend on, besides Python and this package.
LIBRARIES = ("torch", "triton", "transformers", "datasets", "safetensors")

# The name of the dense model, where results have the name of their method.
DENSE = "dense"

# The two losses of a reconstruction: they compare hidden states, or predictions, of the pruned and the dense model.
HIDDEN, PREDICTIONS = "hidden states", "predictions"


@dataclass(frozen=True)
class Reconstruction:
    """How the kept weights of a block were fitted together.

    Attributes:
        before, after: loss of held-out windows before and after it, mean over tokens.
        steps: number of steps.
        put_back: whether the weights were put back, because the loss did not fall.
        loss: HIDDEN: the squared distance of hidden states after the block to those of the dense model, relative to
            the square of the latter; above 1, 1 plus its logarithm. PREDICTIONS: the divergence of predicted tokens,
            see `model.head`.
        varies: operations of torch that may give other bits in another run, one or, with several ranks, more; empty:
            the weights have the same bits in every run.
    """

    before: float
    after: float
    steps: int
    put_back: bool
    loss: str = HIDDEN
    varies: str = ""


@dataclass(frozen=True)
class BlockRecord:
    """A block of the model.

    Attributes:
        block: its number, from 0.
        name: its name in the model, "model.layers.0".
        way: how the calibration windows ran through it.
        seconds: by phase, on the main lane of rank 0.
        host_bytes: peak memory of the process on the host, up to the end of this block; the highest of all ranks.
        gpu_bytes: peak bytes of tensors on the GPU in this block; 0 without a GPU.
        gpu_reserved_bytes: peak bytes that torch took from the GPU in this block. They count against the memory limit.
        reconstruction: the reconstruction of the block; None: it was not reconstructed.
    """

    block: int
    name: str
    way: str
    seconds: dict[str, float]
    host_bytes: int
    gpu_bytes: int
    gpu_reserved_bytes: int = 0
    reconstruction: Reconstruction | None = None


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
        seed: seed by which the windows were drawn.
    """

    seed: int


@dataclass(frozen=True)
class EvaluationText(TextWindows):
    """An evaluation text.

    Attributes:
        perplexity: perplexity of the dense model ("dense") and of each method, by name.
    """

    perplexity: dict[str, float]


def amount(source: str, number: int, length: int) -> str:
    """Say how many windows of a text, or how many batches of a caller, run through a model."""
    if source == BATCHES:
        return f"{number} {'batch' if number == 1 else 'batches'} of up to {length} positions"
    return f"{counted(number, 'window')} of {length} tokens"


@dataclass(frozen=True)
class MemoryRecord:
    """The memory limits of a run, and the placement that keeps to them.

    Attributes:
        limits: memory limits in bytes: "host", and with a GPU "gpu".
        expected: bytes expected at the peak, in the same places.
        activations: the place of activations.
        batch_windows: windows in a micro-batch.
        solver_bytes: bytes that the state of one solve may take.
        read_ahead: whether the next block is read during the work on a block.
        kept_width: entries of the widest input of a layer that is kept for the next run through its block; 0: none.
        step_windows: windows in a step of a reconstruction that takes a piece of a micro-batch; 0: it takes all of it.
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
    """A process of a run on several.

    Attributes:
        machine: name of its machine.
        device: name of its GPU or processor.
        windows: number of its calibration windows.
        seconds: by phase, on its main lane.
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
    """A recovery: all kept weights of the pruned model were fitted together, see `sparsefw recover`.

    Attributes:
        model: the dense model.
        dataset: the calibration texts, as flags name them.
        data: the calibration windows.
        before, after: divergence of predicted tokens of held-out windows, mean over tokens.
        steps: number of steps.
    """

    model: str
    dataset: tuple[str, ...]
    data: CalibrationText
    before: float
    after: float
    steps: int


@dataclass(frozen=True)
class Report:
    """All that a run reports.

    Attributes:
        arguments: values of Inputs, PruneConfig and the output's flags, by name, with defaults resolved.
        versions: versions of this package, Python and the libraries that numbers depend on, by name.
        device: name of the GPU or processor.
        data: the calibration windows.
        evaluation: the texts that perplexity was measured on.
        layers: a result for each layer and method.
        kept_dense: names of the matrices inside the blocks that were not pruned.
        seconds: by phase, on the main lane of rank 0.
        blocks: the blocks in their order.
        timeline: when each phase of each block ran.
        peak_memory: measured peaks of the whole run, see `memory.peak_memory`; the highest of all ranks.
        memory: limits, expected peaks and placement.
        notes: lines about the source that the user should know.
        ranks: the processes of a run on several; empty for one process.
        in_memory: whether the model was in memory. Otherwise it was read from the checkpoint that `model` names.
        recoveries: the recoveries after the run, in their order.
        given: the arguments that the user gave, by name. None: the report is of a version that did not store them.
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
    recoveries: list[Recovery] = field(default_factory=list)
    given: dict[str, Argument] | None = None

    def argument(self, name: str, kind: type[T]) -> T:
        """Return the value of a flag.

        Raises:
            InputError: the file that the report was read from has no such flag, or a value of another kind.
        """
        if name not in self.arguments:
            raise InputError(f"arguments.{name}: missing; prune again with this version of sparsefw")
        value = self.arguments[name]
        if not isinstance(value, kind) or type(value) is not kind:
            raise InputError(f"arguments.{name}: expected {kind.__name__}, got {type(value).__name__}")
        return value

    @property
    def method(self) -> str:
        """The method whose weights were written."""
        return self.argument("method", str)

    @property
    def compared(self) -> list[str]:
        """The methods of `--compare`."""
        return list(self.argument("compare", tuple))

    @property
    def methods(self) -> list[str]:
        """All methods. The weights of the last one were written."""
        return [*self.compared, self.method]

    def layers_of(self, method: str) -> list[LayerResult]:
        """Return the results of one method."""
        return [layer for layer in self.layers if layer.method == method]

    def to_json(self) -> str:
        """Return the content of report.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_report(path: Path) -> Report:
    """Read a report.json.

    Raises:
        InputError: the file is missing, too large or no JSON, or a value is not what a run writes; the message names
            the place.
    """
    return parse(Report, read_bounded(path, MAX_REPORT_BYTES), path)


def report_of(folder: Path) -> Report:
    """Read the report in a folder that a run wrote.

    Raises:
        InputError: there is no report, or as `read_report`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give one that sparsefw run wrote")
    if not (folder / "report.json").is_file():
        raise InputError(f"{folder}: no report.json in it; give a folder that sparsefw run wrote")
    return read_report(folder / "report.json")


def versions() -> dict[str, str]:
    """Return the versions of Python, this package and LIBRARIES, by name."""
    by_name = {"python": platform.python_version(), "sparsefw": sparsefw.__version__}
    for name in LIBRARIES:
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_name[name] = "not installed"
    return by_name


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"


def device_and_versions(device: torch.device) -> dict[str, str]:
    """Return device, number of threads and versions: the last bits of a result depend on them."""
    threads = {"threads": str(torch.get_num_threads())} if device.type == "cpu" else {}
    return {"device": device_name(device)} | threads | versions()
