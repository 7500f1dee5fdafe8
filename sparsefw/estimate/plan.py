"""The plan of a run: what `sparsefw.plan` prints and writes as JSON."""

from collections import Counter
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
from sparsefw.estimate.rates import CARDS, LINKS, NETWORK, Links, Rates
from sparsefw.estimate.traffic import imbalance, traffic
from sparsefw.estimate.workload import PROCESS, PlannedRun, Workload, pruned_shape
from sparsefw.flags import checked_number
from sparsefw.inputs import DEFAULT, DEFAULT_MODEL, Inputs
from sparsefw.solver import PruneConfig
from sparsefw.solver.calls import calls

# Stands for no memory limit, in bytes: more than any machine has.
UNLIMITED = 2**62

# The most GPUs of a machine, and the most machines.
MOST_RANKS = 4096


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for, or several that are alike.

    Attributes:
        card: its GPU, one of CARDS; None: this machine, with a GPU or without.
        gpu_memory, host_memory: memory limits in GiB; None: what the card has or what is free here, less a tenth.
        gpus: number of GPUs that are used, each by a rank.
        nodes: number of machines.

    Raises:
        InputError: a limit or a number is out of its range.
    """

    card: str | None = None
    gpu_memory: float | None = None
    host_memory: float | None = None
    gpus: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        for name, number in (("gpus", self.gpus), ("nodes", self.nodes)):
            checked_number(name, number, 1, MOST_RANKS, whole=True)
        if self.ranks > 1 and not self.gpu:
            raise InputError(f"--gpus {self.gpus}: no CUDA device here; say which card is meant with --gpu")
        if self.gpus > 1 and self.card is None and self.gpus > torch.cuda.device_count():
            here = torch.cuda.device_count()
            raise InputError(f"--gpus {self.gpus}: {here} here; to plan for other machines, name their card with --gpu")
        for name, value in (("gpu_memory", self.gpu_memory), ("host_memory", self.host_memory)):
            if value is not None:
                checked_number(name, value, 0, process.MOST_MEMORY)

    @property
    def gpu(self) -> bool:
        """Whether the run has a GPU."""
        return self.card is not None or torch.cuda.is_available()

    @property
    def ranks(self) -> int:
        """The ranks on all machines."""
        return self.gpus * self.nodes

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def name(self) -> str:
        """The device's name in the plan."""
        return self.card or ("this machine's GPU" if self.gpu else "this machine's CPU")

    def limits(self) -> dict[str, int]:
        """Memory limits of a rank in bytes: "host", and with a GPU "gpu". The ranks on a machine share its memory.

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
        limits |= {what: int(gib * GIB) for what, gib in given.items() if gib is not None}
        if limits["host"] != UNLIMITED:
            limits["host"] //= self.gpus
        return limits


@dataclass(frozen=True)
class RateFlags:
    """Rates on the command line, see `rates.given` and `rates.Links`; `measure` has them measured here."""

    tflops: list[str]
    bandwidth: float | None = None
    disk: float | None = None
    measure: bool = False
    link: float | None = None
    network: float | None = None


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
    described = describe(str(DEFAULT_MODEL) if inputs.embedded else inputs.model)
    shape = pruned_shape(described.shape, config)
    if machine.ranks > inputs.nsamples:
        raise InputError(
            f"--gpus {machine.gpus}: {machine.ranks} GPUs share {inputs.nsamples} calibration windows, and each needs "
            "one; give fewer GPUs, or more windows with --nsamples"
        )
    seqlen = data.window_length(inputs.model, inputs.seqlen, described.max_seqlen)
    evaluation = tuple(_evaluation_windows(inputs, name, seqlen) for name in dict.fromkeys(inputs.evaluate))
    workload = Workload(
        windows=inputs.nsamples,
        evaluation=evaluation,
        seqlen=seqlen,
        config=config,
        gpu=machine.gpu,
        threads=torch.get_num_threads() if config.kernel == "torch" else 1,
        process=PROCESS + data.window_bytes(inputs.nsamples, evaluation, seqlen),
        ranks=machine.ranks,
        machines=machine.nodes,
    )
    limits = machine.limits()
    placement, needs = place(shape, workload, limits, folder)
    vertex_products = not machine.gpu and config.kernel == "torch"
    run = PlannedRun(shape, described.traits, workload, placement, vertex_products)
    speed, links = _rates(rate_flags, machine, run), _links(rate_flags, machine)
    link = links.slowest
    seconds: dict[str, float] | None = None
    if speed:
        seconds = totals.phase_seconds(run, speed, link) | {"all": totals.seconds(run, speed, link)}
    return {
        **_run_content(described, inputs, run),
        "device": machine.name,
        "limits": {what: None if size == UNLIMITED else size for what, size in limits.items()},
        **_estimates(run, needs),
        "rates": asdict(speed) if speed else None,
        "seconds": seconds,
        **(_of_ranks(run, machine, links, seconds["all"] if seconds else None) if machine.ranks > 1 else {}),
        "notes": [*described.notes, *_notes(inputs, run)],
    }


def _evaluation_windows(inputs: Inputs, name: str, seqlen: int) -> int:
    """The number of windows of an evaluation text. The embedded model's own text is read, no other."""
    if inputs.eval_windows is not None:
        return inputs.eval_windows
    if not inputs.embedded or name != DEFAULT:
        raise InputError(f"--eval {name}: texts are not read here; say how long it is with --eval-windows")
    with data.TokenizerProcess(DEFAULT_MODEL) as tokenizer:
        return data.evaluation_windows(tokenizer, name, seqlen=seqlen).n


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


def _links(rate_flags: RateFlags, machine: Machine) -> Links:
    """The links between ranks, with their rates."""
    if rate_flags.link and machine.gpus == 1:
        raise InputError("--link: there is one GPU on a machine; give --gpus, too")
    if rate_flags.network and machine.nodes == 1:
        raise InputError("--network: there is one machine; give --nodes, too")
    inside, between, assumed = rate_flags.link, rate_flags.network, []
    if machine.gpus > 1 and inside is None and machine.card:
        inside = LINKS[machine.card]
        assumed.append("inside")
    if machine.nodes > 1 and between is None:
        between = NETWORK
        assumed.append("between")
    return Links(inside, between, tuple(assumed))


def _of_ranks(run: PlannedRun, machine: Machine, links: Links, seconds: float | None) -> dict[str, Any]:
    """How the work is shared out, and what that costs."""
    sent = {block: traffic(run, block) for block in run.block_counts}
    # The last block makes more steps than the others, each of which sends gradients.
    largest = max(sent, key=lambda block: (not block.predicts, sent[block].waited))
    of_run: Counter[str] = Counter()
    for block, count in run.block_counts.items():
        of_run.update({kind: count * nbytes for kind, nbytes in sent[block].most.items()})
    waiting = None
    if links.slowest:
        waiting = sum(
            count * totals.transfer_seconds(run, block, links.slowest) for block, count in run.block_counts.items()
        )
    return {
        "ranks": {"gpus": machine.gpus, "nodes": machine.nodes, "imbalance": imbalance(run, largest)},
        "traffic": {
            "block": sent[largest].most,
            "run": dict(of_run),
            "links": asdict(links),
            "seconds": waiting,
            "share": waiting / seconds if waiting is not None and seconds else None,
        },
    }


def _notes(inputs: Inputs, run: PlannedRun) -> Iterator[str]:
    workload, config = run.workload, run.workload.config
    if inputs.tasks:
        yield f"--tasks {','.join(inputs.tasks)}: tasks are not read here: not counted"
    if workload.seqlen < inputs.seqlen:
        yield f"seqlen: {workload.seqlen} tokens, the model's maximum (asked for {inputs.seqlen})"
    if "sparsefw" in config.methods:
        if run.vertex_products:
            yield "products of steps come from what changed since on a CPU, which depends on the weights: not counted"
        if config.swaps:
            yield f"swaps, of which a row makes {config.swaps} at most, depend on the weights: not counted"
