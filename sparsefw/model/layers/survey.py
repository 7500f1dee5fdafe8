"""What one micro-batch through a block shows of its layers, and the stages in which they are pruned."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError
from sparsefw.model.layers.block_tape import BlockTape, record_block
from sparsefw.model.layers.dataflow import Dataflow
from sparsefw.model.layers.experts import experts_of
from sparsefw.model.layers.names import Layer, is_expert, kind_of
from sparsefw.model.layers.stage import UNKNOWN_ROLE, Role, Stage, Write, is_watched
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
        cuts: where the block can go on from its residual stream, see `dataflow`.
        ignored: names of the layers that were seen and not selected.
        experts: names of modules that may be experts.
        signature: surveys with equal ones are of blocks that make the same calls.
    """

    layers: list[Layer]
    roles: dict[str, Role]
    cuts: list[Point]
    ignored: tuple[str, ...] = ()
    experts: frozenset[str] = frozenset()
    signature: tuple = ()


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
        block, run, hidden, handed_on: as for `record_block`.
        selected: selects the layers to look at.
        confirmed: what is known of other blocks, see `survey_tape`.
        experts: names of modules that may be experts; None: those of `experts_of`.
    """
    tape, returned = record_block(block, run, hidden, handed_on)
    # All else that the block returned leaves memory.
    output = hidden_of(returned)
    del returned
    found = survey_tape(tape, experts_of(block) if experts is None else experts, selected)
    return confirm(found, run, hidden, output, {} if confirmed is None else confirmed)


def survey_tape(tape: BlockTape, experts: frozenset[str], selected: Selector = everything) -> Survey:
    """What a recorded forward shows of the layers of a block; whether it runs in parts is not known yet.

    Args:
        tape: the forward.
        experts: names of modules that may be experts.
        selected: selects the layers to look at.
    """
    watch, flow = Watch(tape.names, experts, selected, record_outputs=True), Dataflow(tape, experts)
    watch.look(tape)
    roles = {name: _role(name, tape, watch, flow, experts) for name in watch.layers}
    signature = (*flow.signature, *flow.cuts, *roles.items())
    return Survey([*watch.layers.values()], roles, flow.cuts, tuple(watch.ignored), experts, signature)


def _role(name: str, tape: BlockTape, watch: Watch, flow: Dataflow, experts: frozenset[str]) -> Role:
    call, cuts = flow.call_of(name), flow.cuts
    segment = sum(cut.call < call for cut in cuts)
    made = None if is_expert(name, experts) else flow.input_of(name)
    if made is None:
        return Role(segment)
    stream, write = cuts[segment - 1] if segment else INPUT, None
    if sums := watch.outputs.sums.get(name):
        behind = cuts[segment] if segment < len(cuts) else None
        ends = watch.outputs.is_output(tape.output, name) if behind is None else flow.is_at(sums[0].out, behind)
        if len(sums) > 1 or not flow.is_at(sums[0].other, stream) or not ends:
            return Role(segment)
        write = Write(stream, behind)
    saves = any(stream.call < use.call < made.call for use in flow.uses)
    return Role(segment, made, write, saves and flow.enough(made, stream))


def confirm(found: Survey, run: RunBlock, hidden: Tensor, output: Tensor, confirmed: Confirmed) -> Survey:
    """A survey without the points of the block, unless the block runs in parts.

    Args:
        found: the survey.
        run, hidden: as for `record_block`.
        output: the hidden states that the block returned.
        confirmed: what is known of other blocks. The first block of a kind is run in parts, and the parts are compared
            with the whole; those that make the same calls are not.
    """
    if found.signature not in confirmed:
        confirmed[found.signature] = _runs_in_parts(run, hidden, found, output)
    if confirmed[found.signature]:
        return found
    return replace(found, roles=dict.fromkeys(found.roles, UNKNOWN_ROLE), cuts=[])


def _runs_in_parts(run: RunBlock, hidden: Tensor, found: Survey, output: Tensor) -> bool:
    """Whether the parts of a block give what the whole gives, bit for bit."""
    try:
        inputs = [(role, role.input) for role in found.roles.values() if role.input is not None]
        taken, whole = run_part(run, {INPUT: hidden}, {*found.cuts, *(point for _, point in inputs)})
        outputs = [hidden_of(whole)]
        starts: list[dict[Point, Tensor]] = [{INPUT: hidden}, *({cut: taken[cut]} for cut in found.cuts)]
        kept = [starts[role.segment] | {point: taken[point]} for role, point in inputs if role.keepable]
        outputs += [hidden_of(run_part(run, given)[1]) for given in (*starts[1:], *kept)]
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
    # No layer of a stage, or of a later one, lies before the segment that its runs begin with.
    lowest = [min(role.segment for role in of_stage) for of_stage in roles]
    segments = [*accumulate(reversed(lowest), min)][::-1]
    starts, found = [INPUT, *surveyed.cuts], []
    for n, (key, layers) in enumerate(by_key.items()):
        final = n == len(by_key) - 1
        moves = not final and segments[n + 1] > segments[n]
        stage = Stage(
            key,
            last=layers[-1].name if key == layers[0].gram else None,
            final=final,
            start=starts[segments[n]],
            behind=starts[segments[n + 1]] if moves else None,
        )
        if not is_watched(roles[n]):
            first = roles[n][0]
            stage = replace(
                stage,
                input=first.input,
                keepable=first.keepable and first.segment == segments[n],
                layers=tuple(layers),
                writes={x.name: role.write for x, role in zip(layers, roles[n], strict=True) if role.write},
            )
        found.append(stage)
    return found
