"""Survey the layers of a block with one micro-batch, and find the stages in which they are pruned.

A recorded forward shows how the block computes its output from its input. A cut is a tensor with the shape of the
hidden states; the calls after it read no earlier tensor. In most models the sum after the attention is a cut. Memory
can hold a cut in place of the block's input, and the layers after the cut need only the part of the block after it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.find_layers import BlockTape, record_block
from sparsefw.model.layers import Experts, Layer, ResidualWrite, Role, Stage, by_input, is_expert
from sparsefw.model.partial_forward import INPUT, SAME, Point, RunBlock, next_point, run_part
from sparsefw.model.stubs import hidden_of
from sparsefw.model.tape import READING, Op, TapeValue
from sparsefw.model.watch import Outputs, Selector, Watch, everything

# The number for the block's caller, which reads the block's output. It is larger than the number of any call.
_CALLER = 1 << 60

# Names of functions whose result has a shape that depends on the values of a tensor.
_SHAPED = {"nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"}

# Maps the signature of a survey to the reason why such blocks cannot run in parts; "" if they can.
SplitFailures = dict[tuple, str]


@dataclass(frozen=True)
class Survey:
    """The layers of a block, as one micro-batch shows them.

    Attributes:
        layers: the selected layers, in the order of use.
        roles: the role of each selected layer, by the layer's name.
        cuts: points from which the block can resume: the first cut, if any, between two successive layers.
        ignored: names of the layers that `selected` has left out.
        experts: names of modules that may be experts.
        signature: equal for blocks that make the same calls.
    """

    layers: list[Layer]
    roles: dict[str, Role]
    cuts: list[Point]
    ignored: tuple[str, ...]
    experts: Experts
    signature: tuple


def survey(
    block: nn.Module,
    run: RunBlock,
    hidden: Tensor,
    selected: Selector = everything,
    *,
    handed_on: Callable[[Any], Any] = lambda returned: (),
    split_failures: SplitFailures,
    experts: Experts,
) -> Survey:
    """Survey the layers of a block.

    Args:
        block, run, hidden, handed_on: as for `record_block`.
        selected: selects layers by name.
        split_failures: results for earlier blocks, see `without_failed_split`; the result for this block is added.
        experts: names of modules that may be experts.
    """
    tape, output = record_block(block, run, hidden, handed_on)
    found = survey_tape(tape, experts, selected)
    return without_failed_split(found, run, hidden, output, split_failures)


def survey_tape(tape: BlockTape, experts: Experts, selected: Selector) -> Survey:
    """Survey a recorded forward of a block. `without_failed_split` then tests whether the block runs in parts.

    Args:
        tape: the forward.
        experts: names of modules that may be experts.
        selected: selects layers by name.
    """
    watch, flow = Watch(tape.names, experts, selected), _Dataflow(tape, experts)
    for op in tape.ops:
        watch.outputs.follow(op, [*filter(watch.see, tape.products[op.number])])
    roles = {name: flow.role(name, watch.outputs) for name in watch.layers}
    # Two forwards count as equal if they call the same functions with outputs of the same shapes.
    made = [(op.name, tuple(tuple(x.shape) for x in op.made)) for op in tape.ops]
    signature = (*made, *flow.cuts, *roles.items())
    return Survey([*watch.layers.values()], roles, flow.cuts, tuple(watch.ignored), experts, signature)


@dataclass
class _Call:
    """A call in the dataflow of a block. The block's input counts as the output of call 0.

    Attributes:
        point: the point of the call's output.
        last_read: number of the last call that reads the output.
        same_as: number of the first call whose output has the same values, perhaps in another shape.
        uses_input: whether the output depends on the block's input.
        like_hidden: whether the output has the shape and dtype of the hidden states.
    """

    point: Point
    last_read: int
    same_as: int
    uses_input: bool = False
    like_hidden: bool = False


class _Dataflow:
    """The dataflow from the block's input to its output in a recorded forward.

    Args:
        tape: the forward.
        experts: names of modules that may be experts.

    Attributes:
        cuts: see `Survey`.
    """

    def __init__(self, tape: BlockTape, experts: Experts) -> None:
        self._tape, self._experts = tape, experts
        points = accumulate(tape.ops, lambda point, op: next_point(point, op.function), initial=INPUT)
        self._calls = [_Call(point, n, n) for n, point in enumerate(points)]
        self._calls[0].uses_input = True
        # The first call that reads values of a tensor, or multiplies with an expert. From this call on another
        # micro-batch may number calls differently, since it takes another branch or reaches other experts.
        self._varying = _CALLER
        # Maps each layer, selected or not, to the calls that multiply with its weight, and the points of their inputs.
        # The point is None if it is unknown, if the input was changed in place, or if the call multiplies with several
        # matrices.
        self._uses: dict[str, list[tuple[int, Point | None]]] = {}
        for op in tape.ops:
            self._add(op)
        for x in (tape.output, *tape.handed_on):
            if (call := self._call_of(x)) is not None:
                self._calls[call].last_read = _CALLER
        self.cuts = self._find_cuts()

    def _add(self, op: Op) -> None:
        """Add the next call."""
        sources = {call for x in op.inputs if (call := self._call_of(x)) is not None}
        products = self._tape.products[op.number]
        for product in products:
            input_point = self._unchanged(product.X) if product.alone else None
            self._uses.setdefault(product.layer.name, []).append((op.number, input_point))
        if (sources and _reads_values(op)) or any(is_expert(p.layer.name, self._experts) for p in products):
            self._varying = min(self._varying, op.number)
        # A call that makes no tensor (it asks for a shape or a dtype) works on meta tensors, and needs no input.
        if not op.made or not sources:
            return
        added = self._calls[op.number]
        added.uses_input = True
        for source in sources:
            self._calls[source].last_read = op.number
        if op.name in SAME and len(sources) == 1:
            added.same_as = self._calls[min(sources)].same_as
        hidden, out = self._tape.hidden, op.out
        added.like_hidden = isinstance(out, TapeValue) and (out.shape, out.dtype) == (hidden.shape, hidden.dtype)

    def _call_of(self, x: object) -> int | None:
        """Number of the call that made a value; None if the value does not depend on the block's input."""
        return x.maker if isinstance(x, TapeValue) and x.maker is not None and self._calls[x.maker].uses_input else None

    def _unchanged(self, x: object) -> Point | None:
        """The point of a value; None if the value arose from a write through another view of the tensor."""
        if (call := self._call_of(x)) is None:
            return None
        return self._calls[call].point if not call or x in self._tape.ops[call - 1].made else None

    def _find_cuts(self) -> list[Point]:
        """Find the first cut between each two successive layers, if there is one."""
        uses = sorted(call for uses in self._uses.values() for call, _ in uses)
        # read_until[n]: the last call that reads an output of a call before n.
        read_until = [0, *accumulate((call.last_read for call in self._calls), max)]
        found = []
        for before, after in pairwise(uses):
            cuts = (n for n in range(before, after) if self._calls[n].like_hidden and read_until[n] <= n)
            if (cut := next(cuts, None)) is not None and cut < self._varying:
                found.append(self._calls[cut].point)
        return found

    def role(self, layer: str, outputs: Outputs) -> Role:
        """The role of a layer; `outputs` holds the layers' outputs in the recorded forward."""
        (call, input_point), *more_uses = self._uses[layer]
        segment = sum(cut.call < call for cut in self.cuts)
        # A layer that is used twice has two inputs, and so no single point.
        if input_point is None or more_uses or self._varying <= input_point.call or is_expert(layer, self._experts):
            return Role(segment)
        stream, write = self.cuts[segment - 1] if segment else INPUT, None
        if sums := outputs.sums.get(layer):
            after = self.cuts[segment] if segment < len(self.cuts) else None
            other, out = sums[0]
            ends = outputs.pairs[layer][1] is self._tape.output if after is None else self._is_at(out, after)
            if len(sums) > 1 or not self._is_at(other, stream) or not ends:
                return Role(segment)
            write = ResidualWrite(stream, after)
        saves = any(stream.call < use < input_point.call for uses in self._uses.values() for use, _ in uses)
        return Role(segment, input_point, write, saves and self._is_enough(input_point, stream))

    def _is_at(self, x: object, point: Point) -> bool:
        """Whether a value equals the tensor of a point, perhaps in another shape."""
        call = self._call_of(x)
        return call is not None and self._calls[call].same_as == self._calls[point.call].same_as

    def _is_enough(self, point: Point, cut: Point) -> bool:
        """Whether the block can resume from the tensors of a point and of the cut before the point."""
        same = self._calls[cut.call].same_as
        before = (call for n, call in enumerate(self._calls[: point.call]) if n < cut.call or call.same_as != same)
        return all(call.last_read <= point.call for call in before)


def _reads_values(op: Op) -> bool:
    """Whether later calls, or the shape of the result, may depend on the values of a tensor."""
    if op.name == "__getitem__":
        return any(x.dtype in (torch.bool, torch.uint8) for x in op.inputs[1:])
    return op.name in READING | _SHAPED or (op.name == "where" and len(op.args) + len(op.kwargs) == 1)


def without_failed_split(
    found: Survey, run: RunBlock, hidden: Tensor, output: Tensor, split_failures: SplitFailures
) -> Survey:
    """Test whether a block runs in parts; if not, return its survey without cuts and points.

    Args:
        found: the survey.
        run, hidden: as for `record_block`.
        output: the hidden states that the block returned.
        split_failures: results for earlier blocks; the result for this block is added. Only the first of the blocks
            with the same signature is tested.
    """
    if found.signature not in split_failures:
        split_failures[found.signature] = _split_failure(run, hidden, found, output)
    if not split_failures[found.signature]:
        return found
    return replace(found, roles=dict.fromkeys(found.roles, Role()), cuts=[])


def _split_failure(run: RunBlock, hidden: Tensor, found: Survey, output: Tensor) -> str:
    """Say why a block cannot run in parts; "" if its parts give the same bits as the whole block."""
    try:
        inputs = [(role, role.input) for role in found.roles.values() if role.input is not None]
        taken, whole = run_part(run, {INPUT: hidden}, {*found.cuts, *(point for _, point in inputs)})
        outputs = [hidden_of(whole)]
        starts: list[dict[Point, Tensor]] = [{INPUT: hidden}, *({cut: taken[cut]} for cut in found.cuts)]
        kept = [starts[role.segment] | {point: taken[point]} for role, point in inputs if role.cacheable]
        outputs += [hidden_of(run_part(run, given)[1]) for given in (*starts[1:], *kept)]
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (InputError, RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AttributeError) as error:
        # A block that needs data in the skipped part, for example to branch on a value, runs as a whole.
        return shown(first_line(error))
    same = all(torch.allclose(part, output, rtol=0, atol=0, equal_nan=True) for part in outputs)
    return "" if same else "its parts give other bits than the whole"


def stages(surveyed: Survey) -> list[Stage]:
    """List the stages of a block in the order of use."""
    by_key = by_input(surveyed.layers, surveyed.experts)
    roles = [[surveyed.roles[layer.name] for layer in layers] for layers in by_key.values()]
    # The runs of a stage begin at the lowest segment among its own layers and all later layers.
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
            next_start=starts[segments[n + 1]] if moves else None,
        )
        # If the input of a layer is not a known point, the stage's layers have to be watched.
        if all(role.input is not None for role in roles[n]):
            first = roles[n][0]
            stage = replace(
                stage,
                input=first.input,
                cacheable=first.cacheable and first.segment == segments[n],
                layers=tuple(layers),
                writes={x.name: role.write for x, role in zip(layers, roles[n], strict=True) if role.write},
            )
        found.append(stage)
    return found
