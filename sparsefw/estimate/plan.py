"""The plan of a run: what `sparsefw.plan` prints and writes as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsefw import data, process
from sparsefw.errors import InputError
from sparsefw.estimate import rates, totals
from sparsefw.estimate.describe import DescribedModel, describe
from sparsefw.estimate.memory import GIB, MemoryNeeds, disk_space
from sparsefw.estimate.placing import place
from sparsefw.estimate.rates import CARDS, Rates
from sparsefw.estimate.workload import PROCESS, PlannedRun, Workload
from sparsefw.flags import checked_number
from sparsefw.inputs import DEFAULT_MODEL, Inputs
from sparsefw.solver import PruneConfig
from sparsefw.solver.calls import calls
from sparsefw.solver.selection import check_used

# Stands for no memory limit, in bytes: more than any machine has.
UNLIMITED = 2**62


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for.

    Attributes:
        card: its GPU, one of CARDS; None: this machine, with a GPU or without.
        gpu_memory, host_memory: memory limits in GiB; None: what the card has or what is free here, less a margin.

    Raises:
        InputError: a limit is out of its range.
    """

    card: str | None = None
    gpu_memory: float | None = None
    host_memory: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("gpu_memory", self.gpu_memory), ("host_memory", self.host_memory)):
            if value is not None:
                checked_number(name, value, 0, process.MOST_MEMORY)

    @property
    def gpu(self) -> bool:
        """Whether the run has a GPU."""
        return self.card is not None or torch.cuda.is_available()

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def name(self) -> str:
        """The device's name in the plan."""
        return self.card or ("this machine's GPU" if self.gpu else "this machine's CPU")

    def limits(self) -> dict[str, int]:
        """Memory limits in bytes: "host", and with a GPU "gpu".

        Raises:
            InputError: there is a limit for a GPU, and no GPU.
        """
        if self.card:
            limits = {"gpu": int(CARDS[self.card] * 10**9 * (1 - process.MARGIN)), "host": UNLIMITED}
        else:
            free = process.free_memory(self.device)
            limits = {what: int(size * (1 - process.MARGIN)) for what, size in free.items()}
        if self.gpu_memory is not None and "gpu" not in limits:
            raise InputError("--gpu-memory: no CUDA device here; say which card is meant with --gpu")
        given = {"gpu": self.gpu_memory, "host": self.host_memory}
        return limits | {what: int(gib * GIB) for what, gib in given.items() if gib is not None}


@dataclass(frozen=True)
class RateFlags:
    """Rates on the command line, see `rates.given`; `measure` has them measured here."""

    tflops: list[str]
    bandwidth: float | None = None
    disk: float | None = None
    measure: bool = False


def plan(inputs: Inputs, config: PruneConfig, machine: Machine, rate_flags: RateFlags, folder: Path) -> dict[str, Any]:
    """The content of --json; sizes in bytes, times in seconds, rates per second.

    Args:
        inputs, config: inputs and config of the run.
        machine: the machine that it is planned for.
        rate_flags: rates of the machine.
        folder: folder of the output, and of the file of activations if there is one.

    Raises:
        InputError: there is no such model or layer, memory is too little, or rates are missing.
    """
    if inputs.evaluate and inputs.eval_windows is None:
        raise InputError(
            f"--eval {inputs.evaluate[0]}: texts are not read here; say how long it is with --eval-windows"
        )
    described = describe(str(DEFAULT_MODEL) if inputs.embedded else inputs.model)
    check_used(described.shape.layer_names, config.include, config.ignore)
    shape = described.shape.selected(config.selects)
    evaluation = (inputs.eval_windows,) * len(set(inputs.evaluate)) if inputs.eval_windows else ()
    seqlen = min(inputs.seqlen, described.max_seqlen or inputs.seqlen)
    workload = Workload(
        windows=inputs.nsamples,
        evaluation=evaluation,
        seqlen=seqlen,
        config=config,
        gpu=machine.gpu,
        threads=torch.get_num_threads() if config.kernel == "torch" else 1,
        process=PROCESS + data.window_bytes(inputs.nsamples, evaluation, seqlen),
    )
    limits = machine.limits()
    placement, needs = place(shape, workload, limits, folder)
    vertex_products = not machine.gpu and config.kernel == "torch"
    run = PlannedRun(shape, described.traits, workload, placement, vertex_products)
    speed = _rates(rate_flags, machine, run)
    return {
        **_run_content(described, inputs, run),
        "device": machine.name,
        "limits": {what: None if size == UNLIMITED else size for what, size in limits.items()},
        **_estimates(run, needs),
        "rates": asdict(speed) if speed else None,
        "seconds": totals.phase_seconds(run, speed) | {"all": totals.seconds(run, speed)} if speed else None,
        "notes": [*described.notes, *_notes(inputs, run)],
    }


def _run_content(described: DescribedModel, inputs: Inputs, run: PlannedRun) -> dict[str, Any]:
    """The model and the work."""
    workload, config = run.workload, run.workload.config
    return {
        "model": {
            "name": inputs.model,
            "class": described.name,
            "dtype": str(described.dtype).removeprefix("torch."),
            "parameters": run.shape.parameters,
            "blocks": len(run.shape.blocks),
        },
        "workload": {
            "windows": workload.windows,
            "evaluation": list(workload.evaluation),
            "seqlen": workload.seqlen,
            "methods": list(config.methods),
            "sparsity": config.pattern.text,
            "target": "dense" if config.uses_dense_target else "layer",
            "precision": config.precision,
        },
    }


def _estimates(run: PlannedRun, needs: MemoryNeeds) -> dict[str, Any]:
    """Everything that the run takes except time."""
    config, placement = run.workload.config, run.placement
    return {
        "products": {method: asdict(calls(method, config, config.uses_dense_target)) for method in config.methods},
        "phases": totals.phases(run),
        "memory": {phase: {"gpu": gpu, "host": host} for phase, (gpu, host) in needs.phases.items()},
        "placement": asdict(placement) | {"folder": str(placement.folder)},
        "disk": disk_space(run.shape, run.workload, placement),
    }


def _rates(rate_flags: RateFlags, machine: Machine, run: PlannedRun) -> Rates | None:
    disk = rate_flags.disk
    if not rate_flags.measure:
        return rates.given(rate_flags.tflops, rate_flags.bandwidth, disk) or rates.known(machine.card, disk)
    if rate_flags.tflops or rate_flags.bandwidth:
        raise InputError("--measure: finds what --tflops and --bandwidth say; give it or them")
    if machine.gpu and not torch.cuda.is_available():
        raise InputError(
            f"--measure: the run is planned for {machine.card}, and no GPU is here; run it on that machine"
        )
    widest = max(layer.d for block in run.shape.blocks for layer in block.layers)
    return rates.measured(sorted(totals.units(run)), widest, machine.device, disk)


def _notes(inputs: Inputs, run: PlannedRun) -> Iterator[str]:
    workload, config = run.workload, run.workload.config
    if workload.seqlen < inputs.seqlen:
        yield f"seqlen: {workload.seqlen} tokens, the model's maximum (asked for {inputs.seqlen})"
    if "sparsefw" in config.methods:
        if run.vertex_products:
            yield "products of steps come from what changed since on a CPU, which depends on the weights: not counted"
        if config.swaps:
            yield f"swaps, of which a row makes {config.swaps} at most, depend on the weights: not counted"
