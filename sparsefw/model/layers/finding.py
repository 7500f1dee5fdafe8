"""Find the layers of a block, and their stages, by one micro-batch through it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.model.layers.names import Layer, is_expert, kind_of
from sparsefw.model.layers.outputs import Outputs
from sparsefw.model.layers.stage import UNKNOWN_ROLE, Role, Stage, Write, first_segments, is_watched
from sparsefw.model.layers.trace import Trace
from sparsefw.model.layers.watch import Selector, Watch, everything
from sparsefw.model.parts import INPUT, Point, run_part
from sparsefw.model.stand_ins import hidden_of

# Runs a micro-batch through a block: called with the block's input, returns what the block does.
RunBlock = Callable[[Tensor], Any]

# Whether blocks with a trace of this signature can be run in parts.
Confirmed = dict[tuple, bool]


@dataclass(frozen=True)
class Survey:
    """The layers of a block, as one micro-batch shows them.

    Attributes:
        layers: the selected layers, in the order of use.
        roles: the role of each.
        cuts: where the block can go on from its residual stream, see `trace`.
        inputs: by layer, the point of its input, where it is known.
        writes: the layers that write to the stream.
        attention: number of layers that are used before attention is.
        ignored: names of the layers that were seen and not selected.
        experts: see `WeightNames`.
    """

    layers: list[Layer]
    roles: dict[str, Role]
    cuts: list[Point]
    inputs: dict[str, Point]
    writes: dict[str, Write]
    attention: int = 0
    ignored: tuple[str, ...] = ()
    experts: frozenset[str] = frozenset()


def survey(
    block: nn.Module,
    run: RunBlock,
    hidden: Tensor,
    selected: Selector = everything,
    *,
    handed_on: Callable[[Any], Any] = lambda returned: (),
    confirmed: Confirmed | None = None,
    experts: frozenset[str] | None = None,
) -> Survey:
    """Look at the layers of a block.

    Args:
        block: the block, on its device.
        run: runs a micro-batch through it.
        hidden: one micro-batch.
        selected: selects the layers to look at.
        handed_on: called with what the block has returned; tells the tensors that later blocks are given, beside the
            hidden states.
        confirmed: what is known of other blocks. The first block of a kind is run in parts, and the parts are compared
            with the whole; those that make the same calls are not.
        experts: as for `WeightNames`.
    """
    watch, trace = Watch(block, selected, record_outputs=True, experts=experts), Trace(block, hidden, experts)
    returned: list[Any] = []

    def run_traced() -> None:
        with trace:
            returned.append(run(hidden))

    with torch.no_grad():
        watch.through(run_traced)
    trace.end((hidden_of(returned[0]), handed_on(returned[0])))
    found = _roles(list(watch.layers.values()), trace, watch.outputs, hidden_of(returned[0]))
    found = replace(found, ignored=tuple(watch.ignored), experts=trace.experts)
    watch.outputs.clear()
    known = {} if confirmed is None else confirmed
    signature = (*trace.signature, *found.cuts, *found.roles.items())
    if signature not in known:
        known[signature] = _runs_in_parts(run, hidden, found, hidden_of(returned.pop()))
    if known[signature]:
        return found
    return replace(found, roles=dict.fromkeys(found.roles, UNKNOWN_ROLE), cuts=[], inputs={}, writes={})


def _roles(layers: list[Layer], trace: Trace, outputs: Outputs, output: Tensor) -> Survey:
    """The survey of layers, in whose block a micro-batch made these calls and recorded these outputs."""
    cuts, roles, inputs, writes = trace.cuts(), {}, {}, {}
    for layer in layers:
        call = trace.call_of(layer.name)
        segment = sum(cut.call < call for cut in cuts)
        stream = cuts[segment - 1] if segment else INPUT
        made = None if is_expert(layer.name, trace.experts) else trace.input_of(layer.name)
        if made is None:
            roles[layer.name] = Role(segment)
            continue
        inputs[layer.name] = made
        way = "reads"
        if sums := outputs.sums(layer.name):
            way = "outputs"
            behind = cuts[segment] if segment < len(cuts) else None
            only = len(sums) == 1 and trace.is_at(sums[0].other, stream)
            ends = outputs.is_output(output, layer.name) if behind is None else trace.is_at(sums[0].out, behind)
            if only and ends:
                way = "writes"
                writes[layer.name] = Write(stream, behind)
        saves = way != "outputs" and any(stream.call < use.call < made.call for use in trace.uses)
        roles[layer.name] = Role(segment, way, saves and trace.enough(made, stream))
    before = [layer for layer in layers if trace.call_of(layer.name) < (trace.attention or 0)]
    return Survey(layers, roles, cuts, inputs, writes, len(before))


def _runs_in_parts(run: RunBlock, hidden: Tensor, found: Survey, output: Tensor) -> bool:
    """Whether the parts of a block give what the whole gives, bit for bit."""
    try:
        points = {*found.cuts, *found.inputs.values()}
        taken, whole = run_part(run, {INPUT: hidden}, points)
        outputs = [hidden_of(whole)]
        for cut in found.cuts:
            outputs.append(hidden_of(run_part(run, {cut: taken[cut]})[1]))
        for layer, point in found.inputs.items():
            if found.roles[layer].keepable:
                segment = found.roles[layer].segment
                stream = {found.cuts[segment - 1]: taken[found.cuts[segment - 1]]} if segment else {INPUT: hidden}
                outputs.append(hidden_of(run_part(run, stream | {point: taken[point]})[1]))
    except torch.OutOfMemoryError:
        raise
    except (InputError, RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AttributeError):
        # A block that cannot do without data, because it branches on a value, say, is run as a whole.
        return False
    return all(torch.allclose(part, output, rtol=0, atol=0, equal_nan=True) for part in outputs)


def stages(surveyed: Survey) -> list[Stage]:
    """The stages of a block in the order of use."""
    by_key: dict[str, list[Layer]] = {}
    for layer in surveyed.layers:
        by_key.setdefault(kind_of(layer.gram, surveyed.experts), []).append(layer)
    roles = [[surveyed.roles[layer.name] for layer in layers] for layers in by_key.values()]
    segments = first_segments(roles)
    found = []
    for n, (key, layers) in enumerate(by_key.items()):
        final = n == len(by_key) - 1
        start = surveyed.cuts[segments[n] - 1] if segments[n] else INPUT
        moves = not final and segments[n + 1] > segments[n]
        stage = Stage(
            key,
            last=layers[-1].name if key == layers[0].gram else None,
            final=final,
            start=start,
            behind=surveyed.cuts[segments[n + 1] - 1] if moves else None,
        )
        if not is_watched(roles[n]):
            stage = replace(
                stage,
                input=surveyed.inputs[layers[0].name],
                keepable=roles[n][0].keepable and roles[n][0].segment == segments[n],
                layers=tuple(layers),
                writes={layer.name: surveyed.writes[layer.name] for layer in layers if layer.name in surveyed.writes},
            )
        found.append(stage)
    return found
