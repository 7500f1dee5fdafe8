"""Survey the layers of a block by one micro-batch, and find the stages in which they are pruned.

A recorded forward shows how the block's output is made of its input. A cut is a tensor of the form of the hidden states
after which no call reads anything that was made before it: in most models the sum after the attention is one. It can
take the place of the block's input in memory, and later layers need only the part of the block after it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.experts import experts_of
from sparsefw.model.find_layers import BlockTape, record_block
from sparsefw.model.layers import Layer, ResidualWrite, Role, Stage, by_input, is_expert
from sparsefw.model.partial_forward import INPUT, SAME, Point, next_point, run_part
from sparsefw.model.stubs import hidden_of
from sparsefw.model.tape import READING, Op, TapeValue
from sparsefw.model.watch import Outputs, Selector, Watch, everything

# The number of the block's caller, who reads its output after all calls.
_CALLER = 1 << 60

# Names of functions whose results have a shape that depends on the numbers in a tensor.
_SHAPED = {"nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"}

# Runs a micro-batch through a block: called with the block's input, returns the block's output.
RunBlock = Callable[[Tensor], Any]

# By the signature of surveys, why their blocks cannot be run in parts; empty if they can.
SplitFailures = dict[tuple, str]


@dataclass(frozen=True)
class Survey:
    """The layers of a block, as one micro-batch shows them.

    Attributes:
        layers: the selected layers, in the order of use.
        roles: the role of each.
        cuts: the points at which the block can go on from its residual stream: the first cut between each two layers
            that are used one after the other, where there is one.
        ignored: names of the layers that were seen and not selected.
        experts: names of modules that may be experts.
        signature: a comparable form. Surveys with equal ones are of blocks that make the same calls.
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
    split_failures: SplitFailures | None = None,
    experts: frozenset[str] | None = None,
) -> Survey:
    """Survey the layers of a block.

    Args:
        block, run, hidden, handed_on: as for `record_block`.
        selected: selects the layers to look at.
        split_failures: what is known of other blocks, see `confirm`.
        experts: names of modules that may be experts; None: those of `experts_of`.
    """
    tape, output = record_block(block, run, hidden, handed_on)
    found = survey_tape(tape, experts_of(block) if experts is None else experts, selected)
    return confirm(found, run, hidden, output, {} if split_failures is None else split_failures)


def survey_tape(tape: BlockTape, experts: frozenset[str], selected: Selector = everything) -> Survey:
    """Survey a recorded forward of a block; whether the block runs in parts is not known yet.

    Args:
        tape: the forward.
        experts: names of modules that may be experts.
        selected: selects the layers to look at.
    """
    watch, flow = Watch(tape.names, experts, selected), _Dataflow(tape, experts)
    for op in tape.ops:
        watch.outputs.follow(op, [*filter(watch.see, tape.products.get(op.number, ()))])
    roles = {name: flow.role(name, watch.outputs) for name in watch.layers}
    # Equal functions and forms of all outputs mean equal forwards.
    made = [(op.name, tuple(tuple(x.shape) for x in op.made)) for op in tape.ops]
    signature = (*made, *flow.cuts, *roles.items())
    return Survey([*watch.layers.values()], roles, flow.cuts, tuple(watch.ignored), experts, signature)


@dataclass
class _Call:
    """A call in the dataflow of a block. The block's input counts as call 0.

    Attributes:
        point: the point of its output.
        last_read: number of the last call that reads its output.
        same_as: number of the call whose output has the same numbers, perhaps in another shape.
        follows: whether its output follows from the block's input.
        like_hidden: whether its output has the form of the hidden states.
    """

    point: Point
    last_read: int
    same_as: int
    follows: bool = False
    like_hidden: bool = False


class _Dataflow:
    """What follows from the block's input in a recorded forward.

    Args:
        tape: the forward.
        experts: names of modules that may be experts.

    Attributes:
        cuts: see `Survey`.
    """

    def __init__(self, tape: BlockTape, experts: frozenset[str]) -> None:
        self._tape, self._experts = tape, experts
        points = accumulate(tape.ops, lambda point, op: next_point(point, op.function), initial=INPUT)
        self._calls = [_Call(point, n, n) for n, point in enumerate(points)]
        self._calls[0].follows = True
        # The first call that reads numbers of a tensor, or multiplies with an expert. From there on another micro-batch
        # may number calls differently: it takes another branch, or reaches other experts.
        self._varying = _CALLER
        # By layer, selected or not: the calls that multiply with it, and the points of their inputs. A point is None if
        # it is not known, if the input was written to after it was made, or if the call multiplies with others, too.
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
        products = self._tape.products.get(op.number, ())
        for product in products:
            made = self._unchanged(product.X) if product.alone else None
            self._uses.setdefault(product.layer.name, []).append((op.number, made))
        if (sources and _reads_values(op)) or any(is_expert(p.layer.name, self._experts) for p in products):
            self._varying = min(self._varying, op.number)
        # A shape or a dtype is the same for a tensor without data.
        if not op.made or not sources:
            return
        added = self._calls[op.number]
        added.follows = True
        for source in sources:
            self._calls[source].last_read = op.number
        if op.name in SAME and len(sources) == 1:
            added.same_as = self._calls[min(sources)].same_as
        hidden, out = self._tape.hidden, op.out
        added.like_hidden = isinstance(out, TapeValue) and (out.shape, out.dtype) == (hidden.shape, hidden.dtype)

    def _call_of(self, x: object) -> int | None:
        """Number of the call that has made a value; None if it does not follow from the block's input."""
        return x.maker if isinstance(x, TapeValue) and x.maker is not None and self._calls[x.maker].follows else None

    def _unchanged(self, x: object) -> Point | None:
        """The point of a value; None if it was written to by other means than the call itself."""
        if (call := self._call_of(x)) is None:
            return None
        return self._calls[call].point if not call or x in self._tape.ops[call - 1].made else None

    def _varies(self, point: Point) -> bool:
        """Whether another micro-batch may number the point's call differently."""
        return self._varying <= point.call

    def _find_cuts(self) -> list[Point]:
        """Find the first cut between each two layers that are used one after the other, if there is one."""
        uses = sorted(call for uses in self._uses.values() for call, _ in uses)
        # By call: the last call that reads something made before it.
        read_until = [0, *accumulate((call.last_read for call in self._calls), max)]
        found = []
        for before, after in pairwise(uses):
            cuts = (n for n in range(before, after) if self._calls[n].like_hidden and read_until[n] <= n)
            if (cut := next(cuts, None)) is not None and not self._varies(self._calls[cut].point):
                found.append(self._calls[cut].point)
        return found

    def role(self, layer: str, outputs: Outputs) -> Role:
        """The role of a layer; `outputs` are those of the forward."""
        (call, made), *others = self._uses[layer]
        segment = sum(cut.call < call for cut in self.cuts)
        # A layer that is used twice has two inputs.
        if made is None or others or self._varies(made) or is_expert(layer, self._experts):
            return Role(segment)
        stream, write = self.cuts[segment - 1] if segment else INPUT, None
        if sums := outputs.sums.get(layer):
            after = self.cuts[segment] if segment < len(self.cuts) else None
            other, out = sums[0]
            ends = outputs.pairs[layer][1] is self._tape.output if after is None else self._is_at(out, after)
            if len(sums) > 1 or not self._is_at(other, stream) or not ends:
                return Role(segment)
            write = ResidualWrite(stream, after)
        saves = any(stream.call < use < made.call for uses in self._uses.values() for use, _ in uses)
        return Role(segment, made, write, saves and self._is_enough(made, stream))

    def _is_at(self, x: object, point: Point) -> bool:
        """Whether a value has the numbers of a point, perhaps in another shape."""
        call = self._call_of(x)
        return call is not None and self._calls[call].same_as == self._calls[point.call].same_as

    def _is_enough(self, point: Point, cut: Point) -> bool:
        """Whether the block can go on from a point, together with the cut before it."""
        same = self._calls[cut.call].same_as
        before = (call for n, call in enumerate(self._calls[: point.call]) if n < cut.call or call.same_as != same)
        return all(call.last_read <= point.call for call in before)


def _reads_values(op: Op) -> bool:
    """Whether later calls, or the shape of the result, may depend on the numbers in a tensor."""
    if op.name == "__getitem__":
        return any(x.dtype in (torch.bool, torch.uint8) for x in op.inputs[1:])
    return op.name in READING | _SHAPED or (op.name == "where" and len(op.args) + len(op.kwargs) == 1)


def confirm(found: Survey, run: RunBlock, hidden: Tensor, output: Tensor, split_failures: SplitFailures) -> Survey:
    """Take the points out of a survey, unless the block runs in parts.

    Args:
        found: the survey.
        run, hidden: as for `record_block`.
        output: the hidden states that the block returned.
        split_failures: what is known of other blocks. The first block of a kind is run in parts, and compared with
            the whole. Blocks that make the same calls are not.
    """
    if found.signature not in split_failures:
        split_failures[found.signature] = _stays_whole(run, hidden, found, output)
    if not split_failures[found.signature]:
        return found
    return replace(found, roles=dict.fromkeys(found.roles, Role()), cuts=[])


def _stays_whole(run: RunBlock, hidden: Tensor, found: Survey, output: Tensor) -> str:
    """Say why a block cannot be run in parts; empty if the parts give the output of the whole, bit for bit."""
    try:
        inputs = [(role, role.input) for role in found.roles.values() if role.input is not None]
        taken, whole = run_part(run, {INPUT: hidden}, {*found.cuts, *(point for _, point in inputs)})
        outputs = [hidden_of(whole)]
        starts: list[dict[Point, Tensor]] = [{INPUT: hidden}, *({cut: taken[cut]} for cut in found.cuts)]
        kept = [starts[role.segment] | {point: taken[point]} for role, point in inputs if role.cacheable]
        outputs += [hidden_of(run_part(run, given)[1]) for given in (*starts[1:], *kept)]
    except torch.OutOfMemoryError:
        raise
    except (InputError, RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AttributeError) as error:
        # A block that cannot do without data, because it branches on a number, say, is run as a whole.
        return shown(first_line(error))
    same = all(torch.allclose(part, output, rtol=0, atol=0, equal_nan=True) for part in outputs)
    return "" if same else "its parts give other bits than the whole"


def stages(surveyed: Survey) -> list[Stage]:
    """List the stages of a block in the order of use."""
    by_key = by_input(surveyed.layers, surveyed.experts)
    roles = [[surveyed.roles[layer.name] for layer in layers] for layers in by_key.values()]
    # The runs of a stage begin with the lowest segment of its layers and of later ones.
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
        # Otherwise its layers have to be watched.
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
