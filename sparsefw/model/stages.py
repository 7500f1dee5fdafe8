"""What one micro-batch through a block shows of its layers, and the stages in which they are pruned.

A recorded forward shows how the block goes from its input to its output: which call makes a tensor, and which calls
read it. A tensor is enough to go on from, if no later call reads anything that was made before it. A cut is such a
tensor that has the form of the hidden states: the sum behind the attention is one in most models. It can take the
block's input's place, and later layers need no more of the block than what lies behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparsefw.errors import InputError, first_line, shown
from sparsefw.model.experts import experts_of
from sparsefw.model.layers import BlockTape, Layer, ResidualWrite, Role, Stage, by_input, is_expert, record_block
from sparsefw.model.parts import INPUT, SAME, Point, next_point, run_part
from sparsefw.model.stand_ins import hidden_of
from sparsefw.model.tape import Op, Value
from sparsefw.model.watch import Outputs, Selector, Watch, everything

# Stands for the block's caller, who reads its output after all calls.
_CALLER = 1 << 60

# Functions that read values of a tensor, by name. What a block does behind them may depend on what they read.
_VALUES = {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__contains__", "item", "tolist", "numpy"}
_VALUES |= {"equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"}

# Runs a micro-batch through a block: called with the block's input, returns what the block does.
RunBlock = Callable[[Tensor], Any]

# Why blocks with a trace of this signature cannot be run in parts; empty if they can.
Confirmed = dict[tuple, str]


@dataclass(frozen=True)
class Survey:
    """The layers of a block, as one micro-batch shows them.

    Attributes:
        layers: the selected layers, in the order of use.
        roles: the role of each.
        cuts: where the block can go on from its residual stream: the first cut between each two layers that are used
            one after the other, where there is one.
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
        confirmed: what is known of other blocks, see `confirm`.
        experts: names of modules that may be experts; None: those of `experts_of`.
    """
    tape, output = record_block(block, run, hidden, handed_on)
    found = survey_tape(tape, experts_of(block) if experts is None else experts, selected)
    return confirm(found, run, hidden, output, {} if confirmed is None else confirmed)


def survey_tape(tape: BlockTape, experts: frozenset[str], selected: Selector = everything) -> Survey:
    """What a recorded forward shows of the layers of a block; whether it runs in parts is not known yet.

    Args:
        tape: the forward.
        experts: names of modules that may be experts.
        selected: selects the layers to look at.
    """
    watch, flow = Watch(tape.names, experts, selected), _Dataflow(tape, experts)
    for op in tape.ops:
        products = [*filter(watch.see, tape.products.get(op.number, ()))]
        watch.outputs.follow(products, op.function, op.args, op.kwargs, op.inputs, op.out)
    roles = {name: flow.role(name, watch.outputs) for name in watch.layers}
    # Equal functions and forms of all outputs mean equal forwards.
    made = [(op.name, tuple(tuple(x.shape) for x in op.made)) for op in tape.ops]
    signature = (*made, *flow.cuts, *roles.items())
    return Survey([*watch.layers.values()], roles, flow.cuts, tuple(watch.ignored), experts, signature)


class _Dataflow:
    """What follows from the block's input in a recorded forward. A call is an operation; 0 is the block's input.

    Args:
        tape: the forward.
        experts: names of modules that may be experts.

    Attributes:
        cuts: see `Survey`.
    """

    def __init__(self, tape: BlockTape, experts: frozenset[str]) -> None:
        self._tape, self._experts = tape, experts
        self._points = [*accumulate(tape.ops, lambda point, op: next_point(point, op.function), initial=INPUT)]
        self._follows = {0}
        # By call: the last call that reads what it makes; and the call whose output holds the same numbers.
        self._last_read = [0, *(op.number for op in tape.ops)]
        self._same_as = [0, *(op.number for op in tape.ops)]
        # The first call that reads values, on which later calls may depend; and the first that multiplies with an
        # expert. Another micro-batch may number later calls differently: it takes another branch, or reaches others.
        self._first_value = self._first_expert = _CALLER
        # By layer, selected or not: the calls that multiply with it, and the points of their inputs. The point is None
        # if it is not known, if the input was written to after it was made, or if the call multiplies with others, too.
        self._uses: dict[str, list[tuple[int, Point | None]]] = {}
        # Calls that return something of the form of hidden states.
        like_hidden: set[int] = set()
        for op in tape.ops:
            sources = {call for x in op.inputs if (call := self._call_of(x)) is not None}
            for product in tape.products.get(op.number, ()):
                name, made = product.layer.name, self._unchanged(product.X) if product.alone else None
                self._uses.setdefault(name, []).append((op.number, made))
                if is_expert(name, experts):
                    self._first_expert = min(self._first_expert, op.number)
            if sources and _reads_values(op):
                self._first_value = min(self._first_value, op.number)
            # A shape or a dtype is the same for a tensor without data.
            if not op.made or not sources:
                continue
            self._follows.add(op.number)
            for call in sources:
                self._last_read[call] = op.number
            if op.name in SAME and len(sources) == 1:
                self._same_as[op.number] = self._same_as[min(sources)]
            if isinstance(op.out, Value) and (op.out.shape, op.out.dtype) == (tape.hidden.shape, tape.hidden.dtype):
                like_hidden.add(op.number)
        for x in (tape.output, *tape.handed_on):
            if (call := self._call_of(x)) is not None:
                self._last_read[call] = _CALLER
        self.cuts = self._find_cuts(like_hidden)

    def _call_of(self, x: object) -> int | None:
        """The call that has made a value; None if it does not follow from the block's input."""
        return x.maker if isinstance(x, Value) and x.maker in self._follows else None

    def _unchanged(self, x: object) -> Point | None:
        """The point of a value; None if it was written to by other means than the call itself."""
        if (call := self._call_of(x)) is None:
            return None
        return self._points[call] if not call or x in self._tape.ops[call - 1].made else None

    def _varies(self, point: Point) -> bool:
        """Whether another micro-batch may number the point's call differently."""
        return min(self._first_value, self._first_expert) <= point.call

    def _find_cuts(self, like_hidden: set[int]) -> list[Point]:
        """The first cut between each two layers that are used one after the other, if there is one."""
        calls = sorted(call for uses in self._uses.values() for call, _ in uses)
        # By call: the last call that reads something made before it.
        read_until = [0, *accumulate(self._last_read, max)]
        found = []
        for before, after in pairwise(calls):
            between = (call for call in range(before, after) if call in like_hidden and read_until[call] <= call)
            if (cut := next(between, None)) is not None and not self._varies(self._points[cut]):
                found.append(self._points[cut])
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
            behind = self.cuts[segment] if segment < len(self.cuts) else None
            other, out = sums[0]
            ends = outputs.is_output(self._tape.output, layer) if behind is None else self._is_at(out, behind)
            if len(sums) > 1 or not self._is_at(other, stream) or not ends:
                return Role(segment)
            write = ResidualWrite(stream, behind)
        saves = any(stream.call < use < made.call for uses in self._uses.values() for use, _ in uses)
        return Role(segment, made, write, saves and self._enough(made, stream))

    def _is_at(self, x: object, point: Point) -> bool:
        """Whether a value holds the numbers of a point, perhaps in another shape."""
        call = self._call_of(x)
        return call is not None and self._same_as[call] == self._same_as[point.call]

    def _enough(self, point: Point, cut: Point) -> bool:
        """Whether the block can go on from a point, if the cut before it is there as well."""
        same = self._same_as[cut.call]
        made_before = (n for n in range(point.call) if n < cut.call or self._same_as[n] != same)
        return all(self._last_read[n] <= point.call for n in made_before)


def _reads_values(op: Op) -> bool:
    """Whether what follows a call, or the shape of its result, depends on values of tensors."""
    if op.name == "__getitem__":
        return any(x.dtype in (torch.bool, torch.uint8) for x in op.inputs[1:])
    return op.name in _VALUES or (op.name == "where" and len(op.args) + len(op.kwargs) == 1)


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
        confirmed[found.signature] = _stays_whole(run, hidden, found, output)
    if not confirmed[found.signature]:
        return found
    return replace(found, roles=dict.fromkeys(found.roles, Role()), cuts=[])


def _stays_whole(run: RunBlock, hidden: Tensor, found: Survey, output: Tensor) -> str:
    """Why a block cannot be run in parts; empty if its parts give what the whole gives, bit for bit."""
    try:
        inputs = [(role, role.input) for role in found.roles.values() if role.input is not None]
        taken, whole = run_part(run, {INPUT: hidden}, {*found.cuts, *(point for _, point in inputs)})
        outputs = [hidden_of(whole)]
        starts: list[dict[Point, Tensor]] = [{INPUT: hidden}, *({cut: taken[cut]} for cut in found.cuts)]
        kept = [starts[role.segment] | {point: taken[point]} for role, point in inputs if role.keepable]
        outputs += [hidden_of(run_part(run, given)[1]) for given in (*starts[1:], *kept)]
    except torch.OutOfMemoryError:
        raise
    except (InputError, RuntimeError, NotImplementedError, ValueError, TypeError, IndexError, AttributeError) as error:
        # A block that cannot do without data, because it branches on a value, say, is run as a whole.
        return shown(first_line(error))
    same = all(torch.allclose(part, output, rtol=0, atol=0, equal_nan=True) for part in outputs)
    return "" if same else "its parts give other bits than the whole"


def stages(surveyed: Survey) -> list[Stage]:
    """The stages of a block in the order of use."""
    by_key = by_input(surveyed.layers, surveyed.experts)
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
        # Otherwise it has to be watched.
        if all(role.input is not None for role in roles[n]):
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
