"""A plan as the lines that are printed."""

from collections.abc import Iterator
from typing import Any

from sparsefw.errors import counted
from sparsefw.estimate.memory import GIB

UNKNOWN = (
    "not known: no rates of this card were measured yet; give --tflops and --bandwidth, or run with --measure on it"
)

# Kinds of products of a solve, in the order in which they are printed.
PRODUCTS = ("steps", "refits", "target", "starts", "errors")

PLACES = {"gpu": "on the device", "host": "in host memory", "file": "in a file in {folder}"}


def lines(content: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed of a plan.

    Args:
        content: the plan, from `plan.plan`.
    """
    yield from _workload_lines(content)
    yield ""
    yield from _flops_table(content)
    yield ""
    yield from _memory_table(content)
    yield ""
    yield f"device: {content['device']}"
    yield from _rank_lines(content)
    yield f"placement: {_placement(content['placement'])}"
    disk = content["disk"]
    yield (
        f"disk: {disk['output'] / 1e9:.2f} GB of output; until the end also {disk['kept'] / 1e9:.2f} GB of compared "
        f"methods, {disk['activations'] / 1e9:.2f} GB of activations"
    )
    for note in content["notes"]:
        yield f"note: {note}"
    yield f"hours: {_hours(content)}"


def _workload_lines(content: dict[str, Any]) -> Iterator[str]:
    model, workload = content["model"], content["workload"]
    yield (
        f"model: {model['name']}, {model['class']}, {model['parameters']:,} parameters, "
        f"{counted(model['blocks'], 'block')}, {model['dtype']}"
    )
    evaluation = " + ".join(map(str, workload["evaluation"]))
    yield (
        f"windows: {workload['windows']} of {workload['seqlen']} tokens"
        f"{f', {evaluation} for evaluation' if evaluation else ''}"
    )
    yield (
        f"prune: {workload['sparsity']} by {', '.join(workload['methods'])}, target {workload['target']}, "
        f"products in {workload['precision']}"
    )
    for method, counts in content["products"].items():
        products = {name: counts[name] for name in PRODUCTS if counts[name]}
        parts = ", ".join(f"{name} {count}" for name, count in products.items())
        yield f"products of a solve by {method}: {sum(products.values())} ({parts})"


def _flops_table(content: dict[str, Any]) -> Iterator[str]:
    seconds, cell = content["seconds"], "{:>10}".format
    yield " ".join([f"{'at least':16}", f"{'of a block':>21}", f"{'of the run':>21}"])
    heads = ["Tflop", "GB", "Tflop", "GB", "disk GB", *(["hours"] if seconds else [])]
    yield " ".join([f"{'':16}", *map(cell, heads)])
    for phase, row in content["phases"].items():
        numbers = [
            row[part][what] / unit for part in ("block", "run") for what, unit in (("flops", 1e12), ("bytes", 1e9))
        ]
        cells = [f"{number:.4g}" if number else "-" for number in [*numbers, row["disk"]["bytes"] / 1e9]]
        cells += [f"{seconds[phase] / 3600:.3f}"] if seconds else []
        yield " ".join([f"{phase:16}", *map(cell, cells)])


def _memory_table(content: dict[str, Any]) -> Iterator[str]:
    yield f"{'peak memory, GiB':16} {'GPU':>10} {'host':>10}"
    peaks = [(phase, peak["gpu"], peak["host"]) for phase, peak in content["memory"].items()]
    peaks.append(("all", max(gpu for _, gpu, _ in peaks), max(host for _, _, host in peaks)))
    for phase, gpu, host in peaks:
        yield f"{phase:16} {gpu / GIB:10.2f} {host / GIB:10.2f}"
    limits = [content["limits"].get(what, 0) for what in ("gpu", "host")]
    gpu, host = ("any" if limit is None else f"{limit / GIB:.2f}" for limit in limits)
    yield f"{'limit':16} {gpu:>10} {host:>10}"


def _rank_lines(content: dict[str, Any]) -> Iterator[str]:
    if "ranks" not in content:
        return
    ranks, sent = content["ranks"], content["traffic"]
    gpus, nodes = ranks["gpus"], ranks["nodes"]
    machines = f"{nodes} machines" if nodes > 1 else "one machine"
    yield (
        f"ranks: {gpus * nodes}, {gpus} on {'each of ' if nodes > 1 else ''}{machines}; work, memory and hours are of "
        "the rank with the most, the disk is that of all"
    )
    shares = ", ".join(f"{what} {share:.3f}" for what, share in ranks["imbalance"].items())
    yield f"largest share over the mean one: {shares}"
    for part in ("block", "run"):
        kinds = ", ".join(f"{kind} {nbytes / 1e9:.4g}" for kind, nbytes in sent[part].items())
        yield f"sent by a rank for {'a block' if part == 'block' else 'the run'}, GB: {kinds}"
    yield f"transfers: {_transfers(sent)}"


def _transfers(sent: dict[str, Any]) -> str:
    links, named = sent["links"], {"inside": "on a machine", "between": "between machines"}
    if sent["seconds"] is None:
        return "time not known; say what a GPU sends to the others with --link"
    rates = ", ".join(
        f"{links[what] / 1e9:.4g} GB/s {where}{' (assumed)' if what in links['assumed'] else ''}"
        for what, where in named.items()
        if links[what]
    )
    share = "" if sent["share"] is None else f", {100 * sent['share']:.1f} % of the run"
    return f"at least {sent['seconds'] / 3600:.4f} hours{share}, at {rates}"


def _placement(placement: dict[str, Any]) -> str:
    where = PLACES[placement["place"]].format(folder=placement["folder"])
    together = "the next block is read and the last one written meanwhile"
    ahead = together if placement["ahead"] else "blocks one after another"
    kept = f", inputs of up to {placement['kept_width']} entries kept" if placement["kept_width"] else ""
    return (
        f"micro-batches of {counted(placement['batch'], 'window')}, activations {where}, {ahead}, "
        f"solves in {placement['solver'] / GIB:.2f} GiB{kept}"
    )


def _hours(content: dict[str, Any]) -> str:
    rates = content["rates"]
    if not rates:
        return UNKNOWN
    flops = ", ".join(f"{unit} {rate / 1e12:.4g} Tflop/s" for unit, rate in rates["flops"].items())
    disk = f"disk {rates['disk'] / 1e9:.4g} GB/s" if rates["disk"] else "the disk at no time (--disk)"
    at = f"{flops}, memory {rates['bandwidth'] / 1e9:.4g} GB/s {rates['source']}, {disk}"
    return f"at least {content['seconds']['all'] / 3600:.3f}, at {at}"
